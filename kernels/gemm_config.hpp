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
};
DeviceInfo current_device();  // Error(environment) without one
int device_count() noexcept;  // 0 in a build without CUDA

enum class Route : std::uint8_t {
  portable,  // any sm_80 and later, either layout
  decode,    // sm_90a, sm90 layout, up to 64 tokens a launch
  prefill,   // sm_90a, sm90 layout
  cublas     // dequantised to FP8 scratch, then cuBLASLt
};

struct GemmConfig {
  Route route = Route::portable;
  std::uint32_t token_tile = 0;  // columns of the multiply: decode 8, 16, 32, 64; prefill 64, 128, 256
  // CTAs of a cluster. Prefill: two row tiles that share a token tile. Decode: the parts of K of one row
  // tile.
  std::uint32_t cluster = 1;
  std::uint32_t per_sm =
      1;  // decode: CTAs a multiprocessor; two hide latency, one leaves room for the next kernel
  // Blocks that do not fill a round of workers are cut along K. false: prefill rounds that do not fill;
  // decode CTAs with a block each, in a grid as large as it takes.
  bool split_k = true;
  bool operator==(const GemmConfig&) const = default;
};

std::string to_string(Route route);
std::string to_string(const GemmConfig& config);  // "decode n16 c1"

// All configurations that can run M tokens with this layout on this device.
std::vector<GemmConfig> gemm_configs(const DeviceInfo& device, WeightLayout layout, std::uint64_t tokens);

struct GemmChoice {
  GemmConfig config;
  std::string reason;  // for --explain
};
GemmChoice choose_gemm(const DeviceInfo& device, WeightLayout layout, std::uint64_t tokens,
                       std::uint64_t rows, std::uint64_t cols);

// K groups a pipeline stage of the decode kernel holds.
constexpr std::uint32_t decode_groups_per_unit(std::uint32_t token_tile) {
  return token_tile <= 16 ? 2 : 1;
}
// Most parts of K that a cluster's CTAs of the decode kernel can take: 1, 2, 4 ... up to this.
constexpr std::uint32_t decode_most_shares(std::uint32_t token_tile) {
  return token_tile >= 64 ? 8 : 4;
}
// Decode kernels whose clusters, or CTAs, have one block each.
constexpr bool one_block_a_cluster(const GemmConfig& config) {
  return config.cluster > 1 || !config.split_k;
}
SplitPlan decode_plan(std::uint64_t rows, std::uint64_t cols, const GemmConfig& config,
                      std::uint32_t multiprocessors);
SplitPlan prefill_plan(std::uint64_t rows, std::uint64_t cols, std::uint64_t tokens, const GemmConfig& config,
                       std::uint32_t multiprocessors);

}  // namespace fireq::kernels
