#include "kernels/gemm_config.hpp"

#include <algorithm>
#include <array>

namespace fireq::kernels {

namespace {

constexpr std::array<std::uint32_t, 4> kDecodeTiles{8, 16, 32, 64};
constexpr std::array<std::uint32_t, 2> kPrefillTiles{128, 256};
constexpr std::uint64_t kDecodeTokens = 64;

bool has_sm90a(const DeviceInfo& device) {
  return device.compute_capability == 90;
}

std::uint32_t decode_tile(std::uint64_t tokens) {
  for (const std::uint32_t tile : kDecodeTiles)
    if (tokens <= tile) return tile;
  return kDecodeTiles.back();
}

// By times measured on an H200 (docs/kernels/results.md).
GemmChoice choose_decode(const DeviceInfo& device, std::uint64_t tokens, std::uint64_t rows,
                         std::uint64_t cols) {
  const std::uint32_t tile = decode_tile(tokens);
  const std::uint64_t blocks = (rows + 127) / 128;
  const std::uint64_t room = 2ULL * device.multiprocessors;  // CTAs that run at once
  const std::uint64_t one_each = device.multiprocessors;
  // Shares of K that fit into the weight ring, or nearly, while the kernel before still runs.
  if (cols <= 5120 && blocks * 2 <= room) {
    if (blocks * 4 <= room)
      return {{Route::decode, tile, 4}, "decode, a cluster of four a row tile, each with a quarter of K"};
    return {{Route::decode, tile, 2}, "decode, a cluster of two a row tile, each with half of K"};
  }
  // More than half a round of row tiles is left over: one worker each, some with help.
  const bool uneven = blocks % one_each * 2 > one_each;
  if (uneven && blocks > one_each && blocks <= room && tile <= 16)
    return {{Route::decode, tile, 1, 1, false}, "decode, a CTA a row tile"};
  // A second CTA a multiprocessor costs overlap with the next kernel: it pays on large layers.
  if (uneven || rows * cols >= (tile <= 16 ? 100'000'000 : 80'000'000))
    return {{Route::decode, tile, 1, 2}, "decode, two CTAs a multiprocessor"};
  return {{Route::decode, tile, 1}, "decode, room for the next kernel's CTAs"};
}

// Rounds of whole tiles, or what does not fill a round cut along K, by times measured on an H200:
// microseconds a K group of a tile, and what summing shared tiles costs.
GemmChoice choose_prefill(const DeviceInfo& device, std::uint64_t tokens, std::uint64_t rows,
                          std::uint64_t cols) {
  struct Cost {
    std::uint32_t token_tile;
    double group, sum;
  };
  constexpr std::array<Cost, 2> kCosts{{{128, 0.40, 2.5}, {256, 0.58, 6.0}}};
  const std::uint64_t clusters = std::max<std::uint64_t>(1, device.multiprocessors / 2);
  const std::uint64_t groups = (cols + 127) / 128;
  GemmChoice best;
  double least = 0;
  for (const Cost& cost : kCosts) {
    if (cost.token_tile > 128 && tokens <= 128) continue;
    const std::uint64_t blocks = (rows + 255) / 256 * ((tokens + cost.token_tile - 1) / cost.token_tile);
    const std::uint64_t rest = blocks % clusters;
    const std::uint64_t shares = rest == 0 ? 1 : std::min(groups, clusters / rest);
    const std::uint64_t full = blocks / clusters * groups;
    const double whole = static_cast<double>(full + (rest == 0 ? 0 : groups)) * cost.group;
    const std::uint64_t longest = full + (groups + shares - 1) / shares;
    const double even = static_cast<double>(longest) * cost.group + cost.sum;
    const bool cut = shares > 1 && even < whole;
    const double time = cut ? even : whole;
    if (least != 0 && time >= least) continue;
    least = time;
    best.config = {Route::prefill, cost.token_tile, 2, 1, cut};
    best.reason = "prefill: " + std::to_string(blocks) + " tiles of 256 x " +
                  std::to_string(cost.token_tile) + " on " + std::to_string(clusters) +
                  " pairs of multiprocessors, " + (cut ? "the remainder cut along K" : "in whole rounds");
  }
  return best;
}

}  // namespace

std::string to_string(Route route) {
  switch (route) {
    case Route::portable:
      return "portable";
    case Route::decode:
      return "decode";
    case Route::prefill:
      return "prefill";
    case Route::cublas:
      return "cublas";
  }
  return "unknown";
}

std::string to_string(const GemmConfig& config) {
  std::string s = to_string(config.route);
  if (config.token_tile != 0) s += " n" + std::to_string(config.token_tile);
  if (config.route == Route::decode || config.route == Route::prefill)
    s += " c" + std::to_string(config.cluster);
  if (!config.split_k) s += " whole";
  if (config.per_sm != 1) s += " s" + std::to_string(config.per_sm);
  return s;
}

std::vector<GemmConfig> gemm_configs(const DeviceInfo& device, WeightLayout layout, std::uint64_t tokens) {
  std::vector<GemmConfig> all;
  if (has_sm90a(device) && layout == WeightLayout::sm90) {
    if (tokens <= kDecodeTokens) {
      for (const std::uint32_t tile : kDecodeTiles) {
        if (tile < tokens) continue;
        for (const std::uint32_t per_sm : {1U, 2U}) {
          all.push_back({Route::decode, tile, 1, per_sm});
        }
        all.push_back({Route::decode, tile, 1, 1, false});
        for (std::uint32_t cluster = 2; cluster <= decode_most_shares(tile); cluster *= 2)
          all.push_back({Route::decode, tile, cluster});
      }
    }
    for (const std::uint32_t tile : kPrefillTiles) {
      all.push_back({Route::prefill, tile, 2});
      all.push_back({Route::prefill, tile, 2, 1, false});
    }
  }
  if (device.compute_capability >= 89) all.push_back({Route::cublas, 0, 1});
  all.push_back({Route::portable, 0, 1});
  return all;
}

GemmChoice choose_gemm(const DeviceInfo& device, WeightLayout layout, std::uint64_t tokens,
                       std::uint64_t rows, std::uint64_t cols) {
  if (!has_sm90a(device) || layout != WeightLayout::sm90) {
    if (device.compute_capability >= 89 && tokens >= 256)
      return {{Route::cublas, 0, 1},
              "no sm_90a with the sm90 layout: FP8 scratch and cuBLASLt from 256 tokens"};
    return {{Route::portable, 0, 1}, "no sm_90a with the sm90 layout"};
  }
  if (tokens <= kDecodeTokens) return choose_decode(device, tokens, rows, cols);
  return choose_prefill(device, tokens, rows, cols);
}

SplitPlan decode_plan(std::uint64_t rows, std::uint64_t cols, const GemmConfig& config,
                      std::uint32_t multiprocessors) {
  const std::uint64_t tile_rows = 128;
  const std::uint64_t unit_cols = std::uint64_t{128} * decode_groups_per_unit(config.token_tile);
  const auto blocks = static_cast<std::uint32_t>((rows + tile_rows - 1) / tile_rows);
  const auto units = static_cast<std::uint32_t>((cols + unit_cols - 1) / unit_cols);
  if (one_block_a_cluster(config)) {
    std::uint32_t shares = config.cluster;
    while (shares > units) shares /= 2;
    return make_split_plan(blocks, units, blocks * shares);
  }
  const std::uint32_t workers = std::max(1U, multiprocessors * config.per_sm);
  return make_split_plan(blocks, units, workers);
}

SplitPlan prefill_plan(std::uint64_t rows, std::uint64_t cols, std::uint64_t tokens, const GemmConfig& config,
                       std::uint32_t multiprocessors) {
  const std::uint64_t pair_rows = std::uint64_t{128} * config.cluster;
  const std::uint64_t blocks =
      (rows + pair_rows - 1) / pair_rows * ((tokens + config.token_tile - 1) / config.token_tile);
  const std::uint32_t clusters = std::max(1U, multiprocessors / config.cluster);
  const auto units = static_cast<std::uint32_t>((cols + 127) / 128);
  SplitPlan plan = make_split_plan(static_cast<std::uint32_t>(blocks), units, clusters);
  if (!config.split_k) {
    plan.split_blocks = plan.split_workers = 0;
    plan.workers = std::min(clusters, plan.blocks);
  }
  return plan;
}

}  // namespace fireq::kernels
