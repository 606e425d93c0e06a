// Scalar conversions between FP32 and the small formats, on bits. Internal: number_formats.hpp is the public
// face, and the plain loops of row_kernels_plain.cpp share these with it. The vector code mirrors them lane
// by lane. They need the default rounding mode and no flush-to-zero.
#pragma once

#include <bit>
#include <cstdint>

namespace fireq::libquant::bits {

inline constexpr std::uint32_t kAbs = 0x7fffffffU;
inline constexpr std::uint32_t kInf = 0x7f800000U;

inline std::uint8_t e4m3_from_f32(float value) noexcept {
  const auto u = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (u >> 24U) & 0x80U;
  std::uint32_t a = u & kAbs;
  if (a > kInf) return 0x7f;
  if (a >= 0x43e00000U) return static_cast<std::uint8_t>(sign | 0x7eU);  // 448 and over
  if (a < 0x3c800000U) {  // under 2^-6: adding 2^14 rounds to a multiple of 2^-9
    const float sum = std::bit_cast<float>(a) + 0x1p14F;
    return static_cast<std::uint8_t>(sign | (std::bit_cast<std::uint32_t>(sum) - 0x46800000U));
  }
  a += 0x7ffffU + ((a >> 20U) & 1U);
  return static_cast<std::uint8_t>(sign | ((a >> 20U) - (120U << 3U)));
}

constexpr float f32_from_e4m3(std::uint8_t byte) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(byte & 0x80U) << 24U;
  const std::uint32_t m = byte & 0x7fU;
  if (m == 0x7fU) return std::bit_cast<float>(sign | 0x7fc00000U);
  if (m < 8U) {
    const float v = static_cast<float>(m) * 0x1p-9F;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(v));
  }
  return std::bit_cast<float>(sign | ((m << 20U) + (120U << 23U)));
}

inline std::uint16_t bf16_from_f32(float value) noexcept {
  const auto u = std::bit_cast<std::uint32_t>(value);
  if ((u & kAbs) > kInf) return static_cast<std::uint16_t>((u >> 16U) | 0x40U);
  return static_cast<std::uint16_t>((u + 0x7fffU + ((u >> 16U) & 1U)) >> 16U);
}

inline float f32_from_bf16(std::uint16_t h) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(h) << 16U);
}

inline std::uint16_t f16_from_f32(float value) noexcept {
  const auto u = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (u >> 16U) & 0x8000U;
  std::uint32_t a = u & kAbs;
  if (a > kInf) return static_cast<std::uint16_t>(sign | 0x7e00U | ((a >> 13U) & 0x3ffU));
  if (a >= 0x477ff000U) return static_cast<std::uint16_t>(sign | 0x7c00U);  // 65520 and over
  if (a < 0x38800000U) {  // under 2^-14: adding 1/2 rounds to a multiple of 2^-24
    const float sum = std::bit_cast<float>(a) + 0.5F;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(sum) - 0x3f000000U));
  }
  a += 0xfffU + ((a >> 13U) & 1U);
  return static_cast<std::uint16_t>(sign | ((a >> 13U) - (112U << 10U)));
}

inline float f32_from_f16(std::uint16_t h) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000U) << 16U;
  const std::uint32_t m = h & 0x7fffU;
  if (m >= 0x7c00U) return std::bit_cast<float>(sign | kInf | ((m & 0x3ffU) << 13U));
  if (m < 0x400U) {
    const float v = static_cast<float>(m) * 0x1p-24F;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(v));
  }
  return std::bit_cast<float>(sign | ((m << 13U) + (112U << 23U)));
}

// Round to the nearest integer, ties to even, for |x| <= 2^22 (larger values keep their sign and stay large).
inline float round_even(float x) noexcept {
  constexpr float kMagic = 0x1.8p23F;
  return (x + kMagic) - kMagic;
}

}  // namespace fireq::libquant::bits
