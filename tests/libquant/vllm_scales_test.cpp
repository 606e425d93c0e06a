// What vLLM makes of exported scales, and quantised rows that it gives back exactly.
#include "libquant/vllm_scales.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "common/error.hpp"
#include "libquant/curvature_quantizer.hpp"
#include "libquant/number_formats.hpp"
#include "tests/libquant/curvature_problem.hpp"

namespace fireq::libquant {
namespace {

std::mt19937_64& random_source() {
  static std::mt19937_64 source(std::random_device{}());
  return source;
}

// The bfloat16 nearest to x > 0 by trying neighbours, ties to the even one.
double nearest_bf16(double x) {
  int exponent = 0;
  const double fraction = std::frexp(x, &exponent);  // [0.5, 1)
  const double scaled = fraction * 256;              // 8 bits
  double low = std::floor(scaled);
  const double rest = scaled - low;
  if (rest > 0.5 || (rest == 0.5 && std::fmod(low, 2) == 1)) low += 1;
  return std::ldexp(low, exponent - 8);
}

TEST(VllmScales, StoredScaleIsTheProductRoundedOnce) {
  std::uniform_real_distribution<float> mantissa(1, 2);
  for (int i = 0; i < 20000; ++i) {
    const auto byte = static_cast<std::uint8_t>(1 + random_source()() % 0x7e);
    const float sigma = decode_e4m3(byte);
    const float r = std::ldexp(mantissa(random_source()), static_cast<int>(random_source()() % 30) - 20);
    const double exact = static_cast<double>(sigma) * static_cast<double>(r);
    ASSERT_EQ(static_cast<double>(decode_bf16(bf16_group_scale(sigma, r))), nearest_bf16(exact))
        << sigma << " * " << r;
  }
  // Just above a tie of bfloat16, by less than half an FP32 step: twice rounded it would go down to even.
  const float r = 1.0F + 0x1p-8F / 1.75F;  // 1.75 r is near 1.75 + 2^-8, half way between two
  for (const float near : {std::nextafter(r, 0.0F), r, std::nextafter(r, 2.0F)}) {
    const double exact = 1.75 * static_cast<double>(near);
    EXPECT_EQ(static_cast<double>(decode_bf16(bf16_group_scale(1.75F, near))), nearest_bf16(exact));
  }
}

TEST(VllmScales, RowsWithALargestScaleOf56ComeBackExactly) {
  std::uniform_int_distribution<int> exponent(-8, 10);
  for (int trial = 0; trial < 500; ++trial) {
    const auto bits = static_cast<std::uint16_t>(encode_bf16(std::ldexp(1.0F, exponent(random_source()))) |
                                                 random_source()() % 128);
    const float r = decode_bf16(bits) / 56.0F;
    std::vector<std::uint8_t> sigma(1 + random_source()() % 20);
    for (std::uint8_t& s : sigma) s = static_cast<std::uint8_t>(1 + random_source()() % 0x66);
    sigma[random_source()() % sigma.size()] = 0x66;
    std::vector<std::uint16_t> stored;
    for (const std::uint8_t s : sigma) stored.push_back(bf16_group_scale(decode_e4m3(s), r));
    VllmRow row{{1, 2, 3}, -1};
    load_vllm_row(stored, row);
    ASSERT_EQ(row.codes, sigma);
    ASSERT_EQ(row.channel, r);
  }
}

// Rows with an outlier, a row of zeros, one that is tiny.
std::vector<float> awkward_weights(std::uint64_t rows, std::uint64_t cols) {
  std::vector<float> w = testing_support::random_weights(rows, cols, random_source());
  for (std::uint64_t n = 0; n < rows; ++n) {
    const auto first = w.begin() + static_cast<std::ptrdiff_t>(n * cols);
    if (n % 8 == 1) std::fill_n(first, cols, 0.0F);
    if (n % 8 == 2) std::for_each_n(first, cols, [](float& x) { x *= 0x1p-20F; });
    if (n % 8 == 3) first[static_cast<std::ptrdiff_t>(random_source()() % cols)] = 3;
    if (n % 8 == 4) std::fill_n(first, cols, 0.25F);
  }
  return w;
}

void expect_pinned(const QuantizedLinear& q) {
  for (std::uint64_t n = 0; n < q.rows; ++n) {
    const auto first = q.group_scales.begin() + static_cast<std::ptrdiff_t>(n * q.groups());
    const std::uint8_t top = *std::max_element(first, first + static_cast<std::ptrdiff_t>(q.groups()));
    EXPECT_GE(q.row_scales[n], 1.0F / 28672.0F);
    if (q.row_scales[n] > 1.0F / 28672.0F) {
      EXPECT_EQ(top, 0x66) << "row " << n;
    }
  }
  const VllmLoss loss = vllm_loss(q, 2);
  EXPECT_EQ(loss.rows, 0U);
  EXPECT_EQ(loss.error_sq, 0.0);
  EXPECT_GT(loss.reference_sq, 0.0);
}

double squared_error(const std::vector<float>& w, const QuantizedLinear& q) {
  std::vector<float> v(w.size());
  dequantize_rows(q, ProductTable(q.levels), 0, q.rows, v);
  double sum = 0;
  for (std::size_t i = 0; i < w.size(); ++i) {
    const double e = static_cast<double>(w[i]) - static_cast<double>(v[i]);
    sum += e * e;
  }
  return sum;
}

// Under the row's r no candidate scale of a group is better than the one it has, but for one group with 56,
// which r was fitted to.
void expect_searched(const std::vector<float>& w, const QuantizedLinear& q) {
  const ProductTable table(q.levels);
  for (std::uint64_t n = 0; n < q.rows; ++n) {
    unsigned fitted = 0;
    for (std::uint64_t g = 0; g < q.groups(); ++g) {
      const std::uint8_t has = q.group_scales[n * q.groups() + g];
      double largest = 0;
      const auto error_with = [&](std::uint8_t sigma) {
        double sum = 0;
        for (std::uint64_t k = g * kGroupSize; k < std::min(q.cols, (g + 1) * kGroupSize); ++k) {
          const double x = std::fabs(static_cast<double>(w[n * q.cols + k]));
          largest = std::max(largest, x);
          double best = std::numeric_limits<double>::infinity();
          for (const float p : table.value[sigma]) {
            best =
                std::min(best, std::fabs(x - static_cast<double>(p) * static_cast<double>(q.row_scales[n])));
          }
          sum += best * best;
        }
        return sum;
      };
      const double own = error_with(has);
      if (largest == 0) continue;
      const int base = encode_e4m3_from_double(
          std::clamp(largest / 7 / static_cast<double>(q.row_scales[n]), 0x1p-9, 56.0));
      double least = own;
      for (int code = std::max(1, base - 7); code <= std::min(0x66, base + 2); ++code) {
        least = std::min(least, error_with(static_cast<std::uint8_t>(code)));
      }
      if (own <= least * (1 + 1e-5)) continue;
      EXPECT_EQ(has, 0x66) << "row " << n << ", group " << g;
      ++fitted;
    }
    EXPECT_LE(fitted, q.row_scales[n] > 1.0F / 28672.0F ? 1U : 0U);
  }
}

TEST(VllmScales, PinnedRowsComeBackFromASearch) {
  for (const std::uint64_t cols : {128U, 130U, 512U}) {
    const std::uint64_t rows = 64;
    const std::vector<float> w = awkward_weights(rows, cols);
    WeightQuantizerOptions options;
    options.rounding = Rounding::product;
    options.search_low = -7;
    options.search_high = 2;
    const auto quantise = [&](bool pin) {
      options.pin_top_scale = pin;
      QuantizedLinear q = make_quantized_linear(rows, cols, options.levels, false);
      std::fill(q.group_scales.begin(), q.group_scales.end(), std::uint8_t{0x70});
      quantize_rows(w, 0, rows, options, {}, q);
      check_quantized_linear(q);
      return q;
    };
    const QuantizedLinear pinned = quantise(true);
    const QuantizedLinear free = quantise(false);
    expect_pinned(pinned);
    // The search is as good as the free one: only the steps between scales differ.
    EXPECT_LT(squared_error(w, pinned), 1.02 * squared_error(w, free));
    expect_searched(w, pinned);
    // And without it the search leaves 56 in many a row: vLLM changes those.
    const VllmLoss loss = vllm_loss(free, 1);
    EXPECT_GT(loss.rows, rows / 8);
    EXPECT_GT(loss.relative(), 1e-4);
    EXPECT_LT(loss.relative(), 0.1);
  }
}

TEST(VllmScales, PinnedRowsComeBackFromCurvature) {
  const std::uint64_t rows = 32;
  const std::uint64_t cols = 300;
  const testing_support::Inputs in = testing_support::correlated_inputs(600, cols, random_source());
  Curvature sums(cols);
  sums.add(in.quantised.data(), in.original.data(), cols, in.tokens, 1);
  const CurvatureFactor factor = factor_curvature(sums, 0.01, 1);
  const std::vector<float> w = awkward_weights(rows, cols);
  CurvatureQuantizerOptions options;
  options.pin_top_scale = true;
  QuantizedLinear q = make_quantized_linear(rows, cols, Levels::int4(), false);
  std::fill(q.row_scales.begin(), q.row_scales.end(), std::numeric_limits<float>::quiet_NaN());
  const CurvatureError error = quantize_with_curvature(w, factor, options, 1, q);
  check_quantized_linear(q);
  expect_pinned(q);
  // Coordinate descent still gains over the greedy step, and the row scales still move.
  EXPECT_LT(error.final, error.greedy);
  options.passes = 0;
  QuantizedLinear greedy = make_quantized_linear(rows, cols, Levels::int4(), false);
  quantize_with_curvature(w, factor, options, 1, greedy);
  EXPECT_NE(q.row_scales, greedy.row_scales);
}

TEST(VllmScales, LossOfAPerTensorScaleIsMeasured) {
  const std::uint64_t rows = 70;
  const std::uint64_t cols = 256;
  const std::vector<float> w = testing_support::random_weights(rows, cols, random_source());
  WeightQuantizerOptions options;
  options.row_scale = RowScale::tensor;
  QuantizedLinear q = make_quantized_linear(rows, cols, options.levels, true);
  q.row_scales[0] = 1.0F / 64;
  quantize_rows(w, 0, rows, options, {}, q);
  double error = 0;
  double reference = 0;
  std::uint64_t changed = 0;
  for (std::uint64_t n = 0; n < rows; ++n) {
    std::vector<double> scale;
    for (std::uint64_t g = 0; g < q.groups(); ++g) {
      scale.push_back(
          nearest_bf16(static_cast<double>(decode_e4m3(q.group_scales[n * q.groups() + g])) / 64));
    }
    // In FP32, as vLLM divides.
    const float channel = static_cast<float>(*std::max_element(scale.begin(), scale.end())) / 448.0F;
    bool differs = false;
    for (std::uint64_t k = 0; k < cols; ++k) {
      const std::uint64_t g = k / kGroupSize;
      const double magnitude = q.code(n, k) & 7U;
      const float code = round_e4m3(round_e4m3(static_cast<float>(scale[g]) / channel) / 8.0F);
      const double theirs = static_cast<double>(round_e4m3(static_cast<float>(magnitude) * code)) *
                            static_cast<double>(channel * 8.0F);
      const double sigma = static_cast<double>(decode_e4m3(q.group_scales[n * q.groups() + g]));
      const double own = static_cast<double>(round_e4m3(static_cast<float>(magnitude * sigma))) / 64;
      differs = differs || own != theirs;
      error += (own - theirs) * (own - theirs);
      reference += own * own;
    }
    changed += differs ? 1U : 0U;
  }
  ASSERT_GT(changed, 0U);
  for (const int threads : {1, 3}) {
    const VllmLoss loss = vllm_loss(q, threads);
    EXPECT_EQ(loss.rows, changed);
    EXPECT_NEAR(loss.relative(), std::sqrt(error / reference), 1e-12);
  }
}

TEST(VllmScales, OtherLevelsAreAMistakeOfTheCaller) {
  const QuantizedLinear q = make_quantized_linear(1, 128, Levels::normal(), false);
  EXPECT_THROW(vllm_loss(q, 1), Error);
}

}  // namespace
}  // namespace fireq::libquant
