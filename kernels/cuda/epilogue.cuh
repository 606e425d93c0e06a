// What happens to an accumulator on its way to memory: y = bf16((a_m * r_n) * acc + bias_n + residual[m, n]),
// in FP32.
#pragma once

#include <cstdint>

#include "kernels/cuda/ptx.cuh"

namespace fireq::kernels {

struct OutputParams {
  const float* row_scale;         // r, [N] or [1]
  std::uint32_t row_scale_step;   // 1 or 0
  const float* bias;              // [N] or null
  const std::uint16_t* residual;  // bf16 [M, residual_pitch] or null
  std::uint64_t residual_pitch;
  std::uint16_t* out;  // bf16 [M, out_pitch]
  std::uint64_t out_pitch;
  std::uint32_t tokens;  // M
  std::uint32_t rows;    // N
  // The common case, a fifth of the instructions: N even, rows of the output and the residual 4-byte aligned.
  bool paired = false;
};

// What a thread needs of its two output rows (g and g + 8 of a 16-row slice).
struct RowTerms {
  float scale[2];
  float bias[2];

  RowTerms() = default;
  __device__ __forceinline__ RowTerms(const OutputParams& p, std::uint32_t row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::uint32_t n = row + 8U * static_cast<std::uint32_t>(i);
      const bool in = n < p.rows;
      scale[i] = in ? __ldg(p.row_scale + static_cast<std::uint64_t>(n) * p.row_scale_step) : 0.0F;
      bias[i] = in && p.bias != nullptr ? __ldg(p.bias + n) : 0.0F;
    }
  }
};

__device__ __forceinline__ float bf16_to_float(std::uint16_t v) {
  return __uint_as_float(static_cast<std::uint32_t>(v) << 16U);
}

// One 16 x 8 block of the accumulator layout (rows row, row + 8; tokens token, token + 1) as finished FP32
// values. The residual may have been written by the kernel before: read through L2.
__device__ __forceinline__ void finish_block(const OutputParams& p, const RowTerms& terms, std::uint32_t row,
                                             std::uint32_t token, float a0, float a1, float (&v)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float y = __fmul_rn(__fmul_rn(c == 0 ? a0 : a1, terms.scale[i]), v[2 * i + c]);
      if (p.bias != nullptr) y += terms.bias[i];
      if (p.residual != nullptr) {
        const std::uint32_t n = row + 8U * static_cast<std::uint32_t>(i);
        const std::uint32_t m = token + static_cast<std::uint32_t>(c);
        if (n < p.rows && m < p.tokens) {
          const unsigned short r =
              __ldcg(reinterpret_cast<const unsigned short*>(p.residual) + m * p.residual_pitch + n);
          y += bf16_to_float(r);
        }
      }
      v[2 * i + c] = y;
    }
  }
}

// Stores a finished 16 x 8 block: a transpose across the warp gives each lane two neighbouring rows of one
// token. first_row: of the 16-row slice; first_token: of the 8 tokens.
__device__ __forceinline__ void store_block(const OutputParams& p, std::uint32_t first_row,
                                            std::uint32_t first_token, std::uint32_t lane,
                                            const float (&v)[4]) {
  const std::uint32_t token = first_token + lane / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t pair = ptx::transpose_8x8(ptx::pack_bf16(v[2 * i], v[2 * i + 1]));
    const std::uint32_t row = first_row + 8U * static_cast<std::uint32_t>(i) + 2U * (lane % 4);
    if (token >= p.tokens || row >= p.rows) continue;
    std::uint16_t* dst = p.out + token * p.out_pitch + row;
    if ((reinterpret_cast<std::uintptr_t>(dst) & 3U) == 0 && row + 1 < p.rows) {
      *reinterpret_cast<std::uint32_t*>(dst) = pair;
    } else {
      dst[0] = static_cast<std::uint16_t>(pair);
      if (row + 1 < p.rows) dst[1] = static_cast<std::uint16_t>(pair >> 16U);
    }
  }
}

// What a lane of a paired output loads of a 16 x 8 block's residual: two neighbouring rows of one token, and
// the same 8 rows on. Asked for ahead, for it takes longer than all that follows.
struct ResidualPairs {
  std::uint32_t of[2] = {0, 0};

  ResidualPairs() = default;
  __device__ __forceinline__ ResidualPairs(const OutputParams& p, std::uint32_t first_row,
                                           std::uint32_t first_token, std::uint32_t lane) {
    if (p.residual == nullptr || !p.paired) return;
    const std::uint32_t token = first_token + lane / 4;
    const std::uint32_t row = first_row + 2 * (lane % 4);
    const auto* from = reinterpret_cast<const std::uint32_t*>(
        p.residual + static_cast<std::uint64_t>(token) * p.residual_pitch + row);
    if (token < p.tokens && row < p.rows) of[0] = __ldcg(from);
    if (token < p.tokens && row + 8 < p.rows) of[1] = __ldcg(from + 4);
  }
};

// Both for one 16 x 8 block. a0, a1: scales of tokens first_token + 2 (lane % 4) + {0, 1}.
__device__ __forceinline__ void finish_and_store(const OutputParams& p, const RowTerms& terms,
                                                 std::uint32_t first_row, std::uint32_t first_token,
                                                 std::uint32_t lane, float a0, float a1, float (&v)[4],
                                                 const ResidualPairs& residual) {
  if (!p.paired) {
    finish_block(p, terms, first_row + lane / 4, first_token + 2 * (lane % 4), a0, a1, v);
    store_block(p, first_row, first_token, lane, v);
    return;
  }
  const std::uint32_t token = first_token + lane / 4;
  const std::uint32_t row = first_row + 2 * (lane % 4);
  std::uint32_t pair[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float y0 = __fmul_rn(__fmul_rn(a0, terms.scale[i]), v[2 * i]) + terms.bias[i];
    float y1 = __fmul_rn(__fmul_rn(a1, terms.scale[i]), v[2 * i + 1]) + terms.bias[i];
    if (p.residual != nullptr) {
      const std::uint32_t tokens = ptx::transpose_8x8(residual.of[i]);  // two tokens of this lane's row
      y0 += __uint_as_float(tokens << 16U);
      y1 += __uint_as_float(tokens & 0xffff0000U);
    }
    pair[i] = ptx::transpose_8x8(ptx::pack_bf16(y0, y1));
  }
  auto* dst = reinterpret_cast<std::uint32_t*>(
      p.out + static_cast<std::uint64_t>(token) * static_cast<std::uint32_t>(p.out_pitch) + row);
  if (token < p.tokens && row < p.rows) dst[0] = pair[0];
  if (token < p.tokens && row + 8 < p.rows) dst[4] = pair[1];
}

}  // namespace fireq::kernels
