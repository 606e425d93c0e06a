#include "calib/collectors.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <vector>

#include "calib/evaluate.hpp"
#include "calib/key_centre.hpp"
#include "calib/model_runner.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"

namespace fireq::calib {
namespace {

// Channels per task; their running sums stay in the first cache.
constexpr std::uint64_t kChannels = 64;
// Tokens of one batch when calibrating (at least one window): every site's activations of a batch are kept
// until the observer has seen them.
constexpr std::uint64_t kBatchTokens = 2048;

using Histogram = std::array<std::uint64_t, formats::kHistogramBins>;

// Adds n channels (row stride `stride`) of `rows` tokens.
void add_channels(const float* values, std::uint64_t rows, std::uint64_t stride, std::uint64_t n,
                  formats::SiteStatistics& site, std::uint64_t first, Histogram& histogram) {
  std::array<float, kChannels> absmax{};
  std::array<double, kChannels> abssum{}, sum1{}, sumsq{}, sum3{}, sum4{};
  const auto load = [&](auto& to, const auto& from) {
    std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(first), n, to.begin());
  };
  load(absmax, site.absmax);
  load(abssum, site.abssum);
  load(sum1, site.sum1);
  load(sumsq, site.sumsq);
  load(sum3, site.sum3);
  load(sum4, site.sum4);
  for (std::uint64_t row = 0; row < rows; ++row) {
    const float* x = values + row * stride;
    for (std::uint64_t c = 0; c < n; ++c) {
      const auto v = static_cast<double>(x[c]);
      const double square = v * v;
      absmax[c] = std::max(absmax[c], std::fabs(x[c]));
      abssum[c] += std::fabs(v);
      sum1[c] += v;
      sumsq[c] += square;
      sum3[c] += square * v;
      sum4[c] += square * square;
    }
    for (std::uint64_t c = 0; c < n; ++c) ++histogram[histogram_bin(x[c])];
  }
  const auto store = [&](auto& to, const auto& from) {
    std::copy_n(from.begin(), n, to.begin() + static_cast<std::ptrdiff_t>(first));
  };
  store(site.absmax, absmax);
  store(site.abssum, abssum);
  store(site.sum1, sum1);
  store(site.sumsq, sumsq);
  store(site.sum3, sum3);
  store(site.sum4, sum4);
}

}  // namespace

std::size_t histogram_bin(float x) noexcept {
  // Bin i holds exponents i - 17; the exponent field of a float is its exponent + 127.
  const auto field = static_cast<int>(std::bit_cast<std::uint32_t>(x) << 1U >> 24U);
  return static_cast<std::size_t>(
      std::clamp(field - 127 + 17, 0, static_cast<int>(formats::kHistogramBins) - 1));
}

StatisticsCollector::StatisticsCollector(formats::LayerStatistics& statistics, std::uint64_t kv_heads,
                                         std::uint64_t head_dim, int threads)
    : statistics_(statistics), kv_heads_(kv_heads), head_dim_(head_dim), threads_(threads) {}

void StatisticsCollector::observe(formats::Site site, std::span<const float> values, std::uint64_t rows,
                                  std::uint64_t channels) {
  if (values.size() != rows * channels) throw Error(ErrorKind::internal, "activations of another size");
  add_moments(statistics_.site(site), values, rows, channels);
  if (site == formats::Site::k_pre_rope) add_pair_radius(values, rows, channels);
  if (site == formats::Site::q) add_query_products(values, rows, channels);
}

void StatisticsCollector::add_moments(formats::SiteStatistics& site, std::span<const float> values,
                                      std::uint64_t rows, std::uint64_t channels) const {
  if (site.absmax.empty()) {
    site.absmax.resize(channels);
    for (auto* sums : {&site.abssum, &site.sum1, &site.sumsq, &site.sum3, &site.sum4}) sums->resize(channels);
    site.histogram.resize(formats::kHistogramBins);
  }
  if (site.absmax.size() != channels) throw Error(ErrorKind::internal, "a site changed its channels");
  const std::uint64_t tasks = (channels + kChannels - 1) / kChannels;
  std::vector<Histogram> histograms(tasks, Histogram{});
  parallel_for(tasks, threads_, [&](std::size_t task) {
    const std::uint64_t first = task * kChannels;
    add_channels(values.data() + first, rows, channels, std::min(kChannels, channels - first), site, first,
                 histograms[task]);
  });
  for (const Histogram& histogram : histograms) {
    for (std::size_t bin = 0; bin < histogram.size(); ++bin) site.histogram[bin] += histogram[bin];
  }
  site.count += rows;
}

