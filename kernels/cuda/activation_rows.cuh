// What a row of activations goes through on its way to FP8, in registers as 16-byte vectors of bf16
// (activations.cu).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"

namespace fireq::kernels {

inline constexpr std::uint32_t kVector = 8;  // bf16 values a 16-byte load

struct ActivationParams {
  const std::uint16_t* x;
  const std::uint16_t* second;  // up half of gate_up, or the addend
  std::uint16_t* sum;
  const float* weight;
  float epsilon;
  std::uint64_t pitch, second_pitch;
  std::uint32_t cols;
  std::uint8_t* x8;
  std::uint64_t out_pitch;
  float* scale;
  bool vectors;           // 16-byte aligned rows, K a multiple of 8
  std::uint32_t cluster;  // CTAs of a row (row_kernel)
};

enum class Kind : std::uint8_t { plain, norm, add_norm, silu };
template <Kind kKind>
inline constexpr bool kNorm = kKind == Kind::norm || kKind == Kind::add_norm;

__device__ __forceinline__ float low_half(std::uint32_t v) {
  return __uint_as_float(v << 16U);
}
__device__ __forceinline__ float high_half(std::uint32_t v) {
  return __uint_as_float(v & 0xffff0000U);
}

// x / a by IEEE rules, x of 8 significant bits, without range checks: the correctly rounded reciprocal and
// one correction, whose order of signs keeps that of a zero. Compared with division for all 2^30 pairs of
// significands; right for finite a >= 2^-29 wherever the quotient is not below half of FP8's smallest number.
__device__ __forceinline__ float divide(float x, float a, float inverse) {
  const float q = __fmul_rn(x, inverse);
  return __fmaf_rn(-__fmaf_rn(q, a, -x), inverse, q);
}

__device__ __forceinline__ std::uint32_t* words(uint4& v) {
  return reinterpret_cast<std::uint32_t*>(&v);
}

// op's identity is 0.
template <class Op>
__device__ __forceinline__ float reduce_block(float v, Op op, float* scratch) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v = op(v, __shfl_xor_sync(0xffffffffU, v, d));
  const std::uint32_t warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = threadIdx.x % 32 < warps ? scratch[threadIdx.x % 32] : 0.0F;
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v = op(v, __shfl_xor_sync(0xffffffffU, v, d));
  return v;
}

__device__ __forceinline__ std::uint32_t quantize_pair(std::uint32_t pair, float a, float inverse) {
  const float2 q = make_float2(divide(low_half(pair), a, inverse), divide(high_half(pair), a, inverse));
  return __nv_cvt_float2_to_fp8x2(q, __NV_SATFINITE, __NV_E4M3);
}

// The scale of a token with this largest magnitude.
inline constexpr float kSmallestMaximum = 0x1p-20F;
struct TokenScale {
  float a, inverse;
  bool finite;
  __device__ __forceinline__ explicit TokenScale(float largest) {
    a = __fmul_rn(largest, 1.0F / 448.0F);
    inverse = __frcp_rn(a);
    finite = largest < __uint_as_float(0x7f800000U);
  }

  __device__ __forceinline__ uint2 quantize(uint4& values) const {
    const std::uint32_t* v = words(values);
    if (finite)
      return make_uint2(quantize_pair(v[0], a, inverse) | quantize_pair(v[1], a, inverse) << 16U,
                        quantize_pair(v[2], a, inverse) | quantize_pair(v[3], a, inverse) << 16U);
    std::uint32_t w[2] = {0, 0};  // the quotient by infinity: zero, or NaN for infinity itself
#pragma unroll
    for (std::uint32_t j = 0; j < 8; ++j) {
      const std::uint32_t bits = v[j / 2] >> (16 * (j % 2)) & 0xffffU;
      const std::uint32_t byte = (bits & 0x7fffU) >= 0x7f80U ? 0x7fU : bits >> 8U & 0x80U;
      w[j / 4] |= byte << (8 * (j % 4));
    }
    return make_uint2(w[0], w[1]);
  }
};

