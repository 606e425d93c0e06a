// Prepack, unpack, dequantise: one thread a 32-bit word; memory-bound and run once per checkpoint
// (dequantise: per launch of the cuBLASLt route).
#include <algorithm>

#include "kernels/cuda/expand.cuh"
#include "kernels/cuda/runtime.hpp"
#include "kernels/weight_access.hpp"
#include "kernels/weights.hpp"

namespace fireq::kernels {

namespace {

constexpr std::uint32_t kThreads = 256;

std::uint32_t grid_for(std::uint64_t threads) {
  return static_cast<std::uint32_t>(std::min<std::uint64_t>((threads + kThreads - 1) / kThreads, 65536));
}

// Thread i of [row_tiles * groups * 2080]: a word of codes or four scales of one tile.
__global__ void prepack_kernel(const __grid_constant__ WeightRef w, std::uint8_t* tiles,
                               std::uint64_t words) {
  const std::uint64_t groups = (w.cols + kGroup - 1) / kGroup;
  const std::uint64_t step = static_cast<std::uint64_t>(gridDim.x) * kThreads;
  for (std::uint64_t i = static_cast<std::uint64_t>(blockIdx.x) * kThreads + threadIdx.x; i < words;
       i += step) {
    const std::uint64_t tile = i / (kTileBytes / 4);
    const std::uint32_t offset = static_cast<std::uint32_t>(i % (kTileBytes / 4)) * 4;
    const std::uint32_t half = offset / kHalfBytes;
    const std::uint32_t within = offset % kHalfBytes;
    const std::uint64_t base_row = tile / groups * kTileRows + half * kHalfRows;
    const std::uint64_t group = tile % groups;
    std::uint32_t word = 0;
    if (within < kHalfCodeBytes) {
      const std::uint32_t thread = within % 2048 / 16;
      const std::uint32_t q = within / 2048 * 4 + within % 16 / 4;
      const std::uint64_t n = base_row + thread / 32 * 16 + thread % 32 / 4 + q % 2 * 8;
      const std::uint64_t k = group * kGroup + q / 2 * 32 + thread % 4 * 4;
      if (n < w.rows) word = join_quads(load_quad(w, n, k), load_quad(w, n, k + 16));
    } else {
      for (std::uint32_t j = 0; j < 4; ++j) {
        const std::uint32_t s = within - kHalfCodeBytes + j;  // 2 (8w + g) + h
        const std::uint64_t n = base_row + s / 16 * 16 + s % 16 / 2 + s % 2 * 8;
        const std::uint32_t scale = n < w.rows ? load_scale(w, n, group) : 1U;
        word |= scale << (8 * j);
      }
    }
    *reinterpret_cast<std::uint32_t*>(tiles + i * 4) = word;
  }
}

// Thread i of [N * Kp / 8]: eight codes of a row.
__global__ void unpack_kernel(const __grid_constant__ WeightRef w, std::uint8_t* codes, std::uint8_t* scales,
                              std::uint64_t words) {
  const std::uint64_t groups = (w.cols + kGroup - 1) / kGroup;
  const std::uint64_t step = static_cast<std::uint64_t>(gridDim.x) * kThreads;
  for (std::uint64_t i = static_cast<std::uint64_t>(blockIdx.x) * kThreads + threadIdx.x; i < words;
       i += step) {
    const std::uint64_t n = i / (groups * 16);
    const std::uint64_t k = i % (groups * 16) * 8;
    *reinterpret_cast<std::uint32_t*>(codes + i * 4) = load_quad(w, n, k) | load_quad(w, n, k + 4) << 16U;
    if (k % kGroup == 0) scales[n * groups + k / kGroup] = load_scale(w, n, k / kGroup);
  }
}

// Thread i of [N * Kp / 4]: four operands of a row.
__global__ void dequantize_kernel(const __grid_constant__ WeightRef w,
                                  const __grid_constant__ LevelsParam levels, std::uint8_t* out8,
                                  std::uint64_t words) {
  __shared__ uint2 table[128];
  build_table(table, levels, threadIdx.x, kThreads);
  __syncthreads();
  const std::uint64_t groups = (w.cols + kGroup - 1) / kGroup;
  const std::uint64_t step = static_cast<std::uint64_t>(gridDim.x) * kThreads;
  for (std::uint64_t i = static_cast<std::uint64_t>(blockIdx.x) * kThreads + threadIdx.x; i < words;
       i += step) {
    const std::uint64_t n = i / (groups * 32);
    const std::uint64_t k = i % (groups * 32) * 4;
    const std::uint32_t quad = load_quad(w, n, k);
    const uint2 entry = table[load_scale(w, n, k / kGroup) & 0x7fU];
    std::uint32_t bytes = ptx::permute_bytes(entry.x, entry.y, quad & 0x7777U);
    for (std::uint32_t j = 0; j < 4; ++j) bytes |= (quad >> (4 * j + 3) & 1U) << (8 * j + 7);
    *reinterpret_cast<std::uint32_t*>(out8 + i * 4) = bytes;
  }
}

void require_layout(const WeightRef& w, WeightLayout layout, const char* what) {
  if (w.layout != layout)
    throw Error(ErrorKind::usage, std::string(what) + " takes weights in the other layout");
  if (w.rows == 0 || w.cols == 0) throw Error(ErrorKind::usage, std::string(what) + ": empty weight");
}

}  // namespace

void prepack_sm90(const WeightRef& w, std::uint8_t* tiles, Stream stream) {
  require_layout(w, WeightLayout::row, "prepack_sm90");
  const std::uint64_t words = w.tile_bytes() / 4;
  launch(prepack_kernel, {grid_for(words), kThreads, 0, 1, false, stream}, "prepack kernel", w, tiles, words);
}

void unpack_sm90(const WeightRef& w, std::uint8_t* codes, std::uint8_t* group_scales, Stream stream) {
  require_layout(w, WeightLayout::sm90, "unpack_sm90");
  const std::uint64_t words = w.rows * w.groups() * 16;
  launch(unpack_kernel, {grid_for(words), kThreads, 0, 1, false, stream}, "unpack kernel", w, codes,
         group_scales, words);
}

void dequantize_to_fp8(const WeightRef& w, std::uint8_t* out8, Stream stream) {
  require_layout(w, w.layout, "dequantize_to_fp8");
  LevelsParam levels{};
  std::copy(w.levels.begin(), w.levels.end(), levels.magnitude);
  const std::uint64_t words = w.rows * w.groups() * 32;
  launch(dequantize_kernel, {grid_for(words), kThreads, 0, 1, false, stream}, "dequantize kernel", w, levels,
         out8, words);
}

namespace {
__global__ void empty_kernel() {}
}  // namespace

std::uint32_t resident_clusters(std::uint32_t ctas) {
  constexpr int kBytes = 160 << 10U;  // no room for a second CTA
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(empty_kernel),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
             "cluster query");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {ctas, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = kBytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&clusters, reinterpret_cast<const void*>(empty_kernel), &config),
             "cluster query");
  return static_cast<std::uint32_t>(clusters);
}

}  // namespace fireq::kernels
