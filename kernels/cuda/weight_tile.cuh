// A thread's part of one 64 x 128 half tile: 64 codes and the operand tables of its two rows, from shared
// memory to the A fragments of four k32 steps. Shared by the decode and the prefill kernel.
#pragma once

#include <cstdint>

#include "kernels/cuda/expand.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/sm90_layout.hpp"

namespace fireq::kernels {

struct WeightFragment {
  uint4 codes[2];  // words q = 0-3 and 4-7; even q: row g, odd q: row g + 8
  uint2 rows[2];   // operand bytes of rows g and g + 8

  // `half`: shared-memory address of the half tile; `table`: of the 1024-byte aligned operand table.
  __device__ __forceinline__ void load(std::uint32_t half, std::uint32_t table, std::uint32_t warp,
                                       std::uint32_t lane) {
    load_second(half, table, load_first(half, warp, lane), warp, lane);
  }
  // In two parts, for loads into registers that steps 0 and 1, then 2 and 3 of the tile before have just
  // given up: the first returns the scale bytes that the second wants.
  __device__ __forceinline__ std::uint32_t load_first(std::uint32_t half, std::uint32_t warp,
                                                      std::uint32_t lane) {
    codes[0] = ptx::load_shared_16(half + 16 * (32 * warp + lane));
    return ptx::load_shared_2(half + kHalfCodeBytes + 2 * (8 * warp + lane / 4));
  }
  __device__ __forceinline__ void load_second(std::uint32_t half, std::uint32_t table, std::uint32_t sigma,
                                              std::uint32_t warp, std::uint32_t lane) {
    rows[0] = ptx::load_shared_8(table | ((sigma << 3U) & 0x3f8U));
    rows[1] = ptx::load_shared_8(table | ((sigma >> 5U) & 0x3f8U));
    codes[1] = ptx::load_shared_16(half + 2048 + 16 * (32 * warp + lane));
  }
  // The operand registers of k32 step s.
  __device__ __forceinline__ void expand(std::uint32_t s, std::uint32_t (&a)[4]) const {
    const uint4& c = codes[s / 2];
    expand_word(s % 2 == 0 ? c.x : c.z, rows[0], a[0], a[2]);
    expand_word(s % 2 == 0 ? c.y : c.w, rows[1], a[1], a[3]);
  }
};

// Writes a step's operands where the definition has them: out8 [rows, groups * 128]. first_row: of the warp's
// 16 rows.
__device__ __forceinline__ void dump_fragment(std::uint8_t* out8, std::uint32_t rows, std::uint32_t groups,
                                              std::uint32_t first_row, std::uint32_t group,
                                              std::uint32_t step, std::uint32_t lane,
                                              const std::uint32_t (&a)[4]) {
  if (group >= groups) return;
#pragma unroll
  for (std::uint32_t i = 0; i < 4; ++i) {
    const std::uint32_t row = first_row + lane / 4 + 8 * (i % 2);
    const std::uint64_t k =
        static_cast<std::uint64_t>(group) * kGroup + 32 * step + 16 * (i / 2) + 4 * (lane % 4);
    if (row < rows)
      *reinterpret_cast<std::uint32_t*>(out8 + static_cast<std::uint64_t>(row) * groups * kGroup + k) = a[i];
  }
}

// Position in a ring of stages and the parity of its current round.
template <std::uint32_t kStages>
struct RingPosition {
  std::uint32_t index = 0;
  std::uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    const bool wraps = index + 1 == kStages;
    index = wraps ? 0 : index + 1;
    parity ^= static_cast<std::uint32_t>(wraps);
  }
  __device__ __forceinline__ std::uint32_t previous() const { return index == 0 ? kStages - 1 : index - 1; }
};

}  // namespace fireq::kernels
