// Outlier statistics for people: weights of a checkpoint, activations of a statistics file, codes and scales
// of a FireQ folder.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "calib/recipe.hpp"
#include "calib/weights.hpp"
#include "common/progress.hpp"
#include "formats/statistics.hpp"
#include "libquant/metrics.hpp"

namespace fireq::calib {

struct SiteRow {
  std::uint64_t layer = 0;
  std::string site;  // a site of checkpoint-format.md, a K site after N and S, or a linear's name
  libquant::ChannelSummary summary;
  std::vector<libquant::OutlierChannel> outliers;  // largest first
};

// Activations: one row per layer and site; k_post_rope also "k_after_n" and "k_after_n_s" with the recipe's
// constants (exact: N and S are channel factors that commute with what was measured after RoPE).
std::vector<SiteRow> inspect_statistics(const formats::CalibrationStatistics& statistics,
                                        const Recipe& recipe, bool qk_norm, std::size_t outliers,
                                        std::optional<std::uint64_t> layer);

// What a site's channels hold, for drawing: [C] each. Sites as in inspect_statistics.
struct ChannelProfile {
  std::uint64_t layer = 0;
  std::string site;
  std::vector<float> absmax, rms;
};
std::vector<ChannelProfile> channel_profiles(const formats::CalibrationStatistics& statistics,
                                             const Recipe& recipe, bool qk_norm,
                                             std::optional<std::uint64_t> layer);

// Channels of the keys [kv_heads * head_dim] that S acts on: its factor is not 1. One list per layer, empty
// without S.
struct SmoothedChannels {
  std::uint64_t layer = 0;
  std::vector<std::uint64_t> channels;
};
std::vector<SmoothedChannels> key_channels_smoothed_by_s(const formats::CalibrationStatistics& statistics,
                                                         const Recipe& recipe, bool qk_norm,
                                                         std::optional<std::uint64_t> layer);

// Weights of an original checkpoint: one row per linear, channels are input columns.
std::vector<SiteRow> inspect_weights(const WeightSource& source, std::size_t outliers,
                                     std::optional<std::uint64_t> layer, int threads, Progress& progress);

// Codes and scales of a FireQ folder's linears in 4 bits.
struct PackedRow {
  std::uint64_t layer = 0;
  std::string name;
  std::array<std::uint64_t, 8> index_count{};    // how often each magnitude is used
  std::array<std::uint64_t, 128> scale_count{};  // groups by their scale's E4M3 code
  // Groups by log2 of what their scale stands for, sigma * r * the top magnitude (about the group's largest
  // weight), in the bins of formats::SiteStatistics.
  std::array<std::uint64_t, formats::kHistogramBins> absmax_histogram{};
  double subnormal_scales = 0;  // share of group scales under 2^-6
  double subnormal_without_row_scale =
      0;  // the same had sigma * r been stored, with no second scale beside it
  double smallest_scale = 0, largest_scale = 0;
  double smallest_row_scale = 0, largest_row_scale = 0;
};
std::vector<PackedRow> inspect_packed(const WeightSource& source, std::optional<std::uint64_t> layer,
                                      Progress& progress);

}  // namespace fireq::calib