void StatisticsCollector::add_query_products(std::span<const float> queries, std::uint64_t rows,
                                             std::uint64_t channels) const {
  const std::uint64_t d = head_dim_;
  const std::uint64_t group = channels / d / kv_heads_;
  statistics_.q_products.resize(kv_heads_ * d * d);
  parallel_for(kv_heads_, threads_, [&](std::size_t g) {
    double* const sums = statistics_.q_products.data() + g * d * d;
    std::vector<double> q(d);
    for (std::uint64_t i = 0; i < rows * group; ++i) {
      const float* const from = queries.data() + i / group * channels + (g * group + i % group) * d;
      std::copy_n(from, d, q.begin());
      for (std::uint64_t r = 0; r < d; ++r) {
        for (std::uint64_t c = r; c < d; ++c) sums[r * d + c] += q[r] * q[c];
      }
    }
    for (std::uint64_t r = 0; r < d; ++r) {
      for (std::uint64_t c = 0; c < r; ++c) sums[r * d + c] = sums[c * d + r];
    }
  });
}

void StatisticsCollector::add_pair_radius(std::span<const float> keys, std::uint64_t rows,
                                          std::uint64_t channels) const {
  const std::uint64_t half = head_dim_ / 2;
  const std::uint64_t heads = channels / head_dim_;
  statistics_.k_pair_radius.resize(heads * half);
  parallel_for(heads, threads_, [&](std::size_t head) {
    float* radius = statistics_.k_pair_radius.data() + head * half;
    for (std::uint64_t row = 0; row < rows; ++row) {
      const float* k = keys.data() + row * channels + head * head_dim_;
      for (std::uint64_t i = 0; i < half; ++i) {
        const auto a = static_cast<double>(k[i]);
        const auto b = static_cast<double>(k[i + half]);
        radius[i] = std::max(radius[i], static_cast<float>(std::sqrt(a * a + b * b)));
      }
    }
  });
}

formats::CalibrationStatistics calibrate(const WeightSource& model, const Windows& windows, int threads,
                                         Progress& progress) {
  const formats::ModelConfig& config = model.config();
  if (windows.count == 0 || windows.length == 0 || windows.ids.size() != windows.count * windows.length) {
    throw Error(ErrorKind::input, "no windows to calibrate on");
  }
  formats::CalibrationStatistics out;
  out.meta.tokens = windows.ids.size();
  out.meta.windows = windows.count;
  out.meta.kv_heads = config.kv_heads;
  out.meta.head_dim = config.head_dim;
  out.layers.resize(config.layers);

  std::vector<float> hidden(windows.ids.size() * config.hidden);
  model.embed(windows.ids, hidden);
  const RopeTable rope(config, windows.length);
  LayerRunner runner(config, Precision{}, threads);
  const std::uint64_t at_once = std::max<std::uint64_t>(1, kBatchTokens / windows.length);
  progress.begin("calibrate", config.layers * windows.count);
  std::uint64_t done = 0;
  try {
    for (std::uint64_t layer = 0; layer < config.layers; ++layer) {
      const LayerPanels panels = pack_layer(model.load_layer(layer, threads), threads);
      StatisticsCollector collector(out.layers[layer], config.kv_heads, config.head_dim, threads);
      KeySample sample(collector, windows.length);
      for (std::uint64_t first = 0; first < windows.count; first += at_once) {
        check_interrupt();
        const Batch batch{std::min(at_once, windows.count - first), windows.length, 0, first};
        const std::uint64_t row = windows.length * config.hidden;
        runner.run(panels, layer, rope, batch, std::span(hidden).subspan(first * row, batch.sequences * row),
                   &sample);
        done += batch.sequences;
        progress.advance(done);
      }
      out.layers[layer].k_centre_gain = sample.centre_gain(config, layer, out.layers[layer], threads);
    }
  } catch (Error& error) {
    throw error.path_if_unset(model.reader().folder());
  }
  progress.end();
  return out;
}

}  // namespace fireq::calib
