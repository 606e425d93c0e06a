// Partial sums that CTAs of one launch exchange through global memory (in fact the L2). Every word of the
// workspace is kEmpty between launches: a reader polls the data itself and puts kEmpty back, so there are no
// counters and no fences, and sums are made in a fixed order: the same bits every time.
#pragma once

#include <cstdint>

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

// Waits for the first `count` slots (all of them where count is larger), takes their values and empties them.
template <std::uint32_t kSlots>
__device__ __forceinline__ void collect(uint4* const (&slot)[kSlots], std::uint32_t count,
                                        uint4 (&v)[kSlots]) {
  bool full = false;
  while (!full) {
    full = true;
#pragma unroll
    for (std::uint32_t i = 0; i < kSlots; ++i)
      if (i < count) v[i] = peek(slot[i]);
#pragma unroll
    for (std::uint32_t i = 0; i < kSlots; ++i)
      if (i < count) full = full && is_full(v[i]);
  }
#pragma unroll
  for (std::uint32_t i = 0; i < kSlots; ++i)
    if (i < count) *slot[i] = make_uint4(kEmpty, kEmpty, kEmpty, kEmpty);
}

}  // namespace fireq::kernels
