#include "libquant/mean_rounding.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <span>
#include <vector>

#include "common/error.hpp"
#include "libquant/number_formats.hpp"

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
  keep_row_means(w_, 0, kRows, mean_, square_, false, after);
  check_quantized_linear(after);
  EXPECT_EQ(after.group_scales, before_.group_scales);
  bool fitted = false;
  for (std::uint64_t i = 0; i < kRows; ++i) {
    const float r = after.row_scales[i];
    EXPECT_EQ(r, round_bf16(56 * r) / 56);
    EXPECT_TRUE(r > 0.79F * before_.row_scales[i] && r < 1.26F * before_.row_scales[i]);
    fitted = fitted || r != before_.row_scales[i];
  }
  EXPECT_TRUE(fitted);
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
  for (int i = 0; i < 20; ++i) keep_row_means(w_, 0, kRows, mean_, square_, false, after);
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

TEST_P(MeanRounding, NoRowScaleNearbyCostsLess) {
  QuantizedLinear after = before_;
  for (int i = 0; i < 20; ++i) keep_row_means(w_, 0, kRows, mean_, square_, false, after);
  const auto least = costs(after);
  for (const float factor : {1 - 0x1p-7F, 1 - 0x1p-8F, 1 + 0x1p-7F, 1 + 0x1p-6F}) {
    QuantizedLinear other = after;
    for (float& r : other.row_scales) r = round_bf16(56 * r * factor) / 56;
    const auto changed = costs(other);
    for (std::uint64_t row = 0; row < kRows; ++row) {
      EXPECT_GE(changed[row].first, least[row].first * (1 - 1e-5)) << row << " " << factor;
    }
  }
}

TEST_P(MeanRounding, PinnedRowsKeepScaleAtItsLeastAndTheOthersTheirLargestGroupScale) {
  options_.pin_top_scale = true;
  for (std::uint64_t i = 0; i < kRows / 2 * kCols; ++i) w_[i] *= 0.01F;  // too small for 56
  QuantizedLinear q = make_quantized_linear(kRows, kCols, options_.levels, false);
  quantize_rows(w_, 0, kRows, options_, square_, q);
  const QuantizedLinear before = q;
  keep_row_means(w_, 0, kRows, mean_, square_, true, q);
  EXPECT_EQ(q.group_scales, before.group_scales);
  for (std::uint64_t i = 0; i < kRows; ++i) {
    const auto scales = std::span(q.group_scales).subspan(i * q.groups(), q.groups());
    const bool top = *std::max_element(scales.begin(), scales.end()) == 0x66;
    EXPECT_EQ(top, i >= kRows / 2) << i;
    if (!top) {
      EXPECT_EQ(q.row_scales[i], before.row_scales[i]) << i;
    }
  }
  EXPECT_NE(q.row_scales, before.row_scales);
}

TEST_P(MeanRounding, APerTensorScaleStays) {
  options_.row_scale = RowScale::tensor;
  QuantizedLinear q = make_quantized_linear(kRows, kCols, options_.levels, true);
  q.row_scales[0] = 0.5F;
  quantize_rows(w_, 0, kRows, options_, square_, q);
  const auto before = costs(q);
  const std::vector<std::uint8_t> scales = q.group_scales;
  keep_row_means(w_, 0, kRows, mean_, square_, false, q);
  EXPECT_EQ(q.row_scales, std::vector<float>{0.5F});
  EXPECT_EQ(q.group_scales, scales);
  const auto after = costs(q);
  for (std::uint64_t i = 0; i < kRows; ++i) EXPECT_LE(after[i].first, before[i].first * (1 + 1e-6));
  // Rounded to the nearest product already: with means of 0 nothing is nearer.
  quantize_rows(w_, 0, kRows, options_, square_, q);
  const std::vector<std::uint8_t> nearest = q.codes;
  keep_row_means(w_, 0, kRows, std::vector<float>(kCols, 0.0F), square_, false, q);
  EXPECT_EQ(q.codes, nearest);
}

TEST_P(MeanRounding, AnyCutOfRowsGivesTheSame) {
  QuantizedLinear whole = before_, parts = before_;
  keep_row_means(w_, 0, kRows, mean_, square_, false, whole);
  for (std::uint64_t begin = 0; begin < kRows; begin += 5) {
    const std::uint64_t count = std::min<std::uint64_t>(5, kRows - begin);
    keep_row_means(std::span(w_).subspan(begin * kCols, count * kCols), begin, count, mean_, square_, false,
                   parts);
  }
  EXPECT_EQ(whole.codes, parts.codes);
  EXPECT_EQ(whole.row_scales, parts.row_scales);
  EXPECT_THROW(keep_row_means(w_, 1, kRows, mean_, square_, false, whole), Error);
}

INSTANTIATE_TEST_SUITE_P(Levels, MeanRounding, testing::Bool(),
                         [](const auto& i) { return i.param ? "normal" : "int4"; });

}  // namespace
}  // namespace fireq::libquant
