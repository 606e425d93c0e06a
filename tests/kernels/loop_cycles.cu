// How long the inner loop of the Hopper kernels takes by itself, in cycles a stage of 128 x 128 weights on a
// multiprocessor: multiplies and expansion alone and together, and with rings of barriers whose positions are
// computed or known when compiled. Nothing is copied: the producer only arrives. Prints a table.
// docs/kernels/road.md, version 9, has the figures of its forerunners.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/weight_tile.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace fireq::kernels {
namespace {

constexpr int kMultiprocessors = 132;
constexpr std::uint32_t kUnits = 2000;

void check(cudaError_t e) {
  if (e == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(e));
  std::exit(1);
}

// What a loop does; the codes are loaded a stage ahead in any case but `multiply`.
enum Parts : std::uint32_t { kMultiply = 1, kExpand = 2, kRings = 4 };

// kUnroll: stages of the loop's body; with as many as the ring has their positions are constants.
template <std::uint32_t kTokens, std::uint32_t kParts, std::uint32_t kStages, std::uint32_t kUnroll>
__global__ void __launch_bounds__(320, kTokens > 64 ? 1 : 2)
    loop_kernel(unsigned long long* cycles, float* sink, LevelsParam levels) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  const std::uint32_t base = __shfl_sync(0xffffffffU, ptx::smem_address(shared_bytes), 0);
  const std::uint32_t warp = __shfl_sync(0xffffffffU, threadIdx.x / 32, 0);
  const std::uint32_t lane = ptx::lane_index();
  constexpr std::uint32_t kTokenBytes = kTokens * kGroup;
  const std::uint32_t tokens = base + kTableBytes;
  const std::uint32_t weights = tokens + kStages * kTokenBytes;
  const std::uint32_t full = weights + kStages * kTileBytes;
  const std::uint32_t empty = full + 8 * kStages;
  build_table(reinterpret_cast<uint2*>(shared_bytes), levels, threadIdx.x, 320);
  for (std::uint32_t i = threadIdx.x; i < kStages * kTileBytes / 4; i += 320)
    reinterpret_cast<std::uint32_t*>(shared_bytes + kTableBytes + kStages * kTokenBytes)[i] = i * 2654435761U;
  if (threadIdx.x == 0) {
    for (std::uint32_t i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full + 8 * i, 1);
      ptx::mbarrier_init(empty + 8 * i, 8);
    }
  }
  __syncthreads();
  if (warp >= 8) {
    RingPosition<kStages> ring;
    for (std::uint32_t u = 0; warp == 8 && (kParts & kRings) != 0 && u < kUnits; ++u) {
      ptx::mbarrier_wait(empty + 8 * ring.index, ring.parity ^ 1U);
      ptx::mbarrier_arrive_if(full + 8 * ring.index, lane == 0);
      __syncwarp();
      ring.advance();
    }
    return;
  }
  const std::uint32_t half = weights + warp / 4 * kHalfBytes;
  float acc[kTokens / 2] = {};
  std::uint32_t a[4][4] = {};
  WeightFragment codes;
  RingPosition<kStages> next;
  if ((kParts & kRings) != 0) ptx::mbarrier_wait(full, 0);
  codes.load(half, base, warp % 4, lane);
  next.advance();
  std::uint32_t stage = 0;
  pin(acc);
  const long long start = clock64();
#pragma unroll kUnroll
  for (std::uint32_t u = 0; u + 1 < kUnits; ++u) {
    if ((kParts & kRings) != 0) ptx::mbarrier_wait(full + 8 * next.index, next.parity);
    const std::uint64_t descriptor = wgmma_descriptor(tokens + stage * kTokenBytes);
    const std::uint32_t from = half + next.index * kTileBytes;
    std::uint32_t sigma = 0;
#pragma unroll
    for (std::uint32_t s = 0; s < 4; ++s) {
      if ((kParts & kMultiply) != 0) wgmma_wait<3>();
      if ((kParts & kExpand) != 0) {
        codes.expand(s, a[s]);
        pin(a[s]);
        if (s == 1) sigma = codes.load_first(from, warp % 4, lane);
        if (s == 3) codes.load_second(from, base, sigma, warp % 4, lane);
      }
      if ((kParts & kRings) != 0 && s == 3 && u != 0) {
        const std::uint32_t before = stage == 0 ? kStages - 1 : stage - 1;
        ptx::mbarrier_arrive_if(empty + 8 * before, lane == 0);
      }
      if ((kParts & kMultiply) != 0) {
        wgmma_fence();
        Wgmma<kTokens>::multiply(acc, a[s], descriptor + 2 * s);
        wgmma_commit();
      }
    }
    stage = next.index;
    next.advance();
  }
  if ((kParts & kMultiply) != 0) wgmma_wait<0>();
  pin(acc);
  const long long end = clock64();
  float sum = 0;
  for (const float v : acc) sum += v;
  for (const auto& words : a)
    for (const std::uint32_t w : words) sum += static_cast<float>(w);
  if (sum == 12345.678F) *sink = sum;  // so that nothing is left out
  if (threadIdx.x == 0) cycles[blockIdx.x] = static_cast<unsigned long long>(end - start);
}

template <std::uint32_t kTokens, std::uint32_t kParts, std::uint32_t kStages, std::uint32_t kUnroll = 1>
void time(const char* what, int ctas) {
  const auto kernel = loop_kernel<kTokens, kParts, kStages, kUnroll>;
  const std::size_t bytes = kTableBytes + kStages * (kTokens * kGroup + kTileBytes + 16);
  LevelsParam levels{};
  for (int i = 0; i < 8; ++i) levels.magnitude[i] = 0.1F * static_cast<float>(i);
  unsigned long long* cycles = nullptr;
  float* sink = nullptr;
  const std::size_t blocks = static_cast<std::size_t>(kMultiprocessors) * static_cast<std::size_t>(ctas);
  check(cudaMalloc(&cycles, blocks * sizeof(*cycles)));
  check(cudaMalloc(&sink, sizeof(*sink)));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  for (int i = 0; i < 2; ++i) kernel<<<static_cast<unsigned>(blocks), 320, bytes>>>(cycles, sink, levels);
  check(cudaDeviceSynchronize());
  std::vector<unsigned long long> all(blocks);
  check(cudaMemcpy(all.data(), cycles, blocks * sizeof(*cycles), cudaMemcpyDeviceToHost));
  check(cudaFree(cycles));
  check(cudaFree(sink));
  std::nth_element(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(blocks / 2), all.end());
  std::printf("n%-4u %-28s CTAs a multiprocessor %d: %7.1f cycles a stage (tensor cores' own %u)\n", kTokens,
              what, ctas, static_cast<double>(all[blocks / 2]) / kUnits / ctas, 4 * kTokens);
}

template <std::uint32_t kTokens, std::uint32_t kStages>
void table() {
  for (int ctas = 1; ctas <= (kTokens > 64 ? 1 : 2); ++ctas) {
    time<kTokens, kMultiply, kStages>("multiply", ctas);
    time<kTokens, kExpand, kStages>("expand", ctas);
    time<kTokens, kMultiply | kExpand, kStages>("both", ctas);
    time<kTokens, kMultiply | kExpand | kRings, kStages>("with a ring", ctas);
    time<kTokens, kMultiply | kExpand | kRings, kStages, kStages>("with a ring, unrolled", ctas);
  }
}

}  // namespace
}  // namespace fireq::kernels

int main() {
  using namespace fireq::kernels;
  table<8, 8>();
  table<32, 6>();
  table<64, 4>();
  table<128, 8>();
  return 0;
}
