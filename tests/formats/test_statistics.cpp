// The statistics file: what goes in comes out, merging, and damage. check_h5py.py reads the same file with
// h5py.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "formats/file_system.hpp"
#include "formats/statistics.hpp"
#include "formats/statistics_file.hpp"
#include "tests/formats/support.hpp"

namespace fireq::formats {
namespace {

using nlohmann::json;
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
    for (std::uint64_t g = 0; g < kKvHeads; ++g) {
      layer.k_centre_gain.push_back(static_cast<double>(random() % 1000) / 7.0 - 70);
    }
    for (std::uint64_t i = 0; i < kKvHeads * kHeadDim * kHeadDim; ++i) {
      layer.q_products.push_back(static_cast<double>(random() % 1000) / 7.0 - 70);
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
    EXPECT_EQ(a.layers[i].k_centre_gain, b.layers[i].k_centre_gain);
    EXPECT_EQ(a.layers[i].q_products, b.layers[i].q_products);
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
    ASSERT_EQ(ab.layers[i].k_centre_gain.size(), kKvHeads);
    for (std::size_t g = 0; g < kKvHeads; ++g) {
      EXPECT_EQ(ab.layers[i].k_centre_gain[g], a.layers[i].k_centre_gain[g] + b.layers[i].k_centre_gain[g]);
    }
    ASSERT_EQ(ab.layers[i].q_products.size(), kKvHeads * kHeadDim * kHeadDim);
    for (std::size_t k = 0; k < ab.layers[i].q_products.size(); ++k) {
      EXPECT_EQ(ab.layers[i].q_products[k], a.layers[i].q_products[k] + b.layers[i].q_products[k]);
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
      {"gain",
       [](auto& s) { s.layers[1].k_centre_gain.resize(1); },
       {.message = "statistics of another model: the number of KV heads differs",
        .expected = "2",
        .found = "1"}},
      {"products",
       [](auto& s) { s.layers[1].q_products.resize(1); },
       {.message = "statistics of another model: the number of query products differs",
        .expected = std::to_string(kKvHeads * kHeadDim * kHeadDim),
        .found = "1"}},
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
      {[](auto& s) { s.layers[1].k_centre_gain.push_back(1); },
       {.message = "wrong number of values",
        .tensor = "/layers/001/k_centre_gain",
        .expected = "2",
        .found = "3"}},
      {[](auto& s) { s.layers[1].k_centre_gain[1] = std::numeric_limits<double>::infinity(); },
       {.message = "a value is out of range",
        .tensor = "/layers/001/k_centre_gain",
        .expected = "finite values",
        .found = "inf at [1]"}},
      {[](auto& s) { s.layers[0].q_products.pop_back(); },
       {.message = "wrong number of values",
        .tensor = "/layers/000/q_products",
        .expected = std::to_string(kKvHeads * kHeadDim * kHeadDim),
        .found = std::to_string(kKvHeads * kHeadDim * kHeadDim - 1)}},
      {[](auto& s) { s.layers[0].q_products[2] = std::numeric_limits<double>::quiet_NaN(); },
       {.message = "a value is out of range",
        .tensor = "/layers/000/q_products",
        .expected = "finite values",
        .found = "nan at [2]"}},
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
                    .expected = "'FireQ statistics 1, xxh3-128 of what follows this block: '",
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
  // A checksum that fits does not make it one.
  const auto sealed = [](std::string data, std::uint64_t table) {
    return data.insert(0, statistics_head_block(std::as_bytes(std::span(data)), table));
  };
  expect_parts(read(sealed("x", kHeadBlock + 2)), {.message = "the table's place is outside of the file",
                                                   .path = path,
                                                   .expected = "512 to 513",
                                                   .found = "514"});
  expect_parts(read(sealed("x", kHeadBlock - 1)), {.message = "the table's place is outside of the file",
                                                   .path = path,
                                                   .expected = "512 to 513",
                                                   .found = "511"});
  for (const char* data : {"x", "{", "[]", "{}", "{\"meta\":{},\"layers\":[]}", "{\"a\":1,\"a\":2}"}) {
    const auto error = read(sealed(data, kHeadBlock));
    ASSERT_TRUE(error) << data;
    EXPECT_EQ(error->kind(), ErrorKind::input) << error->what();
    EXPECT_EQ(error->path(), path);
  }
}

// Files with a checksum that fits and a table that no writer of ours makes.
class ForgedStatistics : public ::testing::Test {
 protected:
  ForgedStatistics() {
    const std::string bytes = statistics_file_bytes(random_statistics(71), "x");
    const std::size_t line = bytes.find(kTableText) + kTableText.size();
    place_ = std::stoul(bytes.substr(line, 20));
    data_ = bytes.substr(kHeadBlock, place_ - kHeadBlock);
    table_ = json::parse(bytes.substr(place_));
  }
  std::optional<Error> read(const std::string& data, const std::string& table) const {
    const std::string following = data + table;
    test::write_bytes(
        path_,
        statistics_head_block(std::as_bytes(std::span(following)), kHeadBlock + data.size()) + following);
    return error_of([&] { read_statistics(path_); });
  }
  void expect_refused(const std::function<void(json&)>& edit, Parts parts) const {
    json table = table_;
    edit(table);
    parts.path = path_;
    expect_parts(read(data_, table.dump()), parts);
  }

  const TempFolder folder_;
  const std::string path_ = folder_ / "s.h5";
  std::uint64_t place_ = 0;
  std::string data_;
  json table_;
};

TEST_F(ForgedStatistics, TheUneditedFileIsRead) {
  EXPECT_FALSE(read(data_, table_.dump()));
  EXPECT_FALSE(read(data_, table_.dump(2)));
}

// A few bytes must not become gigabytes, and nothing outside of the file is read.
TEST_F(ForgedStatistics, PlacesLieInTheFileAndShareNothing) {
  const std::string absmax = "/layers/001/attn_in/absmax";
  const std::string most = "an end of at most " + std::to_string(place_);
  const auto at = [](json& t, std::uint64_t offset) { t["layers"][1]["attn_in"]["absmax"] = offset; };
  expect_refused([&](json& t) { at(t, place_ - 39); }, {.message = "the values lie outside of the HDF5 data",
                                                        .tensor = absmax,
                                                        .expected = most,
                                                        .found = std::to_string(place_ + 1)});
  expect_refused([&](json& t) { at(t, std::uint64_t{1} << 53U); },
                 {.message = "the values lie outside of the HDF5 data",
                  .tensor = absmax,
                  .expected = most,
                  .found = std::to_string((std::uint64_t{1} << 53U) + 40)});
  const std::string range = "an integer from 512 to 9007199254740992";
  const std::string key = "key 'layers.001.attn_in.absmax' ";
  expect_refused([&](json& t) { at(t, 511); },
                 {.message = key + "is out of range", .expected = range, .found = "511"});
  expect_refused([&](json& t) { at(t, ~std::uint64_t{0}); },
                 {.message = key + "is out of range", .expected = range, .found = "18446744073709551615"});
  expect_refused([&](json& t) { t["layers"][1]["attn_in"]["absmax"] = -1; },
                 {.message = key + "is negative", .expected = range, .found = "-1"});
  // 2^62 floats are 2^64 bytes; fewer are still more than the file.
  expect_refused([&](json& t) { t["layers"][1]["attn_in"]["channels"] = std::uint64_t{1} << 52U; },
                 {.message = "the values lie outside of the HDF5 data",
                  .tensor = absmax,
                  .expected = most,
                  .found = std::to_string(table_["layers"][1]["attn_in"]["absmax"].get<std::uint64_t>() +
                                          (std::uint64_t{1} << 54U))});
  // Two names for the same bytes: of another layer, and one value along.
  const auto other = table_["layers"][0]["attn_in"]["absmax"].get<std::uint64_t>();
  for (const std::uint64_t shift : {0U, 1U, 39U}) {
    json table = table_;
    at(table, other + shift);
    const auto error = read(data_, table.dump());
    ASSERT_TRUE(error);
    EXPECT_EQ(error->message(), "two datasets share bytes") << error->what();
  }
  json many = table_;  // many layers that are all the same one
  for (int i = 0; i < 2000; ++i) many["layers"].push_back(many["layers"][0]);
  many["meta"]["layers"] = many["layers"].size();
  const auto error = read(data_, many.dump());
  ASSERT_TRUE(error);
  EXPECT_TRUE(error->message() == "the values are larger than the file" ||
              error->message() == "two datasets share bytes")
      << error->what();
}

TEST_F(ForgedStatistics, TheTableHasTheKeysOfTheFormat) {
  expect_refused([](json& t) { t["meta"]["format_version"] = 2; },
                 {.message = "key 'meta.format_version' is unknown",
                  .expected = "1",
                  .found = "2",
                  .hint = "the file was made by another version of this program"});
  expect_refused([](json& t) { t["meta"]["layers"] = 4; },
                 {.message = "key 'layers' has another length than its number says",
                  .expected = "4",
                  .found = "a list of 3"});
  expect_refused([](json& t) { t["meta"]["layers"] = 100'001; },
                 {.message = "key 'meta.layers' is out of range",
                  .expected = "an integer from 0 to 100000",
                  .found = "100001"});
  expect_refused([](json& t) { t["meta"].erase("seed"); }, {.message = "key 'meta.seed' is missing"});
  expect_refused([](json& t) { t["meta"]["head_dim"] = (std::uint64_t{1} << 31U) + 1; },
                 {.message = "key 'meta.head_dim' is out of range",
                  .expected = "an integer from 0 to 2147483648",
                  .found = "2147483649"});
  expect_refused([](json& t) { t["layers"][0]["q"].erase("sum3"); },
                 {.message = "key 'layers.000.q.sum3' is missing", .hint = "did you mean its..."});
  expect_refused([](json& t) { t["layers"][0]["q"]["channels"] = 0; },
                 {.message = "key 'layers.000.q.channels' is out of range",
                  .expected = "an integer from 1 to 9007199254740992",
                  .found = "0"});
  expect_refused(
      [](json& t) { t["layers"][0]["q"]["other"] = 600; },
      {.message = "key 'layers.000.q....' that is unknown, or null", .expected = "10 keys", .found = "11"});
  expect_refused(
      [](json& t) { t["layers"][0]["other"] = json::object(); },
      {.message = "key 'layers.000....' that is unknown, or null", .expected = "11 keys", .found = "12"});
  expect_refused([](json& t) { t["layers"][2] = 7; },
                 {.message = "key 'layers.002' is not a JSON object", .expected = "an object", .found = "7"});
}

// Values that break a rule: the table is right, the bytes are not.
TEST_F(ForgedStatistics, TheValuesKeepTheRules) {
  const auto place = table_["layers"][1]["v"]["count"].get<std::size_t>() - kHeadBlock;
  std::string data = data_;
  data.replace(place, 8, 8, '\0');
  Parts parts{.message = "out of range",
              .path = path_,
              .tensor = "/layers/001/v/count",
              .expected = "1 to 2^53",
              .found = "0"};
  expect_parts(read(data, table_.dump()), parts);
  data = data_;
  data.replace(table_["layers"][1]["v"]["absmax"].get<std::size_t>() - kHeadBlock, 4, 4, '\xff');
  parts = {.message = "a value is out of range",
           .path = path_,
           .tensor = "/layers/001/v/absmax",
           .expected = "finite values of 0 or more",
           .found = "-nan at [0]"};
  expect_parts(read(data, table_.dump()), parts);
}

// Random damage under a checksum that fits: an Error or statistics that keep the rules; nothing else.
TEST_F(ForgedStatistics, RandomDamageUnderAFittingChecksum) {
  std::mt19937_64 random(81);
  const std::string table = table_.dump();
  std::size_t refused = 0;
  for (int i = 0; i < 600; ++i) {
    std::string damaged = table;
    for (std::size_t edits = 1 + random() % 3; edits > 0; --edits) {
      damaged[random() % damaged.size()] = "0123456789{}[],:\"-.nax"[random() % 22];
    }
    const auto error = read(data_, damaged);
    if (!error) continue;
    ++refused;
    ASSERT_EQ(error->kind(), ErrorKind::input) << error->what();
    ASSERT_EQ(error->path(), path_);
  }
  EXPECT_GT(refused, 150U);
}

}  // namespace
}  // namespace fireq::formats
