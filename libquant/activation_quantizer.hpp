// FP8 activations, per token, dynamic (docs/numerics.md, "Activations").
#pragma once

#include <cstdint>
#include <span>

namespace fireq::libquant {

// x [K] is rounded to bf16 first; a = max(max|x|, 2^-20) * (1/448) in FP32; x8[k] = RN8(bf16(x[k]) / a).
// Returns a. Throws Error(input) when a value is not finite ("channel k").
float quantize_token(std::span<const float> x, std::span<std::uint8_t> x8);

// The first step alone, for a quantiser that takes bf16: x rounded to bf16. Throws as quantize_token does.
void round_token(std::span<const float> x, std::span<std::uint16_t> bf16);

// Replaces x by the values decode(x8) (without a) and returns a.
float quantize_token_in_place(std::span<float> x);

}  // namespace fireq::libquant
