// Levels, products, reconstruction, the per-tensor scale, and what the weight code refuses.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/error.hpp"
#include "libquant/number_formats.hpp"
#include "libquant/quantized_linear.hpp"

namespace fireq::libquant {
namespace {

using testing::HasSubstr;

std::mt19937_64& random_source() {
  static std::mt19937_64 source(std::random_device{}());
  return source;
}

Levels random_levels() {
  std::uniform_real_distribution<float> step(0.01F, 9.0F);
  Levels levels;
  float at = random_source()() % 2 == 0 ? 0.0F : step(random_source());
  for (float& v : levels.magnitude) {
    v = at;
    at += step(random_source());
  }
  return levels;
}

// Nearest E4M3 magnitude by trying all of them on the exact product.
std::uint8_t nearest_e4m3(double x) {
  unsigned best = 0;
  for (unsigned b = 1; b <= 0x7e; ++b) {
    const double now = std::fabs(x - static_cast<double>(decode_e4m3(static_cast<std::uint8_t>(b))));
    const double then = std::fabs(x - static_cast<double>(decode_e4m3(static_cast<std::uint8_t>(best))));
    if (now < then || (now == then && b % 2 == 0)) best = b;
  }
  return static_cast<std::uint8_t>(best);
}

std::string error_of(ErrorKind kind, const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), kind) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

QuantizedLinear random_linear(std::uint64_t rows, std::uint64_t cols, const Levels& levels, bool per_tensor) {
  QuantizedLinear q = make_quantized_linear(rows, cols, levels, per_tensor);
  for (std::uint64_t n = 0; n < rows; ++n) {
    for (std::uint64_t k = 0; k < cols; ++k) {
      auto code = static_cast<unsigned>(random_source()() % 16);
      if (code == 8 && levels.magnitude[0] == 0.0F) code = 0;
      q.codes[n * q.padded_cols() / 2 + k / 2] |= static_cast<std::uint8_t>(code << (k % 2 * 4));
    }
  }
  for (std::uint8_t& s : q.group_scales) s = static_cast<std::uint8_t>(1 + random_source()() % 0x7e);
  for (float& r : q.row_scales)
    r = std::ldexp(1.0F + static_cast<float>(random_source()() % 1000) / 1000.0F, -9);
  return q;
}

TEST(Levels, NormalFloatIsTheQuantileFunction) {
  // Phi^-1 by bisection on erfc.
  const auto quantile = [](double p) {
    double low = -10, high = 10;
    for (int i = 0; i < 200; ++i) {
      const double middle = (low + high) / 2;
      (0.5 * std::erfc(-middle / std::sqrt(2.0)) < p ? low : high) = middle;
    }
    return low;
  };
  const double largest = quantile(0.5 + 0.4677);
  for (int i = 0; i < 8; ++i) {
    const double expected = quantile(0.5 + (i + 0.5) / 7.5 * 0.4677) / largest * 8;
    EXPECT_NEAR(static_cast<double>(Levels::normal().magnitude[static_cast<std::size_t>(i)]), expected,
                expected * 0x1p-24);
  }
  EXPECT_EQ(Levels::normal().magnitude[7], 8.0F);
  EXPECT_EQ(Levels::normal().name(), "normal");
  EXPECT_EQ(Levels::int4().name(), "int4");
  EXPECT_TRUE(Levels::int4().is_int4());
  Levels other = Levels::int4();
  other.magnitude[7] = 7.5F;
  EXPECT_EQ(other.name(), "custom");
}

TEST(Levels, RulesAreNamed) {
  const auto broken = [](std::size_t i, float v) {
    Levels levels = Levels::int4();
    levels.magnitude[i] = v;
    return error_of(ErrorKind::input, [&] { check_levels(levels); });
  };
  EXPECT_THAT(broken(3, NAN), testing::AllOf(HasSubstr("levels[3]"), HasSubstr("finite")));
  EXPECT_THAT(broken(7, HUGE_VALF), HasSubstr("finite"));
  EXPECT_THAT(broken(0, -1), HasSubstr(">= 0"));
  EXPECT_THAT(broken(0, -0.0F), HasSubstr(">= 0"));
  EXPECT_THAT(broken(4, 3), testing::AllOf(HasSubstr("levels[4]"), HasSubstr("increasing")));
  EXPECT_THAT(broken(7, std::nextafter(448.0F, 449.0F)), HasSubstr("448"));
  Levels largest = Levels::int4();
  largest.magnitude[7] = 448;
  EXPECT_NO_THROW(check_levels(largest));
  EXPECT_NO_THROW(check_levels(Levels::normal()));
}

TEST(Products, AreTheExactProductRoundedOnce) {
  std::vector<Levels> sets{Levels::int4(), Levels::normal()};
  for (int i = 0; i < 20; ++i) sets.push_back(random_levels());
  for (const Levels& levels : sets) {
    const ProductTable table(levels);
    for (unsigned sigma = 0; sigma <= 0x7e; ++sigma) {
      for (std::size_t i = 0; i < 8; ++i) {
        const double exact = static_cast<double>(levels.magnitude[i]) *
                             static_cast<double>(decode_e4m3(static_cast<std::uint8_t>(sigma)));
        ASSERT_EQ(table.byte[sigma][i], nearest_e4m3(exact)) << sigma << " " << levels.magnitude[i];
        ASSERT_EQ(table.value[sigma][i], decode_e4m3(table.byte[sigma][i]));
      }
    }
    EXPECT_EQ(table.byte[0x7f], (std::array<std::uint8_t, 8>{}));
  }
}

TEST(Products, ReconstructionIsEntryByEntryTheDefinition) {
  for (const Levels& levels : {Levels::int4(), Levels::normal(), random_levels()}) {
    for (const std::uint64_t cols : {1UL, 127UL, 128UL, 129UL, 301UL}) {
      const QuantizedLinear q = random_linear(7, cols, levels, cols == 128);
      const ProductTable table(levels);
      check_quantized_linear(q);
      const std::uint64_t begin = 2, count = 4;
      std::vector<float> real(count * cols), operand(count * cols);
      std::vector<std::uint8_t> bytes(count * cols);
      dequantize_rows(q, table, begin, count, real);
      operand_rows(q, table, begin, count, operand);
      operand_bytes(q, table, begin, count, bytes);
      for (std::uint64_t i = 0; i < count * cols; ++i) {
        const std::uint64_t n = begin + i / cols, k = i % cols;
        const unsigned code = q.code(n, k);
        const double sigma = decode_e4m3(q.group_scales[n * q.groups() + k / kGroupSize]);
        const std::uint8_t magnitude = nearest_e4m3(static_cast<double>(levels.magnitude[code & 7U]) * sigma);
        ASSERT_EQ(bytes[i], magnitude | (code & 8U) << 4U);
        ASSERT_EQ(operand[i], decode_e4m3(bytes[i]));
        ASSERT_EQ(real[i], q.row_scales[cols == 128 ? 0 : n] * operand[i]);
      }
      std::vector<float> wrong(count * cols + 1);
      EXPECT_THROW(dequantize_rows(q, table, begin, count, wrong), Error);
      EXPECT_THROW(dequantize_rows(q, table, 6, 2, real), Error);
    }
  }
}

// Straight from the document, in double.
float reference_tensor_scale(const std::vector<double>& group_max, double m) {
  double best_under = HUGE_VAL;
  float best = 1;
  for (int e = 0; e <= 14; ++e) {
    const double s = std::ldexp(1.0, e);
    double under = 0;
    bool over = false;
    for (const double amax : group_max) {
      over = over || amax * s > 448;
      if (amax * s < m) under += (m - s * amax) / m;
    }
    if (over) break;
    if (under < best_under) {
      best_under = under;
      best = static_cast<float>(s);
    }
  }
  return best;
}

TEST(TensorScale, IsTheDocumentsSearch) {
  const float m = 7.0F * 0x1p-9F;
  for (int round = 0; round < 300; ++round) {
    const std::uint64_t rows = 1 + random_source()() % 9, cols = 1 + random_source()() % 500;
    std::normal_distribution<float> normal(0.0F,
                                           std::ldexp(1.0F, static_cast<int>(random_source()() % 24) - 16));
    std::vector<float> w(rows * cols);
    for (float& v : w) v = normal(random_source());
    if (round % 5 == 0) std::fill(w.begin(), w.begin() + static_cast<std::ptrdiff_t>(w.size() / 2), 0.0F);
    std::vector<double> group_max;
    for (std::uint64_t n = 0; n < rows; ++n) {
      for (std::uint64_t begin = 0; begin < cols; begin += 128) {
        double amax = 0;
        for (std::uint64_t k = begin; k < std::min(cols, begin + 128); ++k) {
          amax = std::max(amax, std::fabs(static_cast<double>(w[n * cols + k])));
        }
        group_max.push_back(amax);
      }
    }
    TensorScaleSearch search(m);
    search.add_rows(w, rows, cols);
    ASSERT_EQ(search.scale(), reference_tensor_scale(group_max, m));
  }
}

TEST(TensorScale, EdgesOfTheSearch) {
  const auto scale_of = [](std::vector<float> w) {
    TensorScaleSearch search(7.0F * 0x1p-9F);
    search.add_rows(w, 1, w.size());
    return search.scale();
  };
  EXPECT_EQ(scale_of({0, 0, 0}), 1.0F);         // all tie: the smallest
  EXPECT_EQ(scale_of({1e6F}), 1.0F);            // s = 1 is already over 448
  EXPECT_EQ(scale_of({7.0F * 0x1p-9F}), 1.0F);  // just not under
  EXPECT_EQ(scale_of({std::nextafter(7.0F * 0x1p-9F, 0.0F)}), 2.0F);
  EXPECT_EQ(scale_of({1e-12F}), 16384.0F);
  std::vector<float> two(129, 1e-4F);
  two[0] = 448.0F / 32;  // s = 32 is allowed, 64 is not
  EXPECT_EQ(scale_of(two), 32.0F);
  two[0] = std::nextafter(448.0F / 32, 1000.0F);
  EXPECT_EQ(scale_of(two), 16.0F);
  EXPECT_EQ(scale_of({NAN, 1.0F}), 1.0F);
  TensorScaleSearch wide(1), more(1);
  std::vector<float> groups(3 * 128, 448.0F);
  groups[5] = groups[6] = std::nextafter(448.0F, 1000.0F);
  groups[256] = -1e30F;
  wide.add_rows(groups, 1, groups.size());
  more.add_rows(groups, 3, 128);
  EXPECT_EQ(wide.saturated_groups(), 2U);
  wide.merge(more);
  EXPECT_EQ(wide.saturated_groups(), 4U);
  EXPECT_THROW(TensorScaleSearch(0.0F), Error);
  EXPECT_THROW(TensorScaleSearch(NAN), Error);
  TensorScaleSearch a(0.5F), b(0.25F);
  EXPECT_THROW(a.merge(b), Error);
}

TEST(WeightRules, NonFiniteWeightsAreNamed) {
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
    for (const float bad : {NAN, HUGE_VALF, -HUGE_VALF}) {
      for (const std::uint64_t column : {0UL, 127UL, 128UL, 199UL}) {
        const std::uint64_t rows = 3, cols = 200;
        std::vector<float> w(rows * cols, 0.5F);
        w[cols + column] = bad;
        w[2 * cols] = NAN;  // later, so not the one that is named
        std::vector<std::byte> bytes(w.size() * dtype_size(dtype));
        std::vector<std::uint16_t> half(w.size());
        if (dtype == Dtype::f32) {
          std::memcpy(bytes.data(), w.data(), bytes.size());
        } else {
          dtype == Dtype::f16 ? encode_f16(w, half) : encode_bf16(w, half);
          std::memcpy(bytes.data(), half.data(), bytes.size());
        }
        QuantizedLinear q = make_quantized_linear(10, cols, Levels::int4(), false);
        const std::string what =
            error_of(ErrorKind::input, [&] { quantize_rows_raw(bytes, dtype, 6, rows, {}, {}, q); });
        EXPECT_THAT(what, HasSubstr(std::string(std::isnan(bad) ? "NaN" : "infinity") + " at [7, " +
                                    std::to_string(column) + "]"));
      }
    }
  }
}

