namespace fireq::formats {}
