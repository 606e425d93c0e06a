// The statistics file: what goes in comes out, merging, and damage. check_h5py.py reads the same file with
// h5py.
#include <gtest/gtest.h>
#include <hdf5.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "formats/file_system.hpp"
#include "formats/statistics.hpp"
#include "formats/statistics_file.hpp"
#include "tests/formats/support.hpp"

namespace fireq::formats {
namespace {

using test::error_of;
using test::expect_parts;
using test::Parts;
using test::TempFolder;

constexpr std::uint64_t kKvHeads = 2, kHeadDim = 6, kTokens = 5;
const std::array<std::uint64_t, kSites> kChannels{10, 24, 12, 12, 12, 24, 10, 17};

SiteStatistics random_site(std::mt19937_64& random, std::uint64_t channels, std::uint64_t tokens) {
  std::normal_distribution<double> normal;
  SiteStatistics s;
  s.count = tokens;
  s.absmax.assign(channels, 0);
  for (std::vector<double>* sum : {&s.abssum, &s.sumsq, &s.sum1, &s.sum3, &s.sum4}) sum->assign(channels, 0);
  s.histogram.assign(kHistogramBins, 0);
  for (std::uint64_t t = 0; t < tokens; ++t) {
    for (std::uint64_t c = 0; c < channels; ++c) {
      const double x = normal(random);
      s.absmax[c] = std::max(s.absmax[c], static_cast<float>(std::abs(x)));
      s.abssum[c] += std::abs(x);
      s.sum1[c] += x;
      s.sumsq[c] += x * x;
      s.sum3[c] += x * x * x;
      s.sum4[c] += x * x * x * x;
      ++s.histogram[random() % kHistogramBins];
    }
  }
  return s;
}

CalibrationStatistics random_statistics(std::uint64_t seed, std::size_t layers = 3) {
  std::mt19937_64 random(seed);
  CalibrationStatistics all;
  all.meta = {"0123456789abcdef0123456789abcdef",
              "00000000000000000000000000000001",
              kTokens,
              1,
              seed,
              kKvHeads,
              kHeadDim};
  all.layers.resize(layers);
  for (LayerStatistics& layer : all.layers) {
    for (std::size_t s = 0; s < kSites; ++s) layer.sites[s] = random_site(random, kChannels[s], kTokens);
    for (std::uint64_t i = 0; i < kKvHeads * kHeadDim / 2; ++i) {
      layer.k_pair_radius.push_back(static_cast<float>(random() % 1000) / 7.0F);
    }
  }
  return all;
}

void expect_same(const SiteStatistics& a, const SiteStatistics& b) {
  EXPECT_EQ(a.absmax, b.absmax);
  EXPECT_EQ(a.abssum, b.abssum);
  EXPECT_EQ(a.sumsq, b.sumsq);
  EXPECT_EQ(a.sum1, b.sum1);
  EXPECT_EQ(a.sum3, b.sum3);
  EXPECT_EQ(a.sum4, b.sum4);
  EXPECT_EQ(a.histogram, b.histogram);
  EXPECT_EQ(a.count, b.count);
}

void expect_same(const CalibrationStatistics& a, const CalibrationStatistics& b) {
  EXPECT_EQ(a.meta.model_fingerprint, b.meta.model_fingerprint);
  EXPECT_EQ(a.meta.text_fingerprint, b.meta.text_fingerprint);
  EXPECT_EQ(a.meta.tokens, b.meta.tokens);
  EXPECT_EQ(a.meta.windows, b.meta.windows);
  EXPECT_EQ(a.meta.seed, b.meta.seed);
  EXPECT_EQ(a.meta.kv_heads, b.meta.kv_heads);
  EXPECT_EQ(a.meta.head_dim, b.meta.head_dim);
  ASSERT_EQ(a.layers.size(), b.layers.size());
  for (std::size_t i = 0; i < a.layers.size(); ++i) {
    for (std::size_t s = 0; s < kSites; ++s) expect_same(a.layers[i].sites[s], b.layers[i].sites[s]);
    EXPECT_EQ(a.layers[i].k_pair_radius, b.layers[i].k_pair_radius);
  }
}

TEST(Statistics, FileRoundTrip) {
  const TempFolder folder;
  const std::string path = folder / "s.h5";
  CalibrationStatistics all = random_statistics(11);
  all.layers[1] = {};           // a layer that saw nothing
  all.layers[2].sites[3] = {};  // a site that saw nothing
  all.layers[0].sites[0].absmax[0] = std::numeric_limits<float>::max();
  all.layers[0].sites[0].sum3[1] = -1e300;
  all.layers[0].sites[0].sumsq[2] = std::numeric_limits<double>::denorm_min();
  all.meta.seed = std::numeric_limits<std::uint64_t>::max();
  write_statistics(real_file_system(), path, all);
  expect_same(read_statistics(path), all);
  expect_same(read_statistics(path), all);  // twice in one process
  // Equal statistics give equal bytes, wherever they are written.
  const std::string bytes = test::read_bytes(path);
  EXPECT_EQ(bytes, statistics_file_bytes(all, "x"));
  write_statistics(real_file_system(), folder / "t.h5", all);
  EXPECT_EQ(bytes, test::read_bytes(folder / "t.h5"));
  EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));
}

