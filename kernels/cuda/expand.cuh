// From 4-bit codes to the FP8 operands that the tensor cores multiply: w8 = +-RN8(level * sigma)
// (docs/numerics.md). A table of 8 operand bytes per scale byte sits in shared memory (128 x 8 B); a code's
// three magnitude bits select a byte of the row for its group's scale and its sign bit is merged in: seven
// integer operations for eight weights, for any levels.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"

namespace fireq::kernels {

struct LevelsParam {
  float magnitude[8];
};

inline constexpr std::uint32_t kTableBytes = 128 * 8;

__device__ __forceinline__ float decode_e4m3_positive(std::uint32_t byte) {
  const std::uint32_t exponent = byte >> 3U;
  const std::uint32_t mantissa = byte & 7U;
  return exponent == 0 ? static_cast<float>(mantissa) * 0x1p-9F
                       : __uint_as_float(((exponent + 120U) << 23U) | (mantissa << 20U));
}

// RN8 of the exact product: the FP32 product is truncated and made odd when inexact, so that rounding it to
// FP8 cannot see a false tie.
__device__ __forceinline__ std::uint8_t operand_byte(float level, float sigma) {
  float product = __fmul_rz(level, sigma);
  if (__fmaf_rn(level, sigma, -product) != 0.0F) product = __uint_as_float(__float_as_uint(product) | 1U);
  return static_cast<std::uint8_t>(__nv_cvt_float_to_fp8(product, __NV_SATFINITE, __NV_E4M3));
}

// Eight operand bytes of one scale; scale byte 0x7f is no number and gives zeros.
__device__ __forceinline__ uint2 operand_row(const LevelsParam& levels, std::uint32_t sigma_byte) {
  std::uint32_t word[2] = {0, 0};
  const float sigma = sigma_byte == 0x7fU ? 0.0F : decode_e4m3_positive(sigma_byte);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    word[i / 4] |= static_cast<std::uint32_t>(operand_byte(levels.magnitude[i], sigma)) << (8 * (i % 4));
  return make_uint2(word[0], word[1]);
}

__device__ __forceinline__ void build_table(uint2* table, const LevelsParam& levels, std::uint32_t thread,
                                            std::uint32_t threads) {
  for (std::uint32_t s = thread; s < 128; s += threads) table[s] = operand_row(levels, s);
}

// One word of the sm90 layout: codes 0-3 to `low`, 4-7 to `high` (bytes in order of k).
__device__ __forceinline__ void expand_word(std::uint32_t word, uint2 table_row, std::uint32_t& low,
                                            std::uint32_t& high) {
  const std::uint32_t index = word & 0x77777777U;
  low = ptx::permute_bytes(table_row.x, table_row.y, index) | (word & 0x80808080U);
  high = ptx::permute_bytes(table_row.x, table_row.y, index >> 16U) | ((word << 4U) & 0x80808080U);
}

}  // namespace fireq::kernels
