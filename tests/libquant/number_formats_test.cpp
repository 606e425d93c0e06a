// Conversions against references that work on real numbers: tables made from the fields of the format, and a
// search for the nearest entry.
#include "libquant/number_formats.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "common/error.hpp"

namespace fireq::libquant {
namespace {

// A small float format by its definition.
struct Format {
  int exponent_bits;
  int mantissa_bits;
  bool has_infinity;  // E4M3FN has none; its last pattern is NaN

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int sign_shift() const { return exponent_bits + mantissa_bits; }
  // Number of finite non-negative patterns.
  unsigned finite() const {
    const unsigned patterns = 1U << sign_shift();
    return has_infinity ? patterns - (1U << mantissa_bits) : patterns - 1;
  }
  double value(unsigned pattern) const {
    const int exponent = static_cast<int>(pattern >> mantissa_bits);
    const auto mantissa = static_cast<double>(pattern & ((1U << mantissa_bits) - 1U));
    if (exponent == 0) return std::ldexp(mantissa, 1 - bias() - mantissa_bits);
    return std::ldexp(mantissa + std::ldexp(1.0, mantissa_bits), exponent - bias() - mantissa_bits);
  }
};
constexpr Format kE4m3{4, 3, false};
constexpr Format kF16{5, 10, true};
constexpr Format kBf16{8, 7, true};

std::vector<double> table_of(const Format& f) {
  std::vector<double> values(f.finite());
  for (unsigned p = 0; p < f.finite(); ++p) values[p] = f.value(p);
  return values;
}

// Pattern of the magnitude nearest to |x|, ties to the even pattern; finite() when it rounds past the
// largest.
unsigned nearest(const std::vector<double>& table, double x) {
  const auto above = std::lower_bound(table.begin(), table.end(), x);
  if (above == table.end()) {
    const double last = table.back(), step = last - table[table.size() - 2];
    // Half way to the number that would follow rounds away (that pattern is even in every format here).
    return static_cast<unsigned>(x - last >= step / 2 ? table.size() : table.size() - 1);
  }
  const auto i = static_cast<unsigned>(above - table.begin());
  if (*above == x || i == 0) return i;
  const double down = x - table[i - 1], up = *above - x;
  if (down != up) return down < up ? i - 1 : i;
  return i % 2 == 0 ? i : i - 1;
}

std::uint8_t reference_e4m3(float x) {
  static const std::vector<double> table = table_of(kE4m3);
  if (std::isnan(x)) return 0x7f;
  const unsigned magnitude =
      std::isinf(x) ? 0x7eU : std::min(nearest(table, std::fabs(static_cast<double>(x))), 0x7eU);
  return static_cast<std::uint8_t>(magnitude | (std::signbit(x) ? 0x80U : 0U));
}

std::uint16_t reference_half(const Format& f, const std::vector<double>& table, float x) {
  const unsigned infinity = f.finite();
  const unsigned magnitude = std::isinf(x) ? infinity : nearest(table, std::fabs(static_cast<double>(x)));
  return static_cast<std::uint16_t>(magnitude | (std::signbit(x) ? 0x8000U : 0U));
}

bool same(float a, float b) {
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

// Floats where conversions go wrong: random bits, midpoints of the small formats and their neighbours,
// extremes.
std::vector<float> awkward_floats() {
  std::vector<float> values{
      0.0F, -0.0F, INFINITY, -INFINITY, std::numeric_limits<float>::max(), -std::numeric_limits<float>::max(),
      NAN,  -NAN};
  const auto add = [&values](double v) {
    const auto f = static_cast<float>(v);
    for (const float x : {std::nextafter(f, 0.0F), f, std::nextafter(f, INFINITY)}) {
      values.push_back(x);
      values.push_back(-x);
    }
  };
  std::mt19937_64 random(std::random_device{}());
  for (const Format& f : {kE4m3, kF16, kBf16}) {
    const unsigned stride = f.finite() > 1000 ? 37 : 1;
    for (unsigned p = 0; p + 1 < f.finite(); p += stride) add((f.value(p) + f.value(p + 1)) / 2);
    const double last = f.value(f.finite() - 1), before = f.value(f.finite() - 2);
    add(last);
    add(last + (last - before) / 2);
  }
  for (int e = -149; e < 128; ++e) add(std::ldexp(1.0, e));
  for (const std::uint32_t nan : {0x7f800001U, 0xff800001U, 0x7fc12345U, 0xffffffffU}) {
    values.push_back(std::bit_cast<float>(nan));
  }
  for (int i = 0; i < 400000; ++i)
    values.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(random())));
  return values;
}

TEST(NumberFormats, EveryE4m3ByteDecodesToItsFields) {
  for (unsigned b = 0; b < 256; ++b) {
    const auto byte = static_cast<std::uint8_t>(b);
    const float value = decode_e4m3(byte);
    if ((b & 0x7fU) == 0x7f) {
      EXPECT_TRUE(std::isnan(value)) << b;
      continue;
    }
    const double expected = kE4m3.value(b & 0x7fU) * (b >= 0x80 ? -1 : 1);
    EXPECT_TRUE(same(value, static_cast<float>(expected))) << b;
    EXPECT_EQ(encode_e4m3(value), byte);
    EXPECT_EQ(std::signbit(value), b >= 0x80);
  }
  EXPECT_EQ(decode_e4m3(0x7e), 448.0F);
  EXPECT_EQ(decode_e4m3(0x01), 0.001953125F);
  EXPECT_EQ(decode_e4m3(0x38), 1.0F);
}

TEST(NumberFormats, AllHalvesDecodeAndComeBack) {
  const std::vector<double> f16 = table_of(kF16), bf16 = table_of(kBf16);
  for (unsigned h = 0; h < 65536; ++h) {
    const auto half = static_cast<std::uint16_t>(h);
    const unsigned m = h & 0x7fffU;
    for (const bool brain : {false, true}) {
      const Format& f = brain ? kBf16 : kF16;
      const float value = brain ? decode_bf16(half) : decode_f16(half);
      const std::uint16_t back = brain ? encode_bf16(value) : encode_f16(value);
      ASSERT_EQ(std::signbit(value), h >= 0x8000);
      if (m > f.finite()) {
        ASSERT_TRUE(std::isnan(value)) << h;
        ASSERT_GT(back & 0x7fffU, f.finite());                // still NaN
        ASSERT_NE(back & (1U << (f.mantissa_bits - 1)), 0U);  // and quiet
      } else {
        const double magnitude = m == f.finite() ? HUGE_VAL : (brain ? bf16 : f16)[m];
        ASSERT_EQ(std::fabs(static_cast<double>(value)), magnitude) << h;
        ASSERT_EQ(back, half);
      }
    }
  }
}

TEST(NumberFormats, AllHalvesEncodeToE4m3) {
  for (unsigned h = 0; h < 65536; ++h) {
    for (const float x :
         {decode_f16(static_cast<std::uint16_t>(h)), decode_bf16(static_cast<std::uint16_t>(h))}) {
      ASSERT_EQ(encode_e4m3(x), reference_e4m3(x)) << std::hex << h << " " << x;
    }
  }
}

TEST(NumberFormats, FloatsEncodeToTheNearest) {
  const std::vector<double> f16 = table_of(kF16), bf16 = table_of(kBf16);
  for (const float x : awkward_floats()) {
    ASSERT_EQ(encode_e4m3(x), reference_e4m3(x)) << x;
    if (std::isnan(x)) {
      ASSERT_TRUE(std::isnan(decode_f16(encode_f16(x))));
      ASSERT_TRUE(std::isnan(decode_bf16(encode_bf16(x))));
      continue;
    }
    ASSERT_EQ(encode_f16(x), reference_half(kF16, f16, x)) << x;
    ASSERT_EQ(encode_bf16(x), reference_half(kBf16, bf16, x)) << x;
  }
}

TEST(NumberFormats, DoublesAreRoundedOnce) {
  // Just over a midpoint of E4M3 by less than FP32 can hold: through FP32 it would become the tie.
  for (unsigned p = 0; p + 1 < kE4m3.finite(); ++p) {
    const double middle = (kE4m3.value(p) + kE4m3.value(p + 1)) / 2;
    const double even = p % 2 == 0 ? p : p + 1;
    EXPECT_EQ(encode_e4m3_from_double(middle), even);
    EXPECT_EQ(encode_e4m3_from_double(std::nextafter(middle, HUGE_VAL)), p + 1);
    EXPECT_EQ(encode_e4m3_from_double(std::nextafter(middle, 0.0)), p);
    EXPECT_EQ(encode_e4m3_from_double(-std::nextafter(middle, HUGE_VAL)), (p + 1) | 0x80U);
  }
  EXPECT_EQ(encode_e4m3_from_double(1e300), 0x7e);
  EXPECT_EQ(encode_e4m3_from_double(-HUGE_VAL), 0xfe);
  EXPECT_EQ(encode_e4m3_from_double(std::nan("")), 0x7f);
  EXPECT_EQ(encode_e4m3_from_double(5e-324), 0x00);
}

TEST(NumberFormats, BulkEqualsScalarAtEveryLengthAndStart) {
  const std::vector<float> values = awkward_floats();
  for (const std::size_t n : {0UL, 1UL, 3UL, 15UL, 16UL, 17UL, 63UL, 1000UL, 65537UL}) {
    const std::size_t start = n % 7;
    const std::span<const float> in = std::span(values).subspan(start, n);
    std::vector<std::uint8_t> e4m3(n + 1, 0xaa);
    std::vector<std::uint16_t> f16(n + 1, 0xaaaa), bf16(n + 1, 0xaaaa);
    encode_e4m3(in, std::span(e4m3).first(n));
    encode_f16(in, std::span(f16).first(n));
    encode_bf16(in, std::span(bf16).first(n));
    std::vector<float> back8(n + 1, 7), back16(n + 1, 7), back_brain(n + 1, 7);
    decode_e4m3(std::span(e4m3).first(n), std::span(back8).first(n));
    decode_f16(std::span(f16).first(n), std::span(back16).first(n));
    decode_bf16(std::span(bf16).first(n), std::span(back_brain).first(n));
    for (std::size_t i = 0; i < n; ++i) {
      ASSERT_EQ(e4m3[i], encode_e4m3(in[i])) << in[i];
      ASSERT_EQ(f16[i], encode_f16(in[i])) << in[i];
      ASSERT_EQ(bf16[i], encode_bf16(in[i])) << in[i];
      ASSERT_TRUE(same(back8[i], decode_e4m3(e4m3[i])));
      ASSERT_TRUE(same(back16[i], decode_f16(f16[i])));
      ASSERT_TRUE(same(back_brain[i], decode_bf16(bf16[i])));
    }
    EXPECT_EQ(e4m3[n], 0xaa);  // nothing past the end
    EXPECT_EQ(f16[n], 0xaaaa);
    EXPECT_EQ(bf16[n], 0xaaaa);
    EXPECT_EQ(back8[n] + back16[n] + back_brain[n], 21.0F);
  }
  std::vector<float> two(2);
  EXPECT_THROW(encode_e4m3(two, std::span<std::uint8_t>()), Error);
  EXPECT_THROW(decode_bf16(std::span<const std::uint16_t>(), two), Error);
}

}  // namespace
}  // namespace fireq::libquant
