#include "calib/inspect.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "calib/collectors.hpp"
#include "calib/key_folds.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::calib {
namespace {

using formats::Site;
using formats::SiteStatistics;

constexpr std::uint8_t kSmallestNormal = 8;  // E4M3 code of 2^-6

SiteRow site_row(std::uint64_t layer, std::string name, const SiteStatistics& s, std::size_t outliers) {
  SiteRow row;
  row.layer = layer;
  row.site = std::move(name);
  row.summary = libquant::summarize(s.absmax, s.sumsq, s.sum4, s.count);
  row.outliers = libquant::top_outliers(s.absmax, outliers);
  return row;
}

// Statistics of channels multiplied by constants.
SiteStatistics scaled(const SiteStatistics& s, std::span<const float> factor) {
  SiteStatistics out = s;
  for (std::size_t c = 0; c < out.absmax.size(); ++c) {
    const auto f = static_cast<double>(factor[c]);
    out.absmax[c] = static_cast<float>(static_cast<double>(s.absmax[c]) * f);
    out.sumsq[c] *= f * f;
    out.sum4[c] *= f * f * f * f;
  }
  return out;
}

// The keys as the recipe's N, and N and S, leave them; nothing where the keys were not measured.
struct SmoothedKeys {
  SiteStatistics after_n, after_n_s;
  std::vector<float> s;
};
std::optional<SmoothedKeys> smoothed_keys(const formats::LayerStatistics& statistics,
                                          const formats::StatisticsMeta& meta, const Recipe& recipe,
                                          bool qk_norm) {
  const SiteStatistics& keys = statistics.site(Site::k_post_rope);
  if (keys.empty() || meta.kv_heads == 0 || keys.absmax.size() != meta.kv_heads * meta.head_dim)
    return std::nullopt;
  Recipe with = recipe;
  with.key_n = true;
  with.key_s = false;
  const KeyFolds n_only = key_folds(with, statistics, meta.kv_heads, meta.head_dim, qk_norm);
  with.key_s = true;
  const KeyFolds both = key_folds(with, statistics, meta.kv_heads, meta.head_dim, qk_norm);
  return SmoothedKeys{scaled(keys, n_only.n), scaled(scaled(keys, both.n), both.s), both.s};
}

// Calls use(layer, site's name, statistics) for each site that was measured, and for the smoothed keys.
template <typename Use>
void for_each_site(const formats::CalibrationStatistics& statistics, const Recipe& recipe, bool qk_norm,
                   std::optional<std::uint64_t> layer, const Use& use) {
  for (std::uint64_t i = 0; i < statistics.layers.size(); ++i) {
    if (layer && *layer != i) continue;
    for (std::size_t s = 0; s < formats::kSites; ++s) {
      const auto site = static_cast<Site>(s);
      const SiteStatistics& values = statistics.layers[i].site(site);
      if (values.empty()) continue;
      use(i, std::string(formats::site_name(site)), values);
      if (site != Site::k_post_rope) continue;
      if (const auto keys = smoothed_keys(statistics.layers[i], statistics.meta, recipe, qk_norm)) {
        use(i, "k_after_n", keys->after_n);
        use(i, "k_after_n_s", keys->after_n_s);
      }
    }
  }
}

void check_layer(std::optional<std::uint64_t> layer, std::uint64_t layers) {
  if (layer && *layer >= layers) {
    throw Error(ErrorKind::usage, "no such layer")
        .expected("0 to " + std::to_string(layers - 1))
        .found(std::to_string(*layer));
  }
}

// Column sums over row blocks of fixed size, added in block order: the same for any thread count.
SiteStatistics column_statistics(const LinearWeights& w, int threads) {
  constexpr std::uint64_t kBlock = 256;
  const std::uint64_t blocks = (w.rows + kBlock - 1) / kBlock;
  std::vector<SiteStatistics> part(blocks);
  parallel_for(blocks, threads, [&](std::size_t b) {
    SiteStatistics& s = part[b];
    s.absmax.assign(w.cols, 0);
    s.sumsq.assign(w.cols, 0);
    s.sum4.assign(w.cols, 0);
    for (std::uint64_t r = b * kBlock; r < std::min(w.rows, (b + 1) * kBlock); ++r) {
      for (std::uint64_t c = 0; c < w.cols; ++c) {
        const float x = w.weight[r * w.cols + c];
        const double sq = static_cast<double>(x) * static_cast<double>(x);
        s.absmax[c] = std::max(s.absmax[c], std::fabs(x));
        s.sumsq[c] += sq;
        s.sum4[c] += sq * sq;
      }
    }
  });
  SiteStatistics total = std::move(part[0]);
  for (std::uint64_t b = 1; b < blocks; ++b) {
    for (std::uint64_t c = 0; c < w.cols; ++c) {
      total.absmax[c] = std::max(total.absmax[c], part[b].absmax[c]);
      total.sumsq[c] += part[b].sumsq[c];
      total.sum4[c] += part[b].sum4[c];
    }
  }
  total.count = w.rows;
  return total;
}

}  // namespace

