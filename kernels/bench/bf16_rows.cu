// RMSNorm and SiLU * up with bf16 results: what a bf16 layer runs around its products. For the FFN bench
// only.
#include "kernels/bench/bf16_rows.hpp"
#include "kernels/cuda/ptx.cuh"

namespace fireq::kernels::bench {

namespace {

__device__ __forceinline__ float low(std::uint32_t v) {
  return __uint_as_float(v << 16U);
}
__device__ __forceinline__ float high(std::uint32_t v) {
  return __uint_as_float(v & 0xffff0000U);
}

__global__ void __launch_bounds__(512)
    norm_kernel(const uint4* x, const float* weight, uint4* out, std::uint32_t vectors, float epsilon) {
  __shared__ float scratch[32];
  const std::uint64_t row = static_cast<std::uint64_t>(blockIdx.x) * vectors;
  const std::uint32_t at = threadIdx.x;
  uint4 v = make_uint4(0, 0, 0, 0);
  if (at < vectors) v = x[row + at];
  std::uint32_t w[4] = {v.x, v.y, v.z, v.w};
  float squares = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) squares += low(w[i]) * low(w[i]) + high(w[i]) * high(w[i]);
  for (int d = 16; d > 0; d /= 2) squares += __shfl_xor_sync(0xffffffffU, squares, d);
  if (at % 32 == 0) scratch[at / 32] = squares;
  __syncthreads();
  squares = 0;
  for (std::uint32_t i = 0; i < blockDim.x / 32; ++i) squares += scratch[i];
  const float inverse = rsqrtf(squares / static_cast<float>(vectors * 8) + epsilon);
  if (at >= vectors) return;
#pragma unroll
  for (std::uint32_t i = 0; i < 4; ++i)
    w[i] = ptx::pack_bf16(low(w[i]) * inverse * __ldg(weight + at * 8 + 2 * i),
                          high(w[i]) * inverse * __ldg(weight + at * 8 + 2 * i + 1));
  out[row + at] = make_uint4(w[0], w[1], w[2], w[3]);
}

__global__ void __launch_bounds__(256) silu_kernel(const uint4* gate_up, uint4* out, std::uint32_t vectors) {
  const std::uint32_t at = blockIdx.x * 256 + threadIdx.x;
  if (at >= vectors) return;
  const std::uint64_t row = blockIdx.y;
  const uint4 g = gate_up[2 * row * vectors + at];
  const uint4 u = gate_up[(2 * row + 1) * vectors + at];
  const std::uint32_t gate[4] = {g.x, g.y, g.z, g.w};
  const std::uint32_t up[4] = {u.x, u.y, u.z, u.w};
  std::uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    w[i] = ptx::pack_bf16(__fdividef(low(gate[i]), 1.0F + __expf(-low(gate[i]))) * low(up[i]),
                          __fdividef(high(gate[i]), 1.0F + __expf(-high(gate[i]))) * high(up[i]));
  out[row * vectors + at] = make_uint4(w[0], w[1], w[2], w[3]);
}

}  // namespace

void rmsnorm_bf16(const std::uint16_t* x, const float* weight, std::uint16_t* out, std::uint32_t tokens,
                  std::uint32_t cols, cudaStream_t stream) {
  const std::uint32_t threads = (cols / 8 + 31) / 32 * 32;
  norm_kernel<<<tokens, threads, 0, stream>>>(reinterpret_cast<const uint4*>(x), weight,
                                              reinterpret_cast<uint4*>(out), cols / 8, 1e-5F);
}

void silu_mul_bf16(const std::uint16_t* gate_up, std::uint16_t* out, std::uint32_t tokens, std::uint32_t cols,
                   cudaStream_t stream) {
  silu_kernel<<<dim3((cols / 8 + 255) / 256, tokens), 256, 0, stream>>>(
      reinterpret_cast<const uint4*>(gate_up), reinterpret_cast<uint4*>(out), cols / 8);
}

}  // namespace fireq::kernels::bench
