#include "kernels/gemm_config.hpp"

#include <algorithm>
#include <array>

namespace fireq::kernels {

namespace {

constexpr std::array<std::uint32_t, 4> kDecodeTiles{8, 16, 32, 64};
constexpr std::array<std::uint32_t, 5> kPrefillTiles{128, 160, 192, 224, 256};
constexpr std::uint64_t kDecodeTokens = 64;
constexpr std::uint64_t kLongK = 5120;

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
  const std::uint64_t halves = (rows + 63) / 64;
  const std::uint64_t room = 2ULL * device.multiprocessors;  // CTAs that run at once
  const std::uint64_t one_each = device.multiprocessors;
  const bool long_k = cols > kLongK;
  const auto in_halves = [&](std::uint32_t cluster) {
    return GemmConfig{Route::decode, tile, cluster, 1, true, 64};
  };
  const auto fits = [&](std::uint32_t cluster) { return halves * cluster <= room; };
  // A multiprocessor with two CTAs of a launch takes longer: with a long K only where nearly all have two, or
  // nearly all one.
  if (!long_k && halves <= device.clusters_of_4 && fits(4))
    return {in_halves(4), "decode, 64 rows a cluster of four, an eighth of K a warpgroup"};
  const bool even = halves * 2 <= one_each && halves * 20 >= one_each * 9;
  if (fits(2) && (!long_k || even || halves * 20 >= room * 9) && (tile > 8 || cols <= 16384))
    return {in_halves(2), "decode, 64 rows a cluster of two, a quarter of K a warpgroup"};
  if (!long_k && fits(1)) return {in_halves(1), "decode, 64 rows a CTA, half of K a warpgroup"};
  // Shares of K that fit into the weight ring, or nearly, while the kernel before still runs.
  if (!long_k && blocks * 2 <= room) {
    if (blocks * 4 <= room)
      return {{Route::decode, tile, 4}, "decode, a cluster of four a row tile, each with a quarter of K"};
    return {{Route::decode, tile, 2}, "decode, a cluster of two a row tile, each with half of K"};
  }
  // More than half a round of row tiles is left over: one worker each, some with help.
  const bool uneven = blocks % one_each * 2 > one_each;
  if (uneven && blocks > one_each && blocks <= room)
    return {{Route::decode, tile, 1, 1, false}, "decode, a CTA a row tile"};
  // A second CTA a multiprocessor costs overlap with the next kernel: it pays on large layers.
  if (uneven || rows * cols >= (tile <= 8 ? 100'000'000 : 80'000'000))
    return {{Route::decode, tile, 1, 2}, "decode, two CTAs a multiprocessor"};
  return {{Route::decode, tile, 1}, "decode, room for the next kernel's CTAs"};
}

// A pair of multiprocessors a block of 256 rows x a token tile, in rounds; what does not fill a round whole,
// cut along K, or all of it in clusters of two or four pairs a block. Microseconds, fitted to 438 times
// measured on an H200 with 128 <= M <= 1024 (standard deviation 8 %); what it chooses is 1 % slower than the
// best in the mean.
class PrefillCost {
 public:
  explicit PrefillCost(std::uint32_t token_tile) : wider_((token_tile - 128.0) / 128.0) {}
  double rounds(std::uint64_t count, std::uint64_t groups) const {
    return static_cast<double>(groups) * (0.381 + 0.295 * wider_) +
           static_cast<double>(count) * (1.6 + 1.7 * wider_);
  }
  double sums_in_l2() const { return 5.5 + 2.1 * wider_; }
  static double sums_in_clusters() { return 3.5; }