std::vector<SiteRow> inspect_statistics(const formats::CalibrationStatistics& statistics,
                                        const Recipe& recipe, bool qk_norm, std::size_t outliers,
                                        std::optional<std::uint64_t> layer) {
  check_layer(layer, statistics.layers.size());
  std::vector<SiteRow> rows;
  for_each_site(statistics, recipe, qk_norm, layer,
                [&](std::uint64_t i, std::string site, const SiteStatistics& values) {
                  rows.push_back(site_row(i, std::move(site), values, outliers));
                });
  return rows;
}

std::vector<ChannelProfile> channel_profiles(const formats::CalibrationStatistics& statistics,
                                             const Recipe& recipe, bool qk_norm,
                                             std::optional<std::uint64_t> layer) {
  check_layer(layer, statistics.layers.size());
  std::vector<ChannelProfile> profiles;
  for_each_site(statistics, recipe, qk_norm, layer,
                [&](std::uint64_t i, std::string site, const SiteStatistics& values) {
                  ChannelProfile& p = profiles.emplace_back();
                  p.layer = i;
                  p.site = std::move(site);
                  p.absmax = values.absmax;
                  p.rms.reserve(values.sumsq.size());
                  for (const double sum : values.sumsq)
                    p.rms.push_back(static_cast<float>(std::sqrt(sum / static_cast<double>(values.count))));
                });
  return profiles;
}

std::vector<SmoothedChannels> key_channels_smoothed_by_s(const formats::CalibrationStatistics& statistics,
                                                         const Recipe& recipe, bool qk_norm,
                                                         std::optional<std::uint64_t> layer) {
  check_layer(layer, statistics.layers.size());
  std::vector<SmoothedChannels> list;
  for (std::uint64_t i = 0; i < statistics.layers.size(); ++i) {
    if (layer && *layer != i) continue;
    SmoothedChannels& entry = list.emplace_back();
    entry.layer = i;
    if (!recipe.key_s) continue;
    const auto keys = smoothed_keys(statistics.layers[i], statistics.meta, recipe, qk_norm);
    if (!keys) continue;
    for (std::size_t c = 0; c < keys->s.size(); ++c) {
      if (keys->s[c] != 1.0F) entry.channels.push_back(c);
    }
  }
  return list;
}

std::vector<SiteRow> inspect_weights(const WeightSource& source, std::size_t outliers,
                                     std::optional<std::uint64_t> layer, int threads, Progress& progress) {
  const std::uint64_t layers = source.config().layers;
  check_layer(layer, layers);
  std::vector<SiteRow> rows;
  progress.begin("inspect", layers);
  for (std::uint64_t i = 0; i < layers; ++i) {
    if (layer && *layer != i) continue;
    check_interrupt();
    const LayerWeights weights = source.load_layer(i, threads);
    for (const LinearWeights& w : weights.linear)
      rows.push_back(site_row(i, w.name, column_statistics(w, threads), outliers));
    progress.advance(i + 1);
  }
  progress.end();
  return rows;
}

std::vector<PackedRow> inspect_packed(const WeightSource& source, std::optional<std::uint64_t> layer,
                                      Progress& progress) {
  const std::uint64_t layers = source.config().layers;
  check_layer(layer, layers);
  std::vector<PackedRow> rows;
  progress.begin("inspect", layers);
  for (std::uint64_t i = 0; i < layers; ++i) {
    if (layer && *layer != i) continue;
    check_interrupt();
    const auto names = formats::linear_names(i);
    for (std::size_t l = 0; l < kLinears; ++l) {
      if (source.precision(i, l) != formats::ModulePrecision::int4) continue;
      const libquant::QuantizedLinear q = source.quantized(i, l);
      PackedRow row;
      row.layer = i;
      row.name = names[l];
      for (std::uint64_t r = 0; r < q.rows; ++r) {
        for (std::uint64_t c = 0; c < q.cols; ++c) ++row.index_count[q.code(r, c) & 7U];
      }
      row.smallest_scale = row.smallest_row_scale = std::numeric_limits<double>::infinity();
      std::uint64_t subnormal = 0, subnormal_without = 0;
      for (std::size_t g = 0; g < q.group_scales.size(); ++g) {
        const std::uint8_t b = q.group_scales[g];
        const auto sigma = static_cast<double>(libquant::decode_e4m3(b));
        row.smallest_scale = std::min(row.smallest_scale, sigma);
        row.largest_scale = std::max(row.largest_scale, sigma);
        ++row.scale_count[b & 127U];
        if (b < kSmallestNormal) ++subnormal;
        const double whole = sigma * static_cast<double>(q.row_scale(g / q.groups()));
        if (libquant::encode_e4m3(static_cast<float>(whole)) < kSmallestNormal) ++subnormal_without;
        ++row.absmax_histogram[histogram_bin(
            static_cast<float>(whole * static_cast<double>(q.levels.magnitude[7])))];
      }
      const auto groups = static_cast<double>(q.group_scales.size());
      row.subnormal_scales = static_cast<double>(subnormal) / groups;
      row.subnormal_without_row_scale = static_cast<double>(subnormal_without) / groups;
      for (const float r : q.row_scales) {
        row.smallest_row_scale = std::min(row.smallest_row_scale, static_cast<double>(r));
        row.largest_row_scale = std::max(row.largest_row_scale, static_cast<double>(r));
      }
      rows.push_back(std::move(row));
    }
    progress.advance(i + 1);
  }
  progress.end();
  return rows;
}

}  // namespace fireq::calib
