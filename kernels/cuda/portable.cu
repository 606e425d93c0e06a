// The simple GEMM: any layout, any shape, any GPU from sm_80 on. FP32 multiply-adds of the same operands, in
// order of k. A CTA makes 64 output channels x 32 tokens, a step covers 64 of K: operands go through shared
// memory as floats.
#include <algorithm>

#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/expand.cuh"
#include "kernels/cuda/kernels.hpp"
#include "kernels/cuda/runtime.hpp"
#include "kernels/weight_access.hpp"

namespace fireq::kernels {

namespace {

constexpr std::uint32_t kRows = 64, kTokens = 32, kStep = 64, kThreads = 256;

struct PortableParams {
  WeightRef w;
  TokensRef x;
  OutputParams output;
  LevelsParam levels;
  std::uint8_t* dump;
};

__device__ float decode_e4m3(std::uint8_t byte) {
  if ((byte & 0x7fU) == 0x7fU) return __uint_as_float(0x7fffffffU);
  const float v = decode_e4m3_positive(byte & 0x7fU);
  return byte & 0x80U ? -v : v;
}

__global__ void __launch_bounds__(kThreads) portable_kernel(const __grid_constant__ PortableParams p) {
  __shared__ uint2 table[128];
  __shared__ float w8[kStep][kRows + 1];
  __shared__ float x8[kStep][kTokens + 1];
#if __CUDA_ARCH__ >= 900
  ptx::wait_for_previous_kernel();
#endif
  build_table(table, p.levels, threadIdx.x, kThreads);
  const std::uint64_t first_row = static_cast<std::uint64_t>(blockIdx.x) * kRows;
  const std::uint64_t first_token = static_cast<std::uint64_t>(blockIdx.y) * kTokens;
  const std::uint64_t padded = (p.w.cols + kGroup - 1) / kGroup * kGroup;
  const std::uint32_t row = threadIdx.x % kRows;   // this thread's output row
  const std::uint32_t part = threadIdx.x / kRows;  // and its tokens part, part + 4, ...
  float acc[kTokens / 4] = {};
  for (std::uint64_t k0 = 0; k0 < padded; k0 += kStep) {
    __syncthreads();
    for (std::uint32_t i = threadIdx.x; i < kRows * kStep / 4; i += kThreads) {
      const std::uint32_t r = i / (kStep / 4);
      const std::uint32_t k = i % (kStep / 4) * 4;
      const std::uint64_t n = first_row + r;
      std::uint32_t quad = 0;
      uint2 entry = make_uint2(0, 0);
      if (n < p.w.rows) {
        quad = load_quad(p.w, n, k0 + k);
        entry = table[load_scale(p.w, n, (k0 + k) / kGroup) & 0x7fU];
      }
      std::uint32_t bytes = 0;
      for (std::uint32_t j = 0; j < 4; ++j) {
        const std::uint32_t code = quad >> (4 * j) & 15U;
        const std::uint32_t magnitude = (code & 4U ? entry.y : entry.x) >> (8 * (code & 3U)) & 0xffU;
        const std::uint32_t byte = magnitude | (code & 8U) << 4U;
        bytes |= byte << (8 * j);
        w8[k + j][r] = decode_e4m3(static_cast<std::uint8_t>(byte));
      }
      if (p.dump != nullptr && blockIdx.y == 0 && n < p.w.rows)
        *reinterpret_cast<std::uint32_t*>(p.dump + n * padded + k0 + k) = bytes;
    }
    for (std::uint32_t i = threadIdx.x; i < kTokens * kStep; i += kThreads) {
      const std::uint64_t m = first_token + i / kStep;
      const std::uint64_t k = k0 + i % kStep;
      const bool in = m < p.x.tokens && k < p.w.cols;
      x8[i % kStep][i / kStep] = in ? decode_e4m3(p.x.x8[m * p.x.pitch + k]) : 0.0F;
    }
    __syncthreads();
    for (std::uint32_t k = 0; k < kStep; ++k) {
      const float w = w8[k][row];
#pragma unroll
      for (std::uint32_t j = 0; j < kTokens / 4; ++j) acc[j] = __fmaf_rn(x8[k][part + 4 * j], w, acc[j]);
    }
  }
  const std::uint64_t n = first_row + row;
  if (n >= p.w.rows || p.dump != nullptr) return;
  const float r = p.output.row_scale[n * p.output.row_scale_step];
  for (std::uint32_t j = 0; j < kTokens / 4; ++j) {
    const std::uint64_t m = first_token + part + 4 * j;
    if (m >= p.x.tokens) continue;
    float y = __fmul_rn(__fmul_rn(p.x.scale[m], r), acc[j]);
    if (p.output.bias != nullptr) y += p.output.bias[n];
    if (p.output.residual != nullptr) y += bf16_to_float(p.output.residual[m * p.output.residual_pitch + n]);
    p.output.out[m * p.output.out_pitch + n] = static_cast<std::uint16_t>(ptx::pack_bf16(y, 0.0F));
  }
}

}  // namespace

void launch_portable(const GemmProblem& problem, const GemmOptions& options) {
  PortableParams p{problem.w, problem.x, {}, {}, problem.dump};
  p.output = {problem.w.row_scales,
              problem.w.per_tensor ? 0U : 1U,
              problem.epilogue.bias,
              problem.epilogue.residual,
              problem.epilogue.residual_pitch,
              problem.y.data,
              problem.y.pitch,
              static_cast<std::uint32_t>(problem.x.tokens),
              static_cast<std::uint32_t>(problem.w.rows)};
  std::copy(problem.w.levels.begin(), problem.w.levels.end(), p.levels.magnitude);
  const std::uint64_t row_blocks = (problem.w.rows + kRows - 1) / kRows;
  const std::uint64_t token_blocks = problem.dump != nullptr ? 1 : (problem.x.tokens + kTokens - 1) / kTokens;
  // Grid y is limited to 65535 blocks: 2 million tokens, checked with the operands.
  LaunchShape shape{
      static_cast<std::uint32_t>(row_blocks), kThreads, 0, 1, options.programmatic, options.stream};
  shape.blocks_y = static_cast<std::uint32_t>(token_blocks);
  launch(portable_kernel, shape, "portable kernel", p);
}

}  // namespace fireq::kernels