TEST(Statistics, NoLayers) {
  const TempFolder folder;
  CalibrationStatistics all;
  all.meta.text_fingerprint = std::string(32, '0');
  write_statistics(real_file_system(), folder / "s.h5", all);
  expect_same(read_statistics(folder / "s.h5"), all);
}

TEST(Statistics, SmallFile) {
  // A few hundred bytes for each dataset besides its values: a large model has some ten thousand of them.
  const CalibrationStatistics all = random_statistics(1, 16);
  std::size_t values = 0;
  for (const std::uint64_t channels : kChannels) values += channels * (4 + 6 * 8) + kHistogramBins * 8 + 8;
  const std::size_t datasets = 16 * (kSites * kSiteDatasets.size() + 1);
  EXPECT_LT(statistics_file_bytes(all, "x").size(), 16 * values + datasets * 800 + 10'000);
}

// Merging two halves is what one run over both would have seen: a second summation, over the samples.
TEST(Statistics, MergeAddsUp) {
  const CalibrationStatistics a = random_statistics(21), b = random_statistics(22), c = random_statistics(23);
  CalibrationStatistics ab = a;
  ab.merge(b);
  EXPECT_EQ(ab.meta.tokens, 2 * kTokens);
  EXPECT_EQ(ab.meta.windows, 2U);
  EXPECT_EQ(ab.meta.seed, 0U);  // two different ones
  EXPECT_EQ(ab.meta.text_fingerprint, "00000000000000000000000000000002");
  for (std::size_t i = 0; i < a.layers.size(); ++i) {
    for (std::size_t s = 0; s < kSites; ++s) {
      const SiteStatistics &x = a.layers[i].sites[s], &y = b.layers[i].sites[s], &m = ab.layers[i].sites[s];
      EXPECT_EQ(m.count, x.count + y.count);
      for (std::size_t k = 0; k < m.absmax.size(); ++k) {
        EXPECT_EQ(m.absmax[k], std::max(x.absmax[k], y.absmax[k]));
        EXPECT_EQ(m.abssum[k], x.abssum[k] + y.abssum[k]);
        EXPECT_EQ(m.sumsq[k], x.sumsq[k] + y.sumsq[k]);
        EXPECT_EQ(m.sum1[k], x.sum1[k] + y.sum1[k]);
        EXPECT_EQ(m.sum3[k], x.sum3[k] + y.sum3[k]);
        EXPECT_EQ(m.sum4[k], x.sum4[k] + y.sum4[k]);
      }
      for (std::size_t k = 0; k < kHistogramBins; ++k)
        EXPECT_EQ(m.histogram[k], x.histogram[k] + y.histogram[k]);
    }
    for (std::size_t k = 0; k < ab.layers[i].k_pair_radius.size(); ++k) {
      EXPECT_EQ(ab.layers[i].k_pair_radius[k],
                std::max(a.layers[i].k_pair_radius[k], b.layers[i].k_pair_radius[k]));
    }
  }
  check_statistics(ab, "merged");
  // Order does not matter at all; grouping only in the last bits of the sums.
  CalibrationStatistics ba = b;
  ba.merge(a);
  expect_same(ab, ba);
  CalibrationStatistics ab_c = ab, bc = b, a_bc = a;
  ab_c.merge(c);
  bc.merge(c);
  a_bc.merge(bc);
  EXPECT_EQ(ab_c.meta.text_fingerprint, a_bc.meta.text_fingerprint);
  for (std::size_t k = 0; k < kChannels[0]; ++k) {
    EXPECT_EQ(ab_c.layers[0].sites[0].absmax[k], a_bc.layers[0].sites[0].absmax[k]);
    EXPECT_NEAR(ab_c.layers[0].sites[0].sumsq[k], a_bc.layers[0].sites[0].sumsq[k],
                1e-12 * ab_c.layers[0].sites[0].sumsq[k]);
  }
}

TEST(Statistics, MergeWithNothingAndFingerprintsThatOverflow) {
  CalibrationStatistics a = random_statistics(31);
  const CalibrationStatistics before = a;
  CalibrationStatistics empty = a;
  for (LayerStatistics& layer : empty.layers) layer = {};
  empty.meta.tokens = empty.meta.windows = 0;
  empty.meta.text_fingerprint = std::string(32, '0');
  a.merge(empty);
  expect_same(a, before);
  empty.merge(before);
  expect_same(empty, before);
  a.meta.text_fingerprint = std::string(32, 'f');  // 128-bit numbers: -1 + 1
  a.merge(before);
  EXPECT_EQ(a.meta.text_fingerprint, std::string(32, '0'));
  EXPECT_EQ(a.meta.seed, before.meta.seed);  // both had this one
}

TEST(Statistics, MergeRefusesAnotherModelAndChangesNothing) {
  struct Row {
    const char* name;
    std::function<void(CalibrationStatistics&)> change;
    Parts parts;
  };
  const std::vector<Row> rows{
      {"model",
       [](auto& s) { s.meta.model_fingerprint = "other"; },
       {.message = "statistics of another model",
        .expected = "model fingerprint 0123456789abcdef0123456789abcdef",
        .found = "other",
        .hint = "only statistics of one model can be merged"}},
      {"layers",
       [](auto& s) { s.layers.resize(2); },
       {.message = "statistics of another model: the number of layers differs",
        .expected = "3",
        .found = "2"}},
      {"kv heads",
       [](auto& s) { s.meta.kv_heads = 3; },
       {.message = "statistics of another model: the number of KV heads differs",
        .expected = "2",
        .found = "3"}},
      {"head dim",
       [](auto& s) { s.meta.head_dim = 4; },
       {.message = "statistics of another model: head_dim differs", .expected = "6", .found = "4"}},
      {"channels",
       [](auto& s) { s.layers[2].sites[7].absmax.resize(3); },
       {.message = "statistics of another model: channels of layer 2 down_in differs",
        .expected = "17",
        .found = "3"}},
      {"radius",
       [](auto& s) { s.layers[2].k_pair_radius.resize(3); },
       {.message = "statistics of another model: the number of key pairs differs",
        .expected = "6",
        .found = "3"}},
      {"text",
       [](auto& s) { s.meta.text_fingerprint = "xyz"; },
       {.message = "text fingerprint is malformed", .expected = "32 hexadecimal digits", .found = "'xyz'"}},
      {"tokens",
       [](auto& s) { s.meta.tokens = std::numeric_limits<std::uint64_t>::max(); },
       {.message = "size overflows 64 bits: tokens of merged statistics",
        .hint = "the file is damaged or was made to do harm"}},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    CalibrationStatistics a = random_statistics(41);
    const CalibrationStatistics before = a;
    CalibrationStatistics b = random_statistics(42);
    row.change(b);
    expect_parts(error_of([&] { a.merge(b); }), row.parts);
    expect_same(a, before);
  }
}

TEST(Statistics, ContentThatBreaksARuleIsNeverWritten) {
  struct Row {
    std::function<void(CalibrationStatistics&)> change;
    Parts parts;
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::string not_negative = "finite values of 0 or more";
  const std::vector<Row> rows{
      {[](auto& s) { s.layers[1].sites[0].absmax[3] = -1; },
       {.message = "a value is out of range",
        .tensor = "/layers/001/attn_in/absmax",
        .expected = not_negative,
        .found = "-1.000000 at [3]"}},
      {[&](auto& s) { s.layers[0].sites[1].sum1[9] = nan; },
       {.message = "a value is out of range",
        .tensor = "/layers/000/q/sum1",
        .expected = "finite values",
        .found = "nan at [9]"}},
      {[](auto& s) { s.layers[0].sites[2].sum4[0] = std::numeric_limits<double>::infinity(); },
       {.message = "a value is out of range",
        .tensor = "/layers/000/k_pre_rope/sum4",
        .expected = not_negative,
        .found = "inf at [0]"}},
      {[](auto& s) { s.layers[0].sites[5].sumsq.pop_back(); },
       {.message = "wrong number of values",
        .tensor = "/layers/000/o_in/sumsq",
        .expected = "24",
        .found = "23"}},
      {[](auto& s) { s.layers[0].sites[4] = s.layers[0].sites[0]; },
       {.message = "wrong number of values",
        .tensor = "/layers/000/v/absmax",
        .expected = "12",
        .found = "10"}},
      {[](auto& s) { ++s.layers[2].sites[6].histogram[5]; },
       {.message = "the histogram does not hold every value",
        .tensor = "/layers/002/mlp_in/histogram",
        .expected = "50",
        .found = "51"}},
      {[](auto& s) { s.layers[2].sites[6].histogram.push_back(0); },
       {.message = "wrong number of values",
        .tensor = "/layers/002/mlp_in/histogram",
        .expected = "40",
        .found = "41"}},
      {[](auto& s) { s.layers[2].sites[6].count = 0; },
       {.message = "values without tokens",
        .tensor = "/layers/002/mlp_in/count",
        .expected = "a count above 0",
        .found = "0"}},
      {[](auto& s) { s.layers[0].k_pair_radius.pop_back(); },
       {.message = "wrong number of values",
        .tensor = "/layers/000/k_pair_radius",
        .expected = "6",
        .found = "5"}},
      {[](auto& s) { s.meta.model_fingerprint = std::string(65, 'a'); },
       {.message = "a fingerprint is malformed",
        .tensor = "/meta",
        .expected = "at most 64 visible ASCII characters",
        .found = "'" + std::string(65, 'a') + "'"}},
      {[](auto& s) { s.meta.text_fingerprint = "a b"; },
       {.message = "a fingerprint is malformed",
        .tensor = "/meta",
        .expected = "at most 64 visible ASCII characters",
        .found = "'a b'"}},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.parts.tensor + " " + row.parts.message);
    const TempFolder folder;
    CalibrationStatistics all = random_statistics(51);
    row.change(all);
    Parts parts = row.parts;
    parts.path = folder / "s.h5";
    expect_parts(error_of([&] { write_statistics(real_file_system(), folder / "s.h5", all); }), parts);
    EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  }
}

TEST(Statistics, DamagedFilesAreRefused) {
  const TempFolder folder;
  const std::string path = folder / "s.h5";
  const std::string good = statistics_file_bytes(random_statistics(61), "x");
  const auto read = [&](std::string_view bytes) {
    test::write_bytes(path, bytes);
    return error_of([&] { read_statistics(path); });
  };
  ASSERT_FALSE(read(good));
  expect_parts(error_of([&] { read_statistics(folder / "none"); }),
               {.message = "file not found", .path = folder / "none"});
  const Parts other{.message = "not a FireQ statistics file",
                    .path = path,
                    .expected = "'FireQ statistics 1, xxh3-128 of the HDF5 data that follows: '",
                    .hint = "make one with 'fireq calibrate'"};
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, kHeadBlock - 1, kHeadBlock}) {
    expect_parts(read(good.substr(0, size)), other);
  }
  expect_parts(read(good.substr(kHeadBlock)), other);  // HDF5, but not with our block in front
  std::string version = good;
  version[17] = '2';
  expect_parts(read(version), other);
  // Any changed or missing byte of the rest is seen before HDF5 sees it.
  std::mt19937_64 random(62);
  const std::string message = "the file is damaged: its checksum does not fit";
  for (int i = 0; i < 200; ++i) {
    std::string bytes = good;
    const std::size_t at = kHeadText.size() + random() % (bytes.size() - kHeadText.size());
    bytes[at] = static_cast<char>(bytes[at] ^ static_cast<char>(1U << (random() % 8)));
    const auto error = read(bytes);
    ASSERT_TRUE(error) << at;
    EXPECT_EQ(error->message(), message);
    EXPECT_EQ(error->path(), path);
    EXPECT_EQ(error->offset(), kHeadText.size());
    EXPECT_EQ(error->expected().size(), 32U);
    EXPECT_EQ(error->hint(), "copy it again, or make it again with 'fireq calibrate'");
  }
  for (const std::size_t size : {kHeadBlock + 1, good.size() / 2, good.size() - 1}) {
    const auto error = read(good.substr(0, size));
    ASSERT_TRUE(error) << size;
    EXPECT_EQ(error->message(), message);
  }
  EXPECT_EQ(read(good + "x")->message(), message);
  // With a checksum that fits, what is no HDF5 is still refused.
  const auto sealed = [](std::string data) {
    return data.insert(0, statistics_head_block(std::as_bytes(std::span(data))));
  };
  for (const std::string& data : {std::string(), std::string(4096, '\0'), good.substr(kHeadBlock, 3000)}) {
    const auto error = read(sealed(data));
    ASSERT_TRUE(error) << data.size();
    EXPECT_EQ(error->kind(), ErrorKind::input) << error->what();
    EXPECT_EQ(error->path(), path);
  }
}