 private:
  double wider_;
};

GemmChoice choose_prefill(const DeviceInfo& device, std::uint64_t tokens, std::uint64_t rows,
                          std::uint64_t cols) {
  const std::uint64_t pairs = std::max<std::uint64_t>(1, device.multiprocessors / 2);
  const std::uint64_t groups = (cols + 127) / 128;
  GemmChoice best;
  double least = 0;
  const auto offer = [&](const GemmConfig& config, double time, std::uint64_t blocks, const char* how) {
    if (least != 0 && time >= least) return;
    least = time;
    best.config = config;
    best.reason = "prefill: " + std::to_string(blocks) + " tiles of 256 x " +
                  std::to_string(config.token_tile) + " on " + std::to_string(pairs) +
                  " pairs of multiprocessors, " + how;
  };
  for (const std::uint32_t tile : kPrefillTiles) {
    const PrefillCost cost(tile);
    const std::uint64_t blocks = (rows + 255) / 256 * ((tokens + tile - 1) / tile);
    const std::uint64_t full = blocks / pairs;
    const std::uint64_t rest = blocks % pairs;
    const std::uint64_t whole_rounds = full + (rest == 0 ? 0 : 1);
    offer({Route::prefill, tile, 2, 1, false}, cost.rounds(whole_rounds, whole_rounds * groups), blocks,
          "in whole rounds");
    if (rest == 0) continue;
    const std::uint64_t shares = std::min(groups, pairs / rest);
    offer({Route::prefill, tile, 2},
          cost.rounds(full + 1, full * groups + (groups + shares - 1) / shares) + cost.sums_in_l2(), blocks,
          "the remainder cut along K");
    if (blocks <= device.clusters_of_4)
      offer({Route::prefill, tile, 4}, cost.rounds(1, (groups + 1) / 2) + PrefillCost::sums_in_clusters(),
            blocks, "clusters of four with half of K a pair");
    if (blocks <= device.clusters_of_8)
      offer({Route::prefill, tile, 8}, cost.rounds(1, (groups + 3) / 4) + PrefillCost::sums_in_clusters(),
            blocks, "clusters of eight with a quarter of K a pair");
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
  if (config.row_tile != 128) s += " r" + std::to_string(config.row_tile);
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
        for (std::uint32_t cluster = 1; cluster <= kMostHalfShares; cluster *= 2) {
          all.push_back({Route::decode, tile, cluster, 1, true, 64});
        }
      }
    }
    if (tokens > kDecodeTokens && tokens <= kMostDecodeTokens) {
      all.push_back({Route::decode, 64, 2});
      for (const std::uint32_t cluster : {1U, 2U, 4U})
        all.push_back({Route::decode, 64, cluster, 1, true, 64});
    }
    for (const std::uint32_t tile : kPrefillTiles) {
      all.push_back({Route::prefill, tile, 2});
      all.push_back({Route::prefill, tile, 2, 1, false});
      for (const std::uint32_t cluster : {4U, 8U}) all.push_back({Route::prefill, tile, cluster});
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
  // Few rows: prefill's CTAs would have to share sums.
  const std::uint64_t halves = (rows + 63) / 64;
  if (tokens <= kMostDecodeTokens && cols <= kLongK && 2 * halves <= device.multiprocessors) {
    std::uint32_t cluster = 1;
    while (cluster < kMostHalfShares &&
           2 * cluster * halves * decode_token_tiles(tokens) <= device.multiprocessors)
      cluster *= 2;
    return {{Route::decode, 64, cluster, 1, true, 64},
            "decode in tiles of 64 tokens, 64 rows a CTA or cluster"};
  }
  return choose_prefill(device, tokens, rows, cols);
}

SplitPlan decode_plan(std::uint64_t rows, std::uint64_t cols, const GemmConfig& config,
                      std::uint32_t multiprocessors) {
  const std::uint64_t tile_rows = config.row_tile;
  const std::uint64_t unit_cols =
      std::uint64_t{128} * decode_groups_per_unit(config.token_tile) * (128 / config.row_tile);
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
  constexpr std::uint32_t kPair = 2;
  const std::uint64_t pair_rows = std::uint64_t{128} * kPair;
  const std::uint64_t blocks =
      (rows + pair_rows - 1) / pair_rows * ((tokens + config.token_tile - 1) / config.token_tile);
  const std::uint32_t clusters = std::max(1U, multiprocessors / kPair);
  const auto units = static_cast<std::uint32_t>((cols + 127) / 128);
  if (config.cluster > kPair) {  // a block a cluster
    std::uint32_t shares = config.cluster / kPair;
    while (shares > units) shares /= 2;
    return make_split_plan(static_cast<std::uint32_t>(blocks), units,
                           static_cast<std::uint32_t>(blocks) * shares);
  }
  SplitPlan plan = make_split_plan(static_cast<std::uint32_t>(blocks), units, clusters);
  if (!config.split_k) {
    plan.split_blocks = plan.split_workers = 0;
    plan.workers = std::min(clusters, plan.blocks);
  }
  return plan;
}

}  // namespace fireq::kernels