TEST(WeightRules, ImpossibleOptionsAreUsageErrors) {
  const std::vector<float> w(128, 1.0F);
  QuantizedLinear q = make_quantized_linear(1, 128, Levels::int4(), false);
  const auto refused = [&](const std::function<void(WeightQuantizerOptions&)>& change) {
    WeightQuantizerOptions options;
    change(options);
    return error_of(ErrorKind::usage, [&] { quantize_rows(w, 0, 1, options, {}, q); });
  };
  EXPECT_THAT(refused([](auto& o) { o.search_low = 1; }), HasSubstr("1 .. 0"));
  EXPECT_THAT(refused([](auto& o) { o.search_high = -1; }), HasSubstr("search range"));
  EXPECT_THAT(refused([](auto& o) { o.search_low = std::numeric_limits<int>::min(); }),
              HasSubstr("search range"));
  EXPECT_THAT(refused([](auto& o) { o.levels.magnitude[7] = 8.5F; }), HasSubstr("per-tensor"));
}

TEST(WeightRules, WrongShapesAreInternalErrors) {
  const std::vector<float> w(256, 1.0F), importance(127, 1.0F);
  const auto refused = [&](const std::function<void(QuantizedLinear&)>& change, std::uint64_t begin = 0,
                           std::span<const float> h = {}, WeightQuantizerOptions options = {}) {
    QuantizedLinear q = make_quantized_linear(2, 128, Levels::int4(), false);
    change(q);
    error_of(ErrorKind::internal, [&] { quantize_rows(w, begin, 2, options, h, q); });
  };
  refused([](auto& q) { q.codes.pop_back(); });
  refused([](auto& q) { q.group_scales.push_back(1); });
  refused([](auto& q) { q.row_scales.resize(1); });
  refused([](auto& q) { q.levels = Levels::normal(); });
  refused([](auto&) {}, 1);
  refused([](auto&) {}, ~std::uint64_t{0});
  refused([](auto&) {}, 0, importance);
  WeightQuantizerOptions per_tensor;
  per_tensor.row_scale = RowScale::tensor;
  refused([](auto& q) { q.row_scales.assign(1, 0.0F); }, 0, {}, per_tensor);
  QuantizedLinear q = make_quantized_linear(2, 128, Levels::int4(), false);
  std::vector<float> bad(128, 1.0F);
  bad[3] = -1;
  error_of(ErrorKind::input, [&] { quantize_rows(w, 0, 2, {}, bad, q); });
  const std::vector<std::byte> doubles(2 * 128 * 8);
  EXPECT_THAT(error_of(ErrorKind::input, [&] { quantize_rows_raw(doubles, Dtype::f64, 0, 2, {}, {}, q); }),
              HasSubstr("F64"));
}

