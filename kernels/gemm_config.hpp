// Which kernel runs a GEMM, and with which tile: a small struct, chosen on the host from shapes and the
// device alone.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/split_plan.hpp"
#include "kernels/types.hpp"

namespace fireq::kernels {

struct DeviceInfo {
  int compute_capability = 0;  // 90 for sm_90
  std::uint32_t multiprocessors = 0;
  std::string name;
  // Clusters of four and of eight CTAs, a multiprocessor each, that run at once: fewer than the number of
  // multiprocessors says, for a cluster stays within a processing cluster of the GPU. 0: none.
  std::uint32_t clusters_of_4 = 0;
  std::uint32_t clusters_of_8 = 0;
};
DeviceInfo current_device();  // Error(environment) without one
int device_count() noexcept;  // 0 in a build without CUDA

enum class Route : std::uint8_t {
  portable,  // any sm_80 and later, either layout
  decode,    // sm_90a, sm90 layout, up to kMostDecodeTokens tokens
  prefill,   // sm_90a, sm90 layout
  cublas     // dequantised to FP8 scratch, then cuBLASLt
};

struct GemmConfig {
  Route route = Route::portable;
  std::uint32_t token_tile = 0;  // columns of the multiply: decode 8, 16, 32, 64; prefill 128 to 256
  // CTAs of a cluster. Prefill: two row tiles that share a token tile, times one, two or four parts of K.
  // Decode: the parts of K of one row tile.
  std::uint32_t cluster = 1;
  std::uint32_t per_sm =
      1;  // decode: CTAs a multiprocessor; two hide latency, one leaves room for the next kernel
  // Blocks that do not fill a round of workers are cut along K. false: prefill rounds that do not fill;
  // decode CTAs with a block each, in a grid as large as it takes.
  bool split_k = true;
  // Decode: rows of a CTA. 128: 64 a warpgroup; 64: the two warpgroups have the same rows and half of K each.
  std::uint32_t row_tile = 128;
  bool operator==(const GemmConfig&) const = default;
};

std::string to_string(Route route);
std::string to_string(const GemmConfig& config);  // "decode n16 c1"

// The configurations worth trying for M tokens with this layout on this device.
std::vector<GemmConfig> gemm_configs(const DeviceInfo& device, WeightLayout layout, std::uint64_t tokens);

struct GemmChoice {
  GemmConfig config;
  std::string reason;  // for --explain
};
GemmChoice choose_gemm(const DeviceInfo& device, WeightLayout layout, std::uint64_t tokens,
                       std::uint64_t rows, std::uint64_t cols);

// Decode kernels for 64 tokens whose blocks are a cluster's take more in tiles of the same size, up to this.
constexpr std::uint64_t kMostDecodeTokens = 256;
constexpr std::uint32_t decode_token_tiles(std::uint64_t tokens) {
  return static_cast<std::uint32_t>((tokens + 63) / 64);
}
// K groups a pipeline stage of the decode kernel holds.
constexpr std::uint32_t decode_groups_per_unit(std::uint32_t token_tile) {
  return token_tile <= 16 ? 2 : 1;
}
// Most parts of K that a cluster's CTAs of the decode kernel can take: 1, 2, 4 ... up to this.
constexpr std::uint32_t decode_most_shares(std::uint32_t token_tile) {
  return token_tile >= 64 ? 8 : 4;
}
// FP8 accumulators of the decode kernel are added to FP32 sums every so much of K.
constexpr std::uint32_t kPromoteK = 2048;
// Most parts of K that a cluster's CTAs take in kernels with a row tile of 64: no room for more.
constexpr std::uint32_t kMostHalfShares = 4;
// Decode kernels whose clusters, or CTAs, have one block each.
constexpr bool one_block_a_cluster(const GemmConfig& config) {
  return config.cluster > 1 || !config.split_k || config.row_tile == 64;
}
SplitPlan decode_plan(std::uint64_t rows, std::uint64_t cols, const GemmConfig& config,
                      std::uint32_t multiprocessors);
SplitPlan prefill_plan(std::uint64_t rows, std::uint64_t cols, std::uint64_t tokens, const GemmConfig& config,
                       std::uint32_t multiprocessors);

}  // namespace fireq::kernels
