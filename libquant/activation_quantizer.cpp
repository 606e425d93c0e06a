#include "libquant/activation_quantizer.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>
#include <vector>

#include "common/error.hpp"
#include "libquant/float_bits.hpp"
#include "libquant/number_formats.hpp"
#include "libquant/row_kernels.hpp"

namespace fireq::libquant {
namespace {

[[noreturn]] void throw_not_finite(std::span<const float> x) {
  const auto bad = std::find_if(x.begin(), x.end(), [](float v) {
    return !std::isfinite(bits::f32_from_bf16(bits::bf16_from_f32(v)));
  });
  throw Error(ErrorKind::input, "an activation is not a finite number")
      .expected("finite activations")
      .found(std::string(std::isnan(*bad) ? "NaN" : "infinity") + " in channel " +
             std::to_string(bad - x.begin()));
}

// Rounds to bf16 into `rounded` and gives a.
float round_and_scale(std::span<const float> x, float* rounded) {
  kernels().round_bf16(x.data(), rounded, x.size());
  const std::uint32_t largest = kernels().absmax32(rounded, x.size());
  if (largest >= bits::kInf) throw_not_finite(x);
  return std::max(std::bit_cast<float>(largest), 0x1p-20F) * (1.0F / 448.0F);
}

}  // namespace

float quantize_token(std::span<const float> x, std::span<std::uint8_t> x8) {
  if (x.size() != x8.size()) throw Error(ErrorKind::internal, "a token and its FP8 codes differ in size");
  std::vector<float> rounded(x.size());
  const float a = round_and_scale(x, rounded.data());
  kernels().divide_to_e4m3(rounded.data(), a, x8.data(), x8.size());
  return a;
}

void round_token(std::span<const float> x, std::span<std::uint16_t> bf16) {
  encode_bf16(x, bf16);
  constexpr std::uint16_t kExponent = 0x7f80;  // all ones: infinity or NaN
  if (std::any_of(bf16.begin(), bf16.end(), [](std::uint16_t h) { return (h & kExponent) == kExponent; }))
    throw_not_finite(x);
}

float quantize_token_in_place(std::span<float> x) {
  const float a = round_and_scale(x, x.data());
  kernels().divide_round_e4m3(x.data(), a, x.size());
  return a;
}

}  // namespace fireq::libquant
