// The weight quantiser against a second implementation that only knows the definition: it looks for the
// nearest scale and the nearest level by trying them all, in 64-bit significands.
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "libquant/group_table.hpp"
#include "libquant/metrics.hpp"
#include "libquant/number_formats.hpp"
#include "libquant/quantized_linear.hpp"

namespace fireq::libquant {
namespace {

using Real = long double;

struct Reference {
  std::vector<float> row_scale;
  std::vector<std::uint8_t> sigma;               // [rows, groups]
  std::vector<std::vector<std::uint8_t>> codes;  // [rows][cols]
};

Real sigma_value(unsigned code) {
  return decode_e4m3(static_cast<std::uint8_t>(code));
}

float reference_row_scale(float row_max, float top_level) {
  for (unsigned b = 0; b < 0x7f80; ++b) {  // every positive bf16, upwards
    const float value = decode_bf16(static_cast<std::uint16_t>(b));
    if (value < 0x1p-9F) continue;
    if (Real{value} * Real{top_level} >= Real{row_max})
      return static_cast<float>(static_cast<double>(value) / 56.0);
  }
  ADD_FAILURE() << "no bf16 is large enough";
  return 0;
}

unsigned reference_sigma(Real amax, Real unit, unsigned top) {
  unsigned best = 1;
  for (unsigned c = 2; c <= top; ++c) {
    const Real now = std::fabs(amax - sigma_value(c) * unit),
               then = std::fabs(amax - sigma_value(best) * unit);
    if (now < then || (now == then && c % 2 == 0)) best = c;
  }
  return best;
}

unsigned reference_index(float w, float r, unsigned sigma, const WeightQuantizerOptions& options,
                         const ProductTable& table) {
  unsigned best = 0;
  Real smallest = HUGE_VALL;
  for (unsigned i = 0; i < 8; ++i) {
    const Real level = options.rounding == Rounding::value
                           ? Real{options.levels.magnitude[i]} * sigma_value(sigma)
                           : Real{table.value[sigma][i]};
    const Real distance = std::fabs(Real{std::fabs(w)} - level * Real{r});
    const bool tie_goes_up = options.rounding == Rounding::value && i % 2 == 0;
    if (distance < smallest || (distance == smallest && tie_goes_up)) {
      best = i;
      smallest = distance;
    }
  }
  return best;
}

Real reference_error(std::span<const float> group, std::span<const float> importance, float r, unsigned sigma,
                     const WeightQuantizerOptions& options, const ProductTable& table) {
  Real sum = 0;
  for (std::size_t k = 0; k < group.size(); ++k) {
    const unsigned i = reference_index(group[k], r, sigma, options, table);
    const Real error = Real{std::fabs(group[k])} - Real{r} * Real{table.value[sigma][i]};
    sum += (importance.empty() ? Real{1} : Real{importance[k]}) * error * error;
  }
  return sum;
}

// Compares `q` with the definition, row by row. A searched sigma may differ from the reference's only between
// candidates whose errors FP32 cannot tell apart; codes must then be right for the sigma that was taken.
void expect_definition(std::span<const float> w, const WeightQuantizerOptions& options,
                       std::span<const float> importance, const QuantizedLinear& q) {
  check_quantized_linear(q);
  const ProductTable table(options.levels);
  const bool row_scales = options.row_scale == RowScale::row;
  const unsigned top = row_scales ? 0x66 : 0x7e;
  ASSERT_EQ(decode_e4m3(0x66), 56.0F);
  for (std::uint64_t n = 0; n < q.rows; ++n) {
    const std::span<const float> row = w.subspan(n * q.cols, q.cols);
    float row_max = 0;
    for (const float v : row) row_max = std::max(row_max, std::fabs(v));
    const float r = row_scales ? reference_row_scale(row_max, options.levels.magnitude[7]) : q.row_scales[0];
    ASSERT_EQ(q.row_scale(n), r);
    for (std::uint64_t g = 0; g < q.groups(); ++g) {
      const std::uint64_t begin = g * kGroupSize, count = std::min(kGroupSize, q.cols - begin);
      const std::span<const float> group = row.subspan(begin, count);
      const std::span<const float> group_importance =
          importance.empty() ? importance : importance.subspan(begin, count);
      float amax = 0;
      for (const float v : group) amax = std::max(amax, std::fabs(v));
      const unsigned base = reference_sigma(amax, Real{r} * Real{options.levels.magnitude[7]}, top);
      const unsigned sigma = q.group_scales[n * q.groups() + g];
      if (amax == 0) {
        ASSERT_EQ(sigma, 1U);
      } else if (options.search_low == 0 && options.search_high == 0) {
        ASSERT_EQ(sigma, base) << "row " << n << " group " << g;
      } else {
        ASSERT_GE(sigma, 1U);
        ASSERT_LE(sigma, top);
        ASSERT_GE(static_cast<int>(sigma) - static_cast<int>(base), options.search_low);
        ASSERT_LE(static_cast<int>(sigma) - static_cast<int>(base), options.search_high);
        const Real taken = reference_error(group, group_importance, r, sigma, options, table);
        for (int offset = options.search_low; offset <= options.search_high; ++offset) {
          const int c = static_cast<int>(base) + offset;
          if (c < 1 || c > static_cast<int>(top)) continue;
          const Real other =
              reference_error(group, group_importance, r, static_cast<unsigned>(c), options, table);
          ASSERT_LE(taken, other * (1 + 1e-5L))
              << "row " << n << " group " << g << " sigma " << sigma << " vs " << c;
        }
      }
      for (std::uint64_t k = 0; k < count; ++k) {
        const unsigned index = reference_index(group[k], r, sigma, options, table);
        const bool zero = options.levels.magnitude[0] == 0.0F ? index == 0 : group[k] == 0.0F;
        const unsigned code = index | (group[k] < 0 && !zero ? 8U : 0U);
        ASSERT_EQ(q.code(n, begin + k), code)
            << "[" << n << ", " << begin + k << "] = " << group[k] << " sigma " << sigma;
      }
    }
  }
}

std::mt19937_64& random_source() {
  static std::mt19937_64 source(std::random_device{}());
  return source;
}

// Tensors that break quantisers, [rows, cols].
std::vector<float> tensor(const std::string& kind, std::uint64_t rows, std::uint64_t cols) {
  auto& random = random_source();
  std::normal_distribution<float> normal(0.0F, 0.02F);
  std::student_t_distribution<float> heavy(1.5F);
  std::vector<float> w(rows * cols);
  for (std::uint64_t i = 0; i < w.size(); ++i) {
    const std::uint64_t group = i % cols / kGroupSize;
    if (kind == "heavy") {
      w[i] = 0.01F * heavy(random);
    } else if (kind == "zero groups") {
      w[i] = group % 2 == 0 ? (random() % 2 == 0 ? 0.0F : -0.0F) : normal(random);
    } else if (kind == "tiny") {
      w[i] = normal(random) * (i % 3 == 0 ? 1e-38F : 1e-9F);
    } else if (kind == "grid") {  // on and between codes: ties everywhere
      w[i] = static_cast<float>(static_cast<int>(random() % 57) - 28) * 0x1p-8F;
    } else {
      w[i] = normal(random);
    }
    if (kind == "outlier" && i % cols == 5) w[i] = 1000.0F;
  }
  return w;
}
const std::vector<std::string> kKinds{"normal", "heavy", "zero groups", "tiny", "grid", "outlier"};

Levels random_levels(bool with_zero) {
  auto& random = random_source();
  std::uniform_real_distribution<float> step(0.05F, 1.0F);
  Levels levels;
  float at = with_zero ? 0.0F : step(random);
  for (float& v : levels.magnitude) {
    v = at;
    at += step(random);
  }
  return levels;
}

std::vector<std::byte> as_16_bit(std::span<const float> w, bool brain) {
  std::vector<std::uint16_t> half(w.size());
  if (brain) {
    encode_bf16(w, half);
  } else {
    encode_f16(w, half);
  }
  std::vector<std::byte> bytes(2 * half.size() + 1);  // an odd address
  std::memcpy(bytes.data() + 1, half.data(), 2 * half.size());
  return bytes;
}

QuantizedLinear quantize(std::span<const float> w, std::uint64_t rows, std::uint64_t cols,
                         const WeightQuantizerOptions& options, std::span<const float> importance = {},
                         float tensor_scale = 1) {
  QuantizedLinear q =
      make_quantized_linear(rows, cols, options.levels, options.row_scale == RowScale::tensor);
  if (options.row_scale == RowScale::tensor) q.row_scales[0] = tensor_scale;
  std::fill(q.codes.begin(), q.codes.end(), std::uint8_t{0x88});  // must all be written
  quantize_rows(w, 0, rows, options, importance, q);
  return q;
}

TEST(WeightQuantizer, EqualsTheDefinitionCodeByCode) {
  for (const std::string& kind : kKinds) {
    for (const Levels& levels :
         {Levels::int4(), Levels::normal(), random_levels(true), random_levels(false)}) {
      for (const Rounding rounding : {Rounding::value, Rounding::product}) {
        for (const bool searched : {false, true}) {
          SCOPED_TRACE(kind + " " + levels.name() + (rounding == Rounding::value ? " value" : " product") +
                       (searched ? " searched" : ""));
          const std::uint64_t rows = 3, cols = 300;
          const std::vector<float> w = tensor(kind, rows, cols);
          WeightQuantizerOptions options;
          options.levels = levels;
          options.rounding = rounding;
          options.search_low = searched ? -7 : 0;
          options.search_high = searched ? 2 : 0;
          std::vector<float> importance;
          if (searched) {
            for (std::uint64_t k = 0; k < cols; ++k)
              importance.push_back(static_cast<float>(random_source()() % 9));
          }
          expect_definition(w, options, importance, quantize(w, rows, cols, options, importance));
          // Per tensor, r a power of two that makes group scales normal, subnormal or saturated.
          options.row_scale = RowScale::tensor;
          for (const float r : {1.0F, 0x1p-14F, 0x1p-5F}) {
            expect_definition(w, options, importance, quantize(w, rows, cols, options, importance, r));
          }
          if (testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
}

// Where a rounded quotient would decide wrongly: the FP32 numbers next to every limit between two scales.
TEST(WeightQuantizer, GroupScalesAreExactAtTheirLimits) {
  std::uniform_real_distribution<float> uniform(1.0F, 2.0F);
  for (int round = 0; round < 40; ++round) {
    // r times a top level, as a double holds it; every fourth a power of two, so that ties are met.
    const double unit = round % 4 == 0 ? std::ldexp(1.0, -round)
                                       : std::ldexp(static_cast<double>(uniform(random_source())), -round) *
                                             static_cast<double>(uniform(random_source()));
    for (unsigned c = 1; c < 0x7e; ++c) {
      const auto limit = static_cast<float>((sigma_value(c) + sigma_value(c + 1)) / 2 * Real{unit});
      float amax = std::nextafter(std::nextafter(limit, 0.0F), 0.0F);
      for (int step = 0; step < 5; ++step, amax = std::nextafter(amax, HUGE_VALF)) {
        for (const std::uint8_t top : {std::uint8_t{0x66}, std::uint8_t{0x7e}}) {
          ASSERT_EQ(group_scale_code(amax, unit, 1.0 / unit, top), reference_sigma(amax, unit, top))
              << amax << " / " << unit;
        }
      }
    }
  }
}

TEST(WeightQuantizer, TypesOfTheFileGiveTheSameCodes) {
  const std::uint64_t rows = 5;
  for (const std::string& kind : kKinds) {
    for (const std::uint64_t cols : {1UL, 127UL, 128UL, 129UL, 640UL}) {
      for (const bool brain : {false, true}) {
        for (const Rounding rounding : {Rounding::value, Rounding::product}) {
          const std::vector<std::byte> bytes = as_16_bit(tensor(kind, rows, cols), brain);
          const std::span<const std::byte> raw = std::span(bytes).subspan(1);
          std::vector<float> w(rows * cols);
          for (std::uint64_t i = 0; i < w.size(); ++i) {
            std::uint16_t half = 0;
            std::memcpy(&half, raw.data() + 2 * i, 2);
            w[i] = brain ? decode_bf16(half) : decode_f16(half);
          }
          WeightQuantizerOptions options;
          options.rounding = rounding;
          options.levels = cols == 640 ? Levels::normal() : Levels::int4();
          options.search_low = cols == 129 ? -3 : 0;
          const QuantizedLinear expected = quantize(w, rows, cols, options);
          QuantizedLinear q = make_quantized_linear(rows, cols, options.levels, false);
          quantize_rows_raw(raw, brain ? Dtype::bf16 : Dtype::f16, 0, rows, options, {}, q);
          EXPECT_EQ(q.codes, expected.codes) << kind << " " << cols;
          EXPECT_EQ(q.group_scales, expected.group_scales);
          EXPECT_EQ(q.row_scales, expected.row_scales);
        }
      }
    }
  }
}

// All 16-bit weights against one scale: the comparison in the file's own format is exact.
TEST(WeightQuantizer, EveryHalfIsRoundedRight) {
  std::vector<float> w;
  for (unsigned h = 0; h < 0x10000; ++h) {
    const float v = decode_f16(static_cast<std::uint16_t>(h));
    w.push_back(std::isfinite(v) ? v : 0.0F);
  }
  for (const Rounding rounding : {Rounding::value, Rounding::product}) {
    WeightQuantizerOptions options;
    options.row_scale = RowScale::tensor;
    options.rounding = rounding;
    const float r = 0.3721F;
    const std::vector<std::byte> bytes = as_16_bit(w, false);
    QuantizedLinear q = make_quantized_linear(1, w.size(), options.levels, true);
    q.row_scales[0] = r;
    quantize_rows_raw(std::span(bytes).subspan(1), Dtype::f16, 0, 1, options, {}, q);
    expect_definition(w, options, {}, q);
  }
}

TEST(WeightQuantizer, UnclippedIntegersAreWithinHalfAStep) {
  rc::check("|w/r - q sigma| <= sigma/2", [] {
    const std::uint64_t cols = *rc::gen::inRange<std::uint64_t>(1, 300);
    const auto exponent = *rc::gen::inRange(-20, 20);
    std::vector<float> w(cols);
    std::mt19937_64 random(*rc::gen::arbitrary<std::uint64_t>());
    std::normal_distribution<float> normal;
    for (float& v : w) v = std::ldexp(normal(random), exponent);
    const QuantizedLinear q = quantize(w, 1, cols, {});
    for (std::uint64_t k = 0; k < cols; ++k) {
      const unsigned code = q.code(0, k);
      RC_ASSERT(code != 8U);
      if ((code & 7U) == 7U) continue;
      const Real sigma = sigma_value(q.group_scales[k / kGroupSize]);
      const Real integer = (code & 8U) != 0 ? -static_cast<Real>(code & 7U) : static_cast<Real>(code);
      // Multiplied by r, so that both sides are exact.
      RC_ASSERT(std::fabs(Real{w[k]} - integer * sigma * Real{q.row_scale(0)}) <=
                sigma / 2 * Real{q.row_scale(0)});
    }
  });
}

TEST(WeightQuantizer, AnyCutOfRowsGivesTheSameBytes) {
  rc::check("cuts", [] {
    const std::uint64_t rows = *rc::gen::inRange<std::uint64_t>(1, 40);
    const std::uint64_t cols = *rc::gen::inRange<std::uint64_t>(1, 400);
    const std::vector<float> w = tensor("heavy", rows, cols);
    WeightQuantizerOptions options;
    options.rounding = Rounding::product;
    options.search_low = -2;
    options.search_high = 1;
    const QuantizedLinear whole = quantize(w, rows, cols, options);
    QuantizedLinear cut = make_quantized_linear(rows, cols, options.levels, false);
    TensorScaleSearch all(options.tensor_search_threshold), joined(options.tensor_search_threshold);
    all.add_rows(w, rows, cols);
    for (std::uint64_t begin = 0; begin < rows;) {
      const std::uint64_t count = *rc::gen::inRange<std::uint64_t>(1, rows - begin + 1);
      const std::span<const float> part = std::span<const float>(w).subspan(begin * cols, count * cols);
      quantize_rows(part, begin, count, options, {}, cut);
      TensorScaleSearch piece(options.tensor_search_threshold);
      piece.add_rows(part, count, cols);
      joined.merge(piece);
      begin += count;
    }
    RC_ASSERT(cut.codes == whole.codes);
    RC_ASSERT(cut.group_scales == whole.group_scales);
    RC_ASSERT(cut.row_scales == whole.row_scales);
    RC_ASSERT(all.scale() == joined.scale());
  });
}

// What vLLM makes of bf16(sigma * r) when it loads an export, per row: it must find our scales again.
void expect_vllm_recovers(std::span<const std::uint8_t> sigma, float r) {
  std::vector<float> scale;
  float row_max = 0;
  for (const std::uint8_t s : sigma) {
    scale.push_back(round_bf16(decode_e4m3(s) * r));
    row_max = std::max(row_max, scale.back());
  }
  const float channel = std::max(row_max / 448.0F, 1.0F / (448.0F * 512.0F));
  for (std::size_t g = 0; g < sigma.size(); ++g) {
    if (sigma[g] < 0x08) continue;  // under 2^-6: a subnormal of eight times the size
    ASSERT_EQ(encode_e4m3(round_e4m3(scale[g] / channel) / 8.0F), sigma[g]);
  }
  ASSERT_EQ(channel * 8.0F, r);
}

TEST(WeightQuantizer, RowScalesSurviveVllmsConversion) {
  for (const std::string& kind : kKinds) {
    const std::uint64_t rows = 40, cols = 512;
    const QuantizedLinear q = quantize(tensor(kind, rows, cols), rows, cols, {});
    for (std::uint64_t n = 0; n < rows; ++n) {
      const float r = q.row_scales[n];
      EXPECT_GE(r, 1.0F / 28672.0F);
      const std::span<const std::uint8_t> sigma = std::span(q.group_scales).subspan(n * 4, 4);
      const std::uint8_t largest = *std::max_element(sigma.begin(), sigma.end());
      EXPECT_LE(largest, 0x66);
      EXPECT_TRUE(largest == 0x66 || r == 1.0F / 28672.0F);
      expect_vllm_recovers(sigma, r);
    }
  }
  std::vector<std::uint8_t> every;
  for (unsigned s = 1; s <= 0x66; ++s) every.push_back(static_cast<std::uint8_t>(s));
  for (unsigned b = 0x3b00; b < 0x4b00; ++b) {  // every row scale from the smallest to 2^23 / 56
    expect_vllm_recovers(every, decode_bf16(static_cast<std::uint16_t>(b)) / 56.0F);
  }
}

TEST(WeightQuantizer, CandidatesThatTieKeepTheUnsearchedScale) {
  const std::vector<float> w = tensor("normal", 4, 300), nothing(300, 0.0F);  // every error counts zero
  WeightQuantizerOptions options;
  const QuantizedLinear plain = quantize(w, 4, 300, options);
  options.search_low = -7;
  options.search_high = 2;
  EXPECT_EQ(quantize(w, 4, 300, options, nothing).group_scales, plain.group_scales);
  EXPECT_NE(quantize(w, 4, 300, options).group_scales, plain.group_scales);
}

double mse(const WeightQuantizerOptions& options, std::span<const float> w, bool rounded_products) {
  const std::uint64_t rows = 256, cols = 4096;
  const QuantizedLinear q = quantize(w, rows, cols, options);
  std::vector<float> back(w.size());
  dequantize_rows(q, ProductTable(options.levels), 0, rows, back);
  if (!rounded_products) {
    for (std::uint64_t i = 0; i < w.size(); ++i) {
      const std::uint64_t n = i / cols, k = i % cols;
      const unsigned code = q.code(n, k);
      const float sigma = decode_e4m3(q.group_scales[n * q.groups() + k / kGroupSize]);
      back[i] = q.row_scale(n) * sigma * options.levels.magnitude[code & 7U] * (code >= 8 ? -1.0F : 1.0F);
    }
  }
  ErrorSums sums;
  sums.add(w, back);
  return sums.relative_mse();
}

// The last lines of docs/numerics.md.
TEST(WeightQuantizer, GaussianErrorIsWhatTheDocumentSays) {
  std::mt19937_64 random(std::random_device{}());
  std::normal_distribution<float> normal(0.0F, 0.02F);
  std::vector<float> w(256 * 4096);
  for (float& v : w) v = normal(random);
  WeightQuantizerOptions options;
  EXPECT_NEAR(mse(options, w, false), 0.0138, 0.02 * 0.0138);
  EXPECT_NEAR(mse(options, w, true), 0.0141, 0.02 * 0.0141);
  options.rounding = Rounding::product;
  EXPECT_NEAR(mse(options, w, true), 0.0139, 0.02 * 0.0139);
  options.search_low = -7;
  options.search_high = 2;
  const double searched = mse(options, w, true);
  EXPECT_NEAR(searched, 0.0113, 0.02 * 0.0113);
  options.levels = Levels::normal();
  EXPECT_LT(mse(options, w, true), 0.8 * searched);  // "lose a quarter less"
}

}  // namespace
}  // namespace fireq::libquant
