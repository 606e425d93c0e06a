#include "libquant/mean_rounding.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "common/error.hpp"

namespace fireq::libquant {
namespace {

class MeanRounding : public testing::TestWithParam<bool> {
 protected:
  static constexpr std::uint64_t kRows = 24, kCols = 300;

  void SetUp() override {
    std::mt19937_64 random(std::random_device{}());
    std::normal_distribution<float> normal;
    for (std::uint64_t i = 0; i < kRows * kCols; ++i) w_.push_back(0.1F * normal(random));
    for (std::uint64_t k = 0; k < kCols; ++k) {
      mean_.push_back(0.7F * normal(random));
      square_.push_back(mean_[k] * mean_[k] + std::fabs(normal(random)));
    }
    options_.levels = GetParam() ? Levels::normal() : Levels::int4();
    options_.rounding = Rounding::product;
    options_.search_low = -7;
    options_.search_high = 2;
    before_ = make_quantized_linear(kRows, kCols, options_.levels, false);
    quantize_rows(w_, 0, kRows, options_, square_, before_);
  }

  // Per row: the cost as the header has it, and its second part alone.
  std::vector<std::pair<double, double>> costs(const QuantizedLinear& q) const {
    std::vector<float> v(kRows * kCols);
    dequantize_rows(q, ProductTable(q.levels), 0, kRows, v);
    std::vector<std::pair<double, double>> out;
    for (std::uint64_t i = 0; i < kRows; ++i) {
      double spread = 0, lean = 0;
      for (std::uint64_t k = 0; k < kCols; ++k) {
        const double e = static_cast<double>(w_[i * kCols + k]) - static_cast<double>(v[i * kCols + k]);
        const auto m = static_cast<double>(mean_[k]);
        spread += (static_cast<double>(square_[k]) - m * m) * e * e;
        lean += m * e;
      }
      out.emplace_back(spread + lean * lean, lean * lean);
    }
    return out;
  }

  std::vector<float> w_, mean_, square_;
  WeightQuantizerOptions options_;
  QuantizedLinear before_;
};

TEST_P(MeanRounding, LowersTheCostOfEachRowAndNearlyAllOfTheMean) {
  QuantizedLinear after = before_;
  keep_row_means(w_, 0, kRows, mean_, square_, after);
  check_quantized_linear(after);
  EXPECT_EQ(after.group_scales, before_.group_scales);
  EXPECT_EQ(after.row_scales, before_.row_scales);
  const auto a = costs(before_), b = costs(after);
  double lean_before = 0, lean_after = 0, sum_before = 0, sum_after = 0;
  for (std::uint64_t i = 0; i < kRows; ++i) {
    EXPECT_LE(b[i].first, a[i].first * (1 + 1e-6));
    sum_before += a[i].first, sum_after += b[i].first;
    lean_before += a[i].second, lean_after += b[i].second;
  }
  EXPECT_LT(lean_after, 0.2 * lean_before);
  EXPECT_LT(sum_after, sum_before);
}

TEST_P(MeanRounding, NoCodeCouldStillMoveForLess) {
  QuantizedLinear after = before_;
  for (int i = 0; i < 20; ++i) keep_row_means(w_, 0, kRows, mean_, square_, after);
  const auto least = costs(after);
  for (const std::uint64_t k : {0UL, 1UL, 130UL, 299UL}) {
    for (unsigned code = 0; code < 16; ++code) {
      if (code == 8 && !GetParam()) continue;  // minus zero
      QuantizedLinear other = after;
      for (std::uint64_t row = 0; row < kRows; ++row) {
        std::uint8_t& byte = other.codes[row * other.padded_cols() / 2 + k / 2];
        byte = static_cast<std::uint8_t>(k % 2 == 0 ? (byte & 0xf0U) | code : (byte & 0x0fU) | code << 4U);
      }
      const auto changed = costs(other);
      for (std::uint64_t row = 0; row < kRows; ++row) {
        EXPECT_GE(changed[row].first, least[row].first * (1 - 1e-5)) << row << " " << k << " " << code;
      }
    }
  }
}

TEST_P(MeanRounding, AnyCutOfRowsGivesTheSameAndZeroMeansChangeOnlyTowardsTheWeight) {
  QuantizedLinear whole = before_, parts = before_;
  keep_row_means(w_, 0, kRows, mean_, square_, whole);
  for (std::uint64_t begin = 0; begin < kRows; begin += 5) {
    const std::uint64_t count = std::min<std::uint64_t>(5, kRows - begin);
    keep_row_means(std::span(w_).subspan(begin * kCols, count * kCols), begin, count, mean_, square_, parts);
  }
  EXPECT_EQ(whole.codes, parts.codes);
  // Rounded to the nearest product already: nothing is nearer.
  QuantizedLinear same = before_;
  keep_row_means(w_, 0, kRows, std::vector<float>(kCols, 0.0F), square_, same);
  EXPECT_EQ(same.codes, before_.codes);
  EXPECT_THROW(keep_row_means(w_, 1, kRows, mean_, square_, same), Error);
}

INSTANTIATE_TEST_SUITE_P(Levels, MeanRounding, testing::Bool(),
                         [](const auto& i) { return i.param ? "normal" : "int4"; });

}  // namespace
}  // namespace fireq::libquant
