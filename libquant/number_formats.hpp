// FP8 E4M3FN, bfloat16 and IEEE half: conversions to and from FP32, round to nearest, ties to even.
// E4M3FN: 1-4-3, bias 7, no infinities, 0x7f/0xff are NaN, largest 448, smallest subnormal 2^-9.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace fireq::libquant {

inline constexpr float kFp8Max = 448.0F;
inline constexpr float kFp8Tiny = 0x1p-9F;  // smallest subnormal

// RN8: saturates at +-448 (infinities too); NaN gives 0x7f. Keeps the sign of zero.
std::uint8_t encode_e4m3(float value) noexcept;
float decode_e4m3(std::uint8_t byte) noexcept;
std::uint8_t encode_e4m3_from_double(double value) noexcept;  // one rounding, not two through FP32
inline float round_e4m3(float value) noexcept {
  return decode_e4m3(encode_e4m3(value));
}

// NaN stays NaN (quieted); overflow gives infinity.
std::uint16_t encode_bf16(float value) noexcept;
float decode_bf16(std::uint16_t bits) noexcept;
inline float round_bf16(float value) noexcept {
  return decode_bf16(encode_bf16(value));
}
std::uint16_t encode_f16(float value) noexcept;
float decode_f16(std::uint16_t bits) noexcept;

// decode_* keep a NaN's payload. Conversions assume the default rounding mode and no flush-to-zero.

// Bulk forms, vectorised; same results as the scalar ones. Error(internal) when sizes differ.
void decode_e4m3(std::span<const std::uint8_t> in, std::span<float> out);
void encode_e4m3(std::span<const float> in, std::span<std::uint8_t> out);
void decode_bf16(std::span<const std::uint16_t> in, std::span<float> out);
void encode_bf16(std::span<const float> in, std::span<std::uint16_t> out);
void decode_f16(std::span<const std::uint16_t> in, std::span<float> out);
void encode_f16(std::span<const float> in, std::span<std::uint16_t> out);

// The instruction set that libquant's loops run on in this process: a Highway target such as "AVX2", or
// "plain". Results do not depend on it; benches and `validate` print it.
std::string_view simd_target() noexcept;

}  // namespace fireq::libquant