// Files with a checksum that fits and an inside that no writer of ours makes: edited with the HDF5 library.
class ForgedStatistics : public ::testing::Test {
 protected:
  std::optional<Error> read_after(const std::function<void(hid_t)>& edit) const {
    const std::string raw = folder_ / "raw.h5", path = folder_ / "s.h5";
    test::write_bytes(raw, statistics_file_bytes(random_statistics(71), "x").substr(kHeadBlock));
    {
      const Hdf5Session session;
      const Hdf5Handle file(H5Fopen(raw.c_str(), H5F_ACC_RDWR, H5P_DEFAULT), H5Fclose);
      EXPECT_TRUE(file.valid());
      edit(file.get());
    }
    std::string data = test::read_bytes(raw);
    data.insert(0, statistics_head_block(std::as_bytes(std::span(data))));
    test::write_bytes(path, data);
    std::optional<Error> error = error_of([&] { read_statistics(path); });
    if (error) {
      EXPECT_EQ(error->path(), path);
      EXPECT_EQ(error->kind(), ErrorKind::input);
    }
    return error;
  }
  void expect_message(const std::function<void(hid_t)>& edit, const std::string& tensor,
                      const std::string& message) const {
    const std::optional<Error> error = read_after(edit);
    ASSERT_TRUE(error) << message;
    EXPECT_EQ(error->tensor(), tensor) << error->what();
    EXPECT_EQ(error->message(), message) << error->what();
  }
  static void replace(hid_t file, const char* name, hid_t type, const std::vector<hsize_t>& shape,
                      bool chunked = true, bool deflate = false) {
    H5Ldelete(file, name, H5P_DEFAULT);
    const auto rank = static_cast<int>(shape.size());
    const Hdf5Handle space(H5Screate_simple(rank, shape.data(), nullptr), H5Sclose);
    const Hdf5Handle options(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
    if (chunked) H5Pset_chunk(options.get(), rank, std::vector<hsize_t>(shape.size(), 1).data());
    if (deflate) H5Pset_deflate(options.get(), 9);
    const Hdf5Handle set(H5Dcreate2(file, name, type, space.get(), H5P_DEFAULT, options.get(), H5P_DEFAULT),
                         H5Dclose);
    EXPECT_TRUE(set.valid());
  }
  const TempFolder folder_;
};

TEST_F(ForgedStatistics, TheUneditedFileIsRead) {
  const std::optional<Error> error = read_after([](hid_t) {});
  EXPECT_FALSE(error) << error->what();
}

TEST_F(ForgedStatistics, LinksAndGroups) {
  const std::string absmax = "/layers/001/v/absmax";
  expect_message([&](hid_t f) { H5Ldelete(f, absmax.c_str(), H5P_DEFAULT); }, "/layers/001/v",
                 "wrong number of entries in the group");
  expect_message(
      [&](hid_t f) { H5Lmove(f, absmax.c_str(), f, "/layers/001/v/other", H5P_DEFAULT, H5P_DEFAULT); },
      absmax, "the dataset is missing");
  expect_message(
      [&](hid_t f) {
        H5Ldelete(f, absmax.c_str(), H5P_DEFAULT);
        H5Lcreate_soft("/layers/000/v/absmax", f, absmax.c_str(), H5P_DEFAULT, H5P_DEFAULT);
      },
      absmax, "a soft or external link");
  expect_message(
      [&](hid_t f) {
        H5Ldelete(f, absmax.c_str(), H5P_DEFAULT);
        H5Lcreate_external("/etc/passwd", "/x", f, absmax.c_str(), H5P_DEFAULT, H5P_DEFAULT);
      },
      absmax, "a soft or external link");
  expect_message([&](hid_t f) { H5Ldelete(f, "/layers/002", H5P_DEFAULT); }, "/layers",
                 "wrong number of entries in the group");
  expect_message([&](hid_t f) { H5Ldelete(f, "/meta", H5P_DEFAULT); }, "/",
                 "wrong number of entries in the group");
  expect_message(
      [&](hid_t f) { H5Gclose(H5Gcreate2(f, "/layers/000/unknown", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT)); },
      "/layers/000", "wrong number of entries in the group");
}

// A few bytes must not become gigabytes: neither by a shape without data, nor by compression, nor by many
// names for one dataset.
TEST_F(ForgedStatistics, NothingIsLargerThanTheFile) {
  const std::string absmax = "/layers/001/attn_in/absmax";
  expect_message([&](hid_t f) { replace(f, absmax.c_str(), H5T_IEEE_F32LE, {hsize_t{1} << 40U}); }, absmax,
                 "stored bytes do not fit the shape");
  expect_message([&](hid_t f) { replace(f, absmax.c_str(), H5T_IEEE_F32LE, {hsize_t{1} << 62U}); }, "",
                 "size overflows 64 bits: /layers/001/attn_in/absmax");
  expect_message([&](hid_t f) { replace(f, absmax.c_str(), H5T_IEEE_F32LE, {10}, true, true); }, absmax,
                 "unexpected storage");
  expect_message([&](hid_t f) { replace(f, absmax.c_str(), H5T_IEEE_F32LE, {10}, false); }, absmax,
                 "unexpected storage");
  expect_message(
      [&](hid_t f) {
        H5Ldelete(f, "/layers/001", H5P_DEFAULT);
        H5Lcreate_hard(f, "/layers/000", f, "/layers/001", H5P_DEFAULT, H5P_DEFAULT);
      },
      "/layers/001", "two names for one object");
  expect_message(
      [&](hid_t f) {
        H5Ldelete(f, absmax.c_str(), H5P_DEFAULT);
        H5Lcreate_hard(f, "/layers/000/attn_in/absmax", f, absmax.c_str(), H5P_DEFAULT, H5P_DEFAULT);
      },
      absmax, "two names for one object");
}

TEST_F(ForgedStatistics, TypesAndShapes) {
  const std::string absmax = "/layers/000/q/absmax";
  expect_message([&](hid_t f) { replace(f, absmax.c_str(), H5T_IEEE_F64LE, {24}); }, absmax, "wrong type");
  expect_message([&](hid_t f) { replace(f, absmax.c_str(), H5T_IEEE_F32BE, {24}); }, absmax, "wrong type");
  expect_message([&](hid_t f) { replace(f, absmax.c_str(), H5T_IEEE_F32LE, {4, 6}); }, absmax, "wrong rank");
  expect_message([&](hid_t f) { replace(f, "/layers/000/q/sum1", H5T_IEEE_F64LE, {23}); },
                 "/layers/000/q/sum1", "wrong shape");
  expect_message([&](hid_t f) { replace(f, "/layers/000/k_pair_radius", H5T_IEEE_F32LE, {6}); },
                 "/layers/000/k_pair_radius", "wrong rank");
  expect_message(
      [&](hid_t f) {
        replace(f, "/layers/000/k_pair_radius", H5T_IEEE_F32LE, {3, 2});
      },
      "/layers/000/k_pair_radius", "wrong shape");
}

TEST_F(ForgedStatistics, Attributes) {
  const auto rewrite = [](const char* name, std::uint64_t value) {
    return [=](hid_t f) {
      H5Adelete_by_name(f, "/meta", name, H5P_DEFAULT);
      const Hdf5Handle space(H5Screate(H5S_SCALAR), H5Sclose);
      const Hdf5Handle attribute(H5Acreate_by_name(f, "/meta", name, H5T_STD_U64LE, space.get(), H5P_DEFAULT,
                                                   H5P_DEFAULT, H5P_DEFAULT),
                                 H5Aclose);
      EXPECT_GE(H5Awrite(attribute.get(), H5T_NATIVE_UINT64, &value), 0) << hdf5_reason();
    };
  };
  expect_message(rewrite("format_version", 2), "/meta", "unknown format_version");
  expect_message(rewrite("layers", 4), "/layers", "wrong number of entries in the group");
  expect_message(rewrite("layers", ~std::uint64_t{0}), "/meta@layers", "out of range");
  expect_message(rewrite("tokens", (std::uint64_t{1} << 53U) + 1), "/meta@tokens", "out of range");
  expect_message(rewrite("head_dim", (std::uint64_t{1} << 31U) + 1), "/meta@head_dim", "out of range");
  expect_message([](hid_t f) { H5Adelete_by_name(f, "/meta", "seed", H5P_DEFAULT); }, "/meta@seed",
                 "the attribute is missing");
}

// Random damage under a checksum that fits: an Error or statistics that keep the rules; nothing else.
TEST_F(ForgedStatistics, RandomDamageUnderAFittingChecksum) {
  std::mt19937_64 random(81);
  const std::string good = statistics_file_bytes(random_statistics(82, 1), "x").substr(kHeadBlock);
  const std::string path = folder_ / "s.h5";
  std::size_t refused = 0;
  for (int i = 0; i < 300; ++i) {
    std::string data = good;
    for (std::size_t edits = 1 + random() % 3; edits > 0; --edits) {
      data[random() % data.size()] = static_cast<char>(random());
    }
    test::write_bytes(path, statistics_head_block(std::as_bytes(std::span(data))) + data);
    const auto error = error_of([&] { check_statistics(read_statistics(path), path); });
    if (!error) continue;
    ++refused;
    ASSERT_EQ(error->kind(), ErrorKind::input) << error->what();
  }
  EXPECT_GT(refused, 20U);
}

}  // namespace
}  // namespace fireq::formats
