// The warpgroup multiply-accumulate of FP8 (E4M3) with A, the weights, in registers and B, the tokens, in
// shared memory: D[64, n] += A[64, 32] * B[n, 32]^T, FP32 accumulators. Warp w, lane l, g = l / 4, t = l % 4,
// lowest byte lowest k:
//   a[0] = row 16w + g,     k = 4t .. 4t+3        a[2] = the same row, k + 16
//   a[1] = row 16w + g + 8, k = 4t .. 4t+3        a[3] = that row, k + 16
//   d[4j + 2i + c] = row 16w + g + 8i, column 8j + 2t + c
// B: rows of 128 bytes, 16-byte chunk c of row r at chunk c ^ (r & 7), 1024-byte aligned (the tensor copy's
// 128-byte swizzle). The multiply always accumulates; callers clear the accumulators.
#pragma once

#include <cstdint>

namespace fireq::kernels {

// A register of an asynchronous multiply may be rewritten, and an accumulator read, only after wgmma_wait
// covers it.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from sinking the computation of a register below wgmma_fence, which would serialise the
// multiplies.
__device__ __forceinline__ void pin(std::uint32_t (&a)[4]) {
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Shared-memory matrix descriptor: K-major, 128-byte swizzle, 8-row groups 1024 bytes apart. A k32 step adds
// 2, a byte offset adds offset / 16.
__device__ __forceinline__ std::uint64_t wgmma_descriptor(std::uint32_t smem_address) {
  return static_cast<std::uint64_t>(((smem_address & 0x3ffffU) >> 4U) | (1U << 16U)) |
         (static_cast<std::uint64_t>(64U | (1U << 30U)) << 32U);
}

template <int kTokens>
struct Wgmma;

// The instruction names each accumulator: lists of ten operands, FIREQ_P10(3) for %30 to %39 and
// FIREQ_D10(3) for d[30] to d[39], FIREQ_P10() and FIREQ_D10() for the first ten.
#define FIREQ_P2(t) "%" #t "0, %" #t "1"
#define FIREQ_P4(t) FIREQ_P2(t) ", %" #t "2, %" #t "3"
#define FIREQ_P6(t) FIREQ_P4(t) ", %" #t "4, %" #t "5"
#define FIREQ_P8(t) FIREQ_P6(t) ", %" #t "6, %" #t "7"
#define FIREQ_P10(t) FIREQ_P8(t) ", %" #t "8, %" #t "9"
#define FIREQ_D2(t) "+f"(d[t##0]), "+f"(d[t##1])
#define FIREQ_D4(t) FIREQ_D2(t), "+f"(d[t##2]), "+f"(d[t##3])
#define FIREQ_D6(t) FIREQ_D4(t), "+f"(d[t##4]), "+f"(d[t##5])
#define FIREQ_D8(t) FIREQ_D6(t), "+f"(d[t##6]), "+f"(d[t##7])
#define FIREQ_D10(t) FIREQ_D8(t), "+f"(d[t##8]), "+f"(d[t##9])
// All before a list's last, shorter line.
#define FIREQ_P30 FIREQ_P10() ", " FIREQ_P10(1) ", " FIREQ_P10(2) ", "
#define FIREQ_P60 FIREQ_P30 FIREQ_P10(3) ", " FIREQ_P10(4) ", " FIREQ_P10(5) ", "
#define FIREQ_P90 FIREQ_P60 FIREQ_P10(6) ", " FIREQ_P10(7) ", " FIREQ_P10(8) ", "
#define FIREQ_P120 FIREQ_P90 FIREQ_P10(9) ", " FIREQ_P10(10) ", " FIREQ_P10(11) ", "
#define FIREQ_D30 FIREQ_D10(), FIREQ_D10(1), FIREQ_D10(2)
#define FIREQ_D60 FIREQ_D30, FIREQ_D10(3), FIREQ_D10(4), FIREQ_D10(5)
#define FIREQ_D90 FIREQ_D60, FIREQ_D10(6), FIREQ_D10(7), FIREQ_D10(8)
#define FIREQ_D120 FIREQ_D90, FIREQ_D10(9), FIREQ_D10(10), FIREQ_D10(11)

// kTokens columns: kTokens / 2 accumulators, their operands' names, the names of the four A registers and of
// the descriptor that follow, and the accumulators as operands.
#define FIREQ_WGMMA(kTokens, names, a_names, ...)                                                         \
  template <>                                                                                             \
  struct Wgmma<kTokens> {                                                                                 \
    static __device__ __forceinline__ void multiply(float (&d)[kTokens / 2], const std::uint32_t (&a)[4], \
                                                    std::uint64_t b) {                                    \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #kTokens   \
                   "k32.f32.e4m3.e4m3 {" names "}, " a_names ", p, 1, 1;\n}"                              \
                   : __VA_ARGS__                                                                          \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                 \
    }                                                                                                     \
  };

FIREQ_WGMMA(8, FIREQ_P4(), "{%4, %5, %6, %7}, %8", FIREQ_D4())
FIREQ_WGMMA(16, FIREQ_P8(), "{%8, %9, %10, %11}, %12", FIREQ_D8())
FIREQ_WGMMA(32, FIREQ_P10() ", " FIREQ_P6(1), "{%16, %17, %18, %19}, %20", FIREQ_D10(), FIREQ_D6(1))
FIREQ_WGMMA(64, FIREQ_P30 FIREQ_P2(3), "{%32, %33, %34, %35}, %36", FIREQ_D30, FIREQ_D2(3))
FIREQ_WGMMA(128, FIREQ_P60 FIREQ_P4(6), "{%64, %65, %66, %67}, %68", FIREQ_D60, FIREQ_D4(6))
FIREQ_WGMMA(160, FIREQ_P60 FIREQ_P10(6) ", " FIREQ_P10(7), "{%80, %81, %82, %83}, %84", FIREQ_D60,
            FIREQ_D10(6), FIREQ_D10(7))
FIREQ_WGMMA(192, FIREQ_P90 FIREQ_P6(9), "{%96, %97, %98, %99}, %100", FIREQ_D90, FIREQ_D6(9))
FIREQ_WGMMA(224, FIREQ_P90 FIREQ_P10(9) ", " FIREQ_P10(10) ", " FIREQ_P2(11),
            "{%112, %113, %114, %115}, %116", FIREQ_D90, FIREQ_D10(9), FIREQ_D10(10), FIREQ_D2(11))
FIREQ_WGMMA(256, FIREQ_P120 FIREQ_P8(12), "{%128, %129, %130, %131}, %132", FIREQ_D120, FIREQ_D8(12))

#undef FIREQ_WGMMA
#undef FIREQ_P2
#undef FIREQ_P4
#undef FIREQ_P6
#undef FIREQ_P8
#undef FIREQ_P10
#undef FIREQ_P30
#undef FIREQ_P60
#undef FIREQ_P90
#undef FIREQ_P120
#undef FIREQ_D2
#undef FIREQ_D4
#undef FIREQ_D6
#undef FIREQ_D8
#undef FIREQ_D10
#undef FIREQ_D30
#undef FIREQ_D60
#undef FIREQ_D90
#undef FIREQ_D120

}  // namespace fireq::kernels
