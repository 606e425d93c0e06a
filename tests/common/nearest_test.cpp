#include "common/nearest.hpp"

#include <gtest/gtest.h>

namespace fireq {
namespace {

TEST(NameDistance, IsZeroForTheSameAndOneForNothingInCommon) {
  EXPECT_EQ(name_distance("", ""), 0);
  EXPECT_EQ(name_distance("eval", "eval"), 0);
  EXPECT_EQ(name_distance("abc", "xyz"), 1);
  EXPECT_EQ(name_distance("abc", ""), 1);
  // One edit of three letters; two letters in common at the beginning take a fifth off.
  EXPECT_DOUBLE_EQ(name_distance("abd", "abc"), 1.0 / 3 * 0.8);
  EXPECT_DOUBLE_EQ(name_distance("bbc", "abc"), 1.0 / 3);
}

TEST(NearestName, FindsWhatWasMeant) {
  const std::vector<std::string> commands{"quantize", "calibrate", "inspect", "validate", "eval", "generate"};
  EXPECT_EQ(nearest_name("quantise", commands), "quantize");
  EXPECT_EQ(nearest_name("evaluate", commands), "eval");
  EXPECT_EQ(nearest_name("generat", commands), "generate");
  EXPECT_EQ(nearest_name("word", {}), "");
}

TEST(NearestName, ComparesTheLastPartToo) {
  const std::vector<std::string> keys{"keys.top_k", "smoothing.lambda2_c", "smoothing.lambda2",
                                      "weights.levels"};
  EXPECT_EQ(nearest_name("lambda2_k", keys), "smoothing.lambda2_c");
  EXPECT_EQ(nearest_name("smoothing.lambda2", keys), "smoothing.lambda2");
  EXPECT_EQ(nearest_name("weight.level", keys), "weights.levels");
}

}  // namespace
}  // namespace fireq
