// Partial sums that CTAs of one launch exchange through global memory (in fact the L2). Every word of the
// workspace is kEmpty between launches: a reader polls the data itself and puts kEmpty back, so there are no
// counters and no fences, and sums are made in a fixed order: the same bits every time.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/split_plan.hpp"

namespace fireq::kernels {

// A NaN (as FP32, and as a pair of FP16) that arithmetic never makes: it makes 0x7fffffff and 0x7fff.
inline constexpr std::uint32_t kEmpty = 0xffffffffU;

__device__ __forceinline__ uint4 as_words(const float* v) {
  return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                    __float_as_uint(v[3]));
}

// Powers of two that bring the partial sums of a matrix into FP16's range, and back. Rounded by 2^-11 of
// themselves at most, an eighth of what bf16 output rounds away; sums below 2^-14 up lose 2^-25 up at most.
struct HalfScale {
  float down = 1.0F, up = 1.0F;
};
// No partial sum exceeds K * 448^2; FP16 holds 65504.
inline HalfScale half_scale(std::uint64_t padded_cols) {
  const double largest = static_cast<double>(padded_cols) * 448.0 * 448.0 / 65504.0;
  const int exponent = std::max(0, static_cast<int>(std::ceil(std::log2(largest))));
  return {std::ldexp(1.0F, -exponent), std::ldexp(1.0F, exponent)};
}
// Eight accumulators (two blocks of 16 rows x 8 tokens) as scaled FP16; and added to others.
__device__ __forceinline__ uint4 pack_halves(const float* v, HalfScale scale) {
  std::uint32_t w[4];
#pragma unroll
  for (std::uint32_t j = 0; j < 4; ++j) {
    const __half2 h = __floats2half2_rn(v[2 * j] * scale.down, v[2 * j + 1] * scale.down);
    w[j] = *reinterpret_cast<const std::uint32_t*>(&h);
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}
__device__ __forceinline__ void add_halves(uint4 packed, HalfScale scale, float* v) {
  const std::uint32_t w[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (std::uint32_t j = 0; j < 4; ++j) {
    const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&w[j]));
    v[2 * j] = __fmaf_rn(f.x, scale.up, v[2 * j]);
    v[2 * j + 1] = __fmaf_rn(f.y, scale.up, v[2 * j + 1]);
  }
}

// Codes of NaN operands could still carry all ones through; any other NaN will do.
__device__ __forceinline__ uint4 not_empty(uint4 v) {
  if (v.x == kEmpty) v.x = 0x7fffffffU;
  if (v.y == kEmpty) v.y = 0x7fffffffU;
  if (v.z == kEmpty) v.z = 0x7fffffffU;
  if (v.w == kEmpty) v.w = 0x7fffffffU;
  return v;
}
__device__ __forceinline__ void publish(uint4* slot, uint4 v) {
  v = not_empty(v);
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

// The exchange of one shared block between its workers. A block's sums are `pieces` pieces of 128 words (a
// thread's part is one word of each); piece i is summed and stored by the worker that has i mod workers left
// over.
struct Exchange {
  std::uint32_t workers, me;  // how many share the block, and which of them this is
  std::uint32_t mine;  // this worker's first piece, of a group of threads whose pieces begin at `offset`

  // thread_base: this thread's word in worker 0's place; `place`: words of one worker's place.
  __device__ __forceinline__ Exchange(const SplitPlan& plan, std::uint32_t block, std::uint32_t worker,
                                      std::uint32_t offset, uint4* thread_base, std::uint32_t place)
      : workers(plan.workers_of(block)), me(worker - plan.first_worker(block)), place_(place) {
    mine = (me + workers - offset % workers) % workers;
    base_ = thread_base + static_cast<std::uint64_t>(plan.first_worker(block)) * place;
  }
  // Word offsets of a worker's place, and of a piece in it: less to keep than pointers.
  __device__ __forceinline__ std::uint32_t offset(std::uint32_t worker, std::uint32_t piece) const {
    return worker * place_ + 128 * piece;
  }
  __device__ __forceinline__ uint4* at(std::uint32_t offset) const { return base_ + offset; }

 private:
  uint4* base_;
  std::uint32_t place_;
};

// Takes every worker's part of this worker's pieces, mine + i * workers with i < count, and empties it:
// take(v, last, i) in the order of workers, `last` with the last worker's. kept(i): this worker's own part
// where `keeps`, else that is in the workspace too. Eight loads are in flight at once, of several pieces
// where few workers share a block.
template <class Kept, class Take>
__device__ __forceinline__ void collect(const Exchange& exchange, std::uint32_t count, bool keeps, Kept kept,
                                        Take take) {
  constexpr std::uint32_t kFlight = 8;
  std::uint32_t c = 0, i = 0;  // next to load: worker, piece
  std::uint32_t taken_c = 0, taken_i = 0;
#pragma unroll 1
  for (std::uint32_t left = exchange.workers * count; left != 0;) {
    const std::uint32_t now = min(left, kFlight);
    constexpr std::uint32_t kNone = 0xffffffffU;
    std::uint32_t slot[kFlight];
    uint4 v[kFlight];
#pragma unroll
    for (std::uint32_t f = 0; f < kFlight; ++f) {
      slot[f] = kNone;
      v[f] = make_uint4(0, 0, 0, 0);
      if (f < now) {
        if (keeps && c == exchange.me) {
          v[f] = kept(i);
        } else {
          slot[f] = exchange.offset(c, exchange.mine + i * exchange.workers);
          v[f].x = kEmpty;
        }
        const bool wraps = c + 1 == exchange.workers;
        c = wraps ? 0 : c + 1;
        i += static_cast<std::uint32_t>(wraps);
      }
    }
    bool full = false;
    while (!full) {
      full = true;
#pragma unroll
      for (std::uint32_t f = 0; f < kFlight;
           ++f)  // only what has not come yet: polling takes bandwidth from it
        if (!is_full(v[f])) v[f] = peek(exchange.at(slot[f]));
#pragma unroll
      for (std::uint32_t f = 0; f < kFlight; ++f) full = full && is_full(v[f]);
    }
#pragma unroll
    for (std::uint32_t f = 0; f < kFlight; ++f) {
      if (f >= now) continue;
      if (slot[f] != kNone) *exchange.at(slot[f]) = make_uint4(kEmpty, kEmpty, kEmpty, kEmpty);
      const bool last = taken_c + 1 == exchange.workers;
      take(v[f], last, taken_i);
      taken_c = last ? 0 : taken_c + 1;
      taken_i += static_cast<std::uint32_t>(last);
    }
    left -= now;
  }
}

}  // namespace fireq::kernels
