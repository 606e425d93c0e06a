// Random linear layers for the kernel tests, and the definition computed a second way: E4M3 from its fields,
// the sm90 layout from the sentence in docs/sm90-layout.md, products in double.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/types.hpp"

namespace fireq::kernels::testing {

inline double e4m3_value(unsigned byte) {
  const unsigned exponent = (byte >> 3U) & 15U;
  const unsigned mantissa = byte & 7U;
  if (exponent == 15 && mantissa == 7) return std::nan("");
  const double v =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, static_cast<int>(exponent) - 10);
  return (byte & 0x80U) != 0 ? -v : v;
}

// Nearest of the 127 non-negative numbers, ties to the even byte; saturates. By search, not by bit tricks.
inline std::uint8_t e4m3_nearest(double v) {
  const double magnitude = std::fabs(v);
  unsigned best = 0;
  for (unsigned b = 1; b < 0x7f; ++b) {
    const double d = std::fabs(e4m3_value(b) - magnitude);
    const double e = std::fabs(e4m3_value(best) - magnitude);
    if (d < e || (d == e && b % 2 == 0)) best = b;
  }
  return static_cast<std::uint8_t>(best | (std::signbit(v) ? 0x80U : 0U));
}

inline std::uint16_t to_bf16(float v) {
  std::uint32_t u = 0;
  std::memcpy(&u, &v, 4);
  u += 0x7fffU + (u >> 16U & 1U);
  return static_cast<std::uint16_t>(u >> 16U);
}
inline float from_bf16(std::uint16_t v) {
  const std::uint32_t u = static_cast<std::uint32_t>(v) << 16U;
  float f = 0;
  std::memcpy(&f, &u, 4);
  return f;
}

inline constexpr std::array<float, 8> kInt4{0, 1, 2, 3, 4, 5, 6, 7};
// No zero, largest 8, nothing round about the rest: near to a normal-float set.
inline constexpr std::array<float, 8> kNormalLike{0.3386F, 1.0245F, 1.7372F, 2.5007F,
                                                  3.3519F, 4.3583F, 5.6813F, 8.0F};
inline constexpr std::array<float, 8> kWide{0.0F, 0.0019F, 0.37F, 3.3F, 17.7F, 100.1F, 301.0F, 448.0F};

enum class Spread { usual, all_scales };  // scale bytes as quantisers make them, or all of 0x01 .. 0x7e

struct Layer {
  std::uint64_t rows = 0, cols = 0;
  std::array<float, 8> levels{};
  bool per_tensor = false;
  std::vector<std::uint8_t> codes, group_scales;
  std::vector<float> row_scales, bias;

  std::uint64_t groups() const { return (cols + 127) / 128; }
  unsigned code(std::uint64_t n, std::uint64_t k) const {
    const unsigned b = codes[n * groups() * 64 + k / 2];
    return k % 2 == 0 ? b & 15U : b >> 4U;
  }
  WeightRef ref() const {
    WeightRef w;
    w.rows = rows;
    w.cols = cols;
    w.codes = codes.data();
    w.group_scales = group_scales.data();
    w.row_scales = row_scales.data();
    w.per_tensor = per_tensor;
    w.levels = levels;
    return w;
  }
};

inline Layer make_layer(std::mt19937& rng, std::uint64_t rows, std::uint64_t cols,
                        const std::array<float, 8>& levels, Spread spread, bool per_tensor = false) {
  Layer l;
  l.rows = rows;
  l.cols = cols;
  l.levels = levels;
  l.per_tensor = per_tensor;
  l.codes.resize(rows * l.groups() * 64);
  std::uniform_int_distribution<unsigned> any(0, 15);
  for (std::uint64_t n = 0; n < rows; ++n) {
    for (std::uint64_t k = 0; k < cols; ++k) {
      unsigned code = any(rng);
      if (code == 8 && levels[0] == 0.0F) code = 0;
      l.codes[n * l.groups() * 64 + k / 2] |= static_cast<std::uint8_t>(code << (k % 2 * 4));
    }
  }
  l.group_scales.resize(rows * l.groups());
  std::uniform_int_distribution<unsigned> scale = spread == Spread::usual
                                                      ? std::uniform_int_distribution<unsigned>(0x38, 0x5e)
                                                      : std::uniform_int_distribution<unsigned>(0x01, 0x7e);
  for (auto& s : l.group_scales) s = static_cast<std::uint8_t>(scale(rng));
  std::uniform_real_distribution<float> r(1e-4F, 4e-3F);
  l.row_scales.resize(per_tensor ? 1 : rows);
  for (auto& v : l.row_scales) v = r(rng);
  std::normal_distribution<float> normal;
  l.bias.resize(rows);
  for (auto& v : l.bias) v = 20 * normal(rng);
  return l;
}

