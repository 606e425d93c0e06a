// Partial sums that CTAs of one launch exchange through global memory (in fact the L2). Every word of the
// workspace is kEmpty between launches: a reader polls the data itself and puts kEmpty back, so there are no
// counters and no fences, and sums are made in a fixed order: the same bits every time.
#pragma once

#include <cstdint>

#include "kernels/split_plan.hpp"

namespace fireq::kernels {

// A NaN (as FP32, and as a pair of FP16) that arithmetic never makes: it makes 0x7fffffff and 0x7fff.
inline constexpr std::uint32_t kEmpty = 0xffffffffU;

__device__ __forceinline__ uint4 as_words(const float* v) {
  return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                    __float_as_uint(v[3]));
}

__device__ __forceinline__ void publish(uint4* slot, uint4 v) {
  // Codes of NaN operands could still carry all ones through; any other NaN will do.
  if (v.x == kEmpty) v.x = 0x7fffffffU;
  if (v.y == kEmpty) v.y = 0x7fffffffU;
  if (v.z == kEmpty) v.z = 0x7fffffffU;
  if (v.w == kEmpty) v.w = 0x7fffffffU;
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(slot), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ uint4 peek(const uint4* slot) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(slot)
               : "memory");
  return v;
}
__device__ __forceinline__ bool is_full(uint4 v) {
  return v.x != kEmpty && v.y != kEmpty && v.z != kEmpty && v.w != kEmpty;
}

// Where the workers that share a block put their sums: one slot each, in the first of a worker's two places
// where its share begins inside the block, in the second where it began before.
struct ExchangeSlots {
  std::uint32_t first = 0, workers = 0;

  // thread_base: this thread's word in the first place of worker 0; `place`: words of one place.
  __device__ __forceinline__ ExchangeSlots(const SplitPlan& plan, std::uint32_t block, uint4* thread_base,
                                           std::uint32_t place)
      : first(plan.first_worker(block)), workers(plan.last_worker(block) - first + 1), step_(2 * place) {
    const bool began_before = plan.shares == 0 && plan.share_begin(first) < block * plan.units;
    base_ = thread_base + static_cast<std::uint64_t>(first) * step_;
    first_ = base_ + (began_before ? place : 0);
  }
  __device__ __forceinline__ uint4* of(std::uint32_t c) const {  // of worker first + c
    return c == 0 ? first_ : base_ + static_cast<std::uint64_t>(c) * step_;
  }

 private:
  uint4* base_;
  uint4* first_;
  std::uint32_t step_;
};

// Takes every worker's part of the pieces first_piece + i * workers, i < count (a piece is 128 words), and
// empties it: take(v, last, i) in the order of workers, `last` with the last worker's. Eight loads are in
// flight at once, of several pieces where few workers share a block.
template <class Take>
__device__ __forceinline__ void collect(const ExchangeSlots& slots, std::uint32_t first_piece,
                                        std::uint32_t count, Take take) {
  constexpr std::uint32_t kFlight = 8;
  std::uint32_t c = 0, i = 0;  // next to load: worker, piece
  std::uint32_t taken_c = 0, taken_i = 0;
#pragma unroll 1
  for (std::uint32_t left = slots.workers * count; left != 0;) {
    const std::uint32_t now = min(left, kFlight);
    uint4* slot[kFlight];
#pragma unroll
    for (std::uint32_t f = 0; f < kFlight; ++f) {
      slot[f] = slots.of(c) + 128 * (first_piece + i * slots.workers);
      const bool wraps = c + 1 == slots.workers;
      if (f < now) {
        c = wraps ? 0 : c + 1;
        i += static_cast<std::uint32_t>(wraps);
      }
    }
    uint4 v[kFlight];
#pragma unroll
    for (std::uint32_t f = 0; f < kFlight; ++f) v[f] = make_uint4(f < now ? kEmpty : 0U, 0U, 0U, 0U);
    bool full = false;
    while (!full) {
      full = true;
#pragma unroll
      for (std::uint32_t f = 0; f < kFlight;
           ++f)  // only what has not come yet: polling takes bandwidth from it
        if (!is_full(v[f])) v[f] = peek(slot[f]);
#pragma unroll
      for (std::uint32_t f = 0; f < kFlight; ++f) full = full && is_full(v[f]);
    }
#pragma unroll
    for (std::uint32_t f = 0; f < kFlight; ++f) {
      if (f >= now) continue;
      *slot[f] = make_uint4(kEmpty, kEmpty, kEmpty, kEmpty);
      const bool last = taken_c + 1 == slots.workers;
      take(v[f], last, taken_i);
      taken_c = last ? 0 : taken_c + 1;
      taken_i += static_cast<std::uint32_t>(last);
    }
    left -= now;
  }
}

}  // namespace fireq::kernels
