#include "libquant/kv_quantizer.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>

#include "common/error.hpp"
#include "libquant/activation_quantizer.hpp"
#include "libquant/float_bits.hpp"
#include "libquant/number_formats.hpp"
#include "libquant/row_kernels.hpp"

namespace fireq::libquant {
namespace {

float checked_absmax(std::span<const float> x, const char* what) {
  const std::uint32_t largest = kernels().absmax32(x.data(), x.size());
  if (largest < bits::kInf) return std::bit_cast<float>(largest);
  const auto bad = std::find_if(x.begin(), x.end(), [](float v) { return !std::isfinite(v); });
  throw Error(ErrorKind::input, std::string(what) + " is not a finite number")
      .expected("finite values")
      .found(std::string(std::isnan(*bad) ? "NaN" : "infinity") + " in channel " +
             std::to_string(bad - x.begin()));
}

// -7..7; the quotient stays far below 2^22 unless sigma saturated, and is clamped before rounding.
float code_of(float x, float sigma) {
  return bits::round_even(std::clamp(x / sigma, -7.0F, 7.0F));
}

unsigned nibble_of(float x, float sigma) {
  const float code = code_of(x, sigma);
  const auto magnitude = static_cast<unsigned>(std::fabs(code));
  return magnitude | (code < 0 ? 8U : 0U);
}

}  // namespace

std::uint8_t kv_scale_code(std::span<const float> x) {
  return std::max<std::uint8_t>(1, bits::e4m3_from_f32(checked_absmax(x, "a key or value") / 7.0F));
}

std::uint8_t quantize_kv(std::span<const float> x, std::span<std::uint8_t> nibbles) {
  if (nibbles.size() != (x.size() + 1) / 2) throw Error(ErrorKind::internal, "bytes of a KV vector's codes");
  const std::uint8_t scale = kv_scale_code(x);
  const float sigma = bits::f32_from_e4m3(scale);
  for (std::size_t i = 0; i < nibbles.size(); ++i) {
    const unsigned low = nibble_of(x[2 * i], sigma);
    const unsigned high = 2 * i + 1 < x.size() ? nibble_of(x[2 * i + 1], sigma) : 0U;
    nibbles[i] = static_cast<std::uint8_t>(low | (high << 4U));
  }
  return scale;
}

void dequantize_kv(std::span<const std::uint8_t> nibbles, std::uint8_t sigma, std::span<float> out) {
  if (nibbles.size() != (out.size() + 1) / 2)
    throw Error(ErrorKind::internal, "bytes of a KV vector's codes");
  const float scale = bits::f32_from_e4m3(sigma);
  for (std::size_t i = 0; i < out.size(); ++i) {
    const unsigned nibble = (unsigned{nibbles[i / 2]} >> (i % 2 * 4U)) & 15U;
    const float magnitude = static_cast<float>(nibble & 7U) * scale;
    out[i] = (nibble & 8U) != 0 ? -magnitude : magnitude;
  }
}

float quantize_kv_in_place(std::span<float> x) {
  const float sigma = bits::f32_from_e4m3(kv_scale_code(x));
  for (float& v : x) v = code_of(v, sigma);
  return sigma;
}

float quantize_query_in_place(std::span<float> x) {
  const float a = std::max(checked_absmax(x, "a query"), 0x1p-20F) / 448.0F;
  kernels().divide_round_e4m3(x.data(), a, x.size());
  return a;
}

float quantize_probabilities_in_place(std::span<float> p, std::span<const float> sigma_v) {
  if (sigma_v.empty()) {
    for (float& v : p) v = kFp8Max * v;
    kernels().divide_round_e4m3(p.data(), 1.0F, p.size());
    return 1.0F / kFp8Max;
  }
  if (sigma_v.size() != p.size())
    throw Error(ErrorKind::internal, "probabilities and value scales differ in number");
  const float m = *std::max_element(sigma_v.begin(), sigma_v.end());
  if (!(m > 0)) throw Error(ErrorKind::internal, "a block of value scales without a positive one");
  for (std::size_t j = 0; j < p.size(); ++j) p[j] = (kFp8Max * p[j]) * sigma_v[j];
  kernels().divide_round_e4m3(p.data(), m, p.size());
  return m / kFp8Max;
}

}  // namespace fireq::libquant