// w8[n, k] by the definition.
inline std::vector<std::uint8_t> definition_operands(const Layer& l) {
  const std::uint64_t padded = l.groups() * 128;
  std::array<std::array<std::uint8_t, 8>, 128> table{};
  for (unsigned s = 0; s < 0x7f; ++s)
    for (unsigned i = 0; i < 8; ++i)
      table[s][i] = e4m3_nearest(static_cast<double>(l.levels[i]) * e4m3_value(s));
  std::vector<std::uint8_t> out(l.rows * padded);
  for (std::uint64_t n = 0; n < l.rows; ++n) {
    for (std::uint64_t k = 0; k < padded; ++k) {
      const unsigned code = l.code(n, k);
      const unsigned b = table[l.group_scales[n * l.groups() + k / 128]][code & 7U];
      out[n * padded + k] = static_cast<std::uint8_t>((code & 8U) != 0 ? b | 0x80U : b);
    }
  }
  return out;
}

struct Tokens {
  std::uint64_t tokens = 0, cols = 0, pitch = 0;
  std::vector<std::uint8_t> x8;
  std::vector<float> scale;
  TokensRef ref() const { return {x8.data(), scale.data(), tokens, pitch}; }
};

// Normal values with a few channels 30 times larger, quantised per token. What lies behind column K is NaN.
inline Tokens make_tokens(std::mt19937& rng, std::uint64_t tokens, std::uint64_t cols) {
  Tokens t;
  t.tokens = tokens;
  t.cols = cols;
  t.pitch = (cols + 127) / 128 * 128;
  t.x8.assign(tokens * t.pitch, 0x7f);
  t.scale.resize(tokens);
  std::normal_distribution<float> normal;
  std::vector<float> row(cols);
  for (std::uint64_t m = 0; m < tokens; ++m) {
    float largest = 0x1p-20F;
    for (std::uint64_t k = 0; k < cols; ++k) {
      row[k] = from_bf16(to_bf16(normal(rng) * (k % 97 == 13 ? 30.0F : 1.0F)));
      largest = std::max(largest, std::fabs(row[k]));
    }
    t.scale[m] = largest / 448.0F;
    for (std::uint64_t k = 0; k < cols; ++k) {
      // Any FP8 number will do as an operand: truncate the value's mantissa to three bits.
      const float v = row[k] / t.scale[m];
      int exponent = 0;
      const float f = std::frexp(std::fabs(v), &exponent);  // f in [0.5, 1)
      unsigned byte = 0;
      if (exponent > -6) {
        const auto mantissa = static_cast<unsigned>(f * 16.0F);  // 8 .. 15
        byte = std::min(0x7eU, static_cast<unsigned>(exponent + 6) << 3U | (mantissa & 7U));
      } else {
        byte = static_cast<unsigned>(std::fabs(v) * 512.0F);
      }
      t.x8[m * t.pitch + k] = static_cast<std::uint8_t>(byte | (v < 0 ? 0x80U : 0U));
    }
  }
  return t;
}

// y in double, and for each output the root of the sum of squared products (the scale of rounding noise).
struct Product {
  std::vector<double> y, noise;
};
inline Product definition_product(const Tokens& t, const Layer& l, const std::vector<std::uint8_t>& w8) {
  const std::uint64_t padded = l.groups() * 128;
  std::array<double, 256> value{};
  for (unsigned b = 0; b < 256; ++b) value[b] = e4m3_value(b);
  Product p;
  p.y.resize(t.tokens * l.rows);
  p.noise.resize(t.tokens * l.rows);
  std::vector<double> row(l.cols);
  for (std::uint64_t n = 0; n < l.rows; ++n) {
    for (std::uint64_t k = 0; k < l.cols; ++k) row[k] = value[w8[n * padded + k]];
    for (std::uint64_t m = 0; m < t.tokens; ++m) {
      double sum = 0, squares = 0;
      const std::uint8_t* x = t.x8.data() + m * t.pitch;
      for (std::uint64_t k = 0; k < l.cols; ++k) {
        const double product = row[k] * value[x[k]];
        sum += product;
        squares += product * product;
      }
      const double scale = static_cast<double>(t.scale[m]) * l.row_scales[l.per_tensor ? 0 : n];
      p.y[m * l.rows + n] = scale * sum;
      p.noise[m * l.rows + n] = scale * std::sqrt(squares);
    }
  }
  return p;
}

}  // namespace fireq::kernels::testing