TEST(WeightRules, EmptyTensorsAreFine) {
  QuantizedLinear none = make_quantized_linear(0, 100, Levels::int4(), false);
  quantize_rows({}, 0, 0, {}, {}, none);
  check_quantized_linear(none);
  QuantizedLinear thin = make_quantized_linear(3, 0, Levels::int4(), false);
  quantize_rows({}, 0, 3, {}, {}, thin);
  check_quantized_linear(thin);
}

TEST(WeightRules, EveryBrokenRuleIsNamed) {
  const auto broken = [](const std::function<void(QuantizedLinear&)>& change,
                         const Levels& levels = Levels::int4()) {
    QuantizedLinear q = random_linear(3, 129, levels, false);
    check_quantized_linear(q);
    change(q);
    return error_of(ErrorKind::input, [&] { check_quantized_linear(q); });
  };
  EXPECT_THAT(broken([](auto& q) { q.codes.pop_back(); }), HasSubstr("code bytes"));
  EXPECT_THAT(broken([](auto& q) { q.group_scales.pop_back(); }), HasSubstr("group scales"));
  EXPECT_THAT(broken([](auto& q) { q.row_scales.pop_back(); }), HasSubstr("second-level scales"));
  EXPECT_THAT(broken([](auto& q) { q.cols = ~std::uint64_t{0}; }), HasSubstr("columns"));
  EXPECT_THAT(broken([](auto& q) { q.row_scales[1] = 0; }), HasSubstr("[1]"));
  EXPECT_THAT(broken([](auto& q) { q.row_scales[2] = NAN; }), HasSubstr("[2]"));
  EXPECT_THAT(broken([](auto& q) { q.group_scales[3] = 0; }),
              testing::AllOf(HasSubstr("0x00"), HasSubstr("[1, 1]")));
  EXPECT_THAT(broken([](auto& q) { q.group_scales[0] = 0x7f; }), HasSubstr("0x7f"));
  EXPECT_THAT(broken([](auto& q) { q.group_scales[0] = 0x81; }), HasSubstr("0x81"));
  EXPECT_THAT(broken([](auto& q) { q.codes[128 + 5] = 0x81; }),
              testing::AllOf(HasSubstr("minus zero"), HasSubstr("[1, 11]")));
  EXPECT_THAT(broken([](auto& q) { q.codes[64] = 0x10; }),
              testing::AllOf(HasSubstr("padding"), HasSubstr("[0, 129]")));
  EXPECT_THAT(broken([](auto& q) { q.codes[127] = 0x02; }),
              testing::AllOf(HasSubstr("padding"), HasSubstr("[0, 254]")));
  EXPECT_THAT(broken([](auto& q) { q.levels.magnitude[2] = 1; }), HasSubstr("levels[2]"));
  // Without a level 0 of zero, code 8 is a number like any other.
  QuantizedLinear q = random_linear(3, 128, Levels::normal(), false);
  q.codes[0] = 0x88;
  EXPECT_NO_THROW(check_quantized_linear(q));
}

}  // namespace
}  // namespace fireq::libquant