// The largest magnitudes of the low and of the high halves; NaN counts for nothing.
struct LargestPair {
  __nv_bfloat162 v = __float2bfloat162_rn(kSmallestMaximum);
  __device__ __forceinline__ void meet(uint4& values) {
#pragma unroll
    for (std::uint32_t j = 0; j < 4; ++j)
      v = __hmax2(v, __habs2(*reinterpret_cast<const __nv_bfloat162*>(&words(values)[j])));
  }
  __device__ __forceinline__ float largest() const {
    return fmaxf(__low2float(v), __high2float(v));
  }
};
__device__ __forceinline__ void add_squares(uint4& values, float& squares) {
#pragma unroll
  for (std::uint32_t j = 0; j < 4; ++j) {
    const std::uint32_t h = words(values)[j];
    squares = __fmaf_rn(low_half(h), low_half(h), squares);
    squares = __fmaf_rn(high_half(h), high_half(h), squares);
  }
}
__device__ __forceinline__ float inverse_norm(const ActivationParams& p, float squares) {
  return __frsqrt_rn(__fdiv_rn(squares, static_cast<float>(p.cols)) + p.epsilon);
}
__device__ __forceinline__ void load_weights(const ActivationParams& p, std::uint32_t vector,
                                             float (&weight)[kVector]) {
  const float4* from = reinterpret_cast<const float4*>(p.weight) + 2 * vector;
#pragma unroll
  for (std::uint32_t i = 0; i < 2; ++i) {
    const float4 w = __ldg(from + i);
    weight[4 * i] = w.x;
    weight[4 * i + 1] = w.y;
    weight[4 * i + 2] = w.z;
    weight[4 * i + 3] = w.w;
  }
}
__device__ __forceinline__ void normalize_vector(uint4& values, float inverse,
                                                 const float (&weight)[kVector]) {
#pragma unroll
  for (std::uint32_t j = 0; j < 4; ++j) {
    std::uint32_t& h = words(values)[j];
    h = ptx::pack_bf16(__fmul_rn(__fmul_rn(low_half(h), inverse), weight[2 * j]),
                       __fmul_rn(__fmul_rn(high_half(h), inverse), weight[2 * j + 1]));
  }
}

// The largest of what the CTAs of a row's cluster found: each sends its own to the others, which count the
// bytes at an mbarrier.
struct ClusterMaximum {
  uint4 from[8];
  std::uint64_t received;

  // By all threads, before anything of the kernel before is waited for.
  __device__ __forceinline__ void prepare(std::uint32_t ctas) {
    const std::uint32_t bar = ptx::smem_address(&received);
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(bar, 1);
      ptx::mbarrier_expect(bar, 16 * (ctas - 1));
      ptx::mbarrier_init_fence();
    }
    __syncwarp();
    ptx::cluster_sync();
  }
  __device__ __forceinline__ float exchange(float mine, std::uint32_t ctas) {
    const std::uint32_t rank = ptx::cluster_rank();
    if (threadIdx.x < ctas && threadIdx.x != rank)
      ptx::store_async_16(ptx::in_cluster(ptx::smem_address(from + rank), threadIdx.x),
                          make_uint4(__float_as_uint(mine), 0, 0, 0),
                          ptx::in_cluster(ptx::smem_address(&received), threadIdx.x));
    ptx::mbarrier_wait(ptx::smem_address(&received), 0);
    for (std::uint32_t i = 0; i < ctas; ++i)
      if (i != rank) mine = fmaxf(mine, __uint_as_float(ptx::load_shared_16(ptx::smem_address(from + i)).x));
    return mine;
  }
};

// A row's vectors (of gate and up, or of x and addend) of one thread.
template <Kind kKind, std::uint32_t kVectors>
struct Row {
  uint4 x[kVectors];
  static constexpr bool kSecond = kKind == Kind::silu || kKind == Kind::add_norm;
  uint4 second[kSecond ? kVectors : 1];

  __device__ __forceinline__ void load(const ActivationParams& p, std::uint64_t m, std::uint32_t begin,
                                       std::uint32_t end) {
#pragma unroll
    for (std::uint32_t i = 0; i < kVectors; ++i) {
      const std::uint32_t at = begin + i * blockDim.x + threadIdx.x;
      const bool in = at < end;
      x[i] = make_uint4(0, 0, 0, 0);
      if (in) x[i] = __ldcg(reinterpret_cast<const uint4*>(p.x + m * p.pitch) + at);
      if constexpr (kSecond) {
        second[i] = make_uint4(0, 0, 0, 0);
        if (in) second[i] = __ldcg(reinterpret_cast<const uint4*>(p.second + m * p.second_pitch) + at);
      }
    }
  }
};

}  // namespace fireq::kernels
