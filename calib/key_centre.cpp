#include "calib/key_centre.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "calib/gemm.hpp"
#include "calib/key_folds.hpp"
#include "common/parallel.hpp"
#include "libquant/kv_quantizer.hpp"
#include "libquant/kv_rounding.hpp"

namespace fireq::calib {
namespace {

using formats::Site;

constexpr std::uint64_t kTokens = 1024;  // kept of a layer
constexpr std::uint64_t kQueries = 256;  // of one window

// Rows [first, first + count) of one head of [tokens, channels].
std::vector<float> head_rows(const std::vector<float>& values, std::uint64_t channels, std::uint64_t first,
                             std::uint64_t count, std::uint64_t step, std::uint64_t head, std::uint64_t dim) {
  std::vector<float> out;
  out.reserve((count / step + 1) * dim);
  for (std::uint64_t row = first; row < first + count; row += step) {
    const auto at = values.begin() + static_cast<std::ptrdiff_t>(row * channels + head * dim);
    out.insert(out.end(), at, at + static_cast<std::ptrdiff_t>(dim));
  }
  return out;
}

// Keys [tokens, dim] as they come back from the cache, less the shift.
std::vector<float> cached(std::vector<float> keys, const KeyFolds& folds, std::uint64_t head,
                          std::uint64_t dim) {
  const auto of_head = [&](const std::vector<float>& all) {
    return std::span(all)
        .subspan(head * (all.size() / (folds.n.size() / dim)))
        .first(all.size() / (folds.n.size() / dim));
  };
  const std::span<const float> n = of_head(folds.n), s = of_head(folds.s), shift = of_head(folds.shift);
  for (std::size_t row = 0; row < keys.size() / dim; ++row) {
    const std::span<float> k = std::span(keys).subspan(row * dim, dim);
    for (std::uint64_t c = 0; c < dim; ++c) k[c] = (k[c] * n[c] - shift[c]) * s[c];
    const float sigma = folds.rounding.empty() ? libquant::quantize_kv_in_place(k)
                                               : libquant::quantize_kv_together(k, of_head(folds.rounding),
                                                                                libquant::KvPart::key);
    for (std::uint64_t c = 0; c < dim; ++c) k[c] *= sigma / (n[c] * s[c]);
  }
  return keys;
}

// Causal attention's outputs [queries, dim] of queries at positions 0, step, 2 step ...; values transposed
// [dim, tokens]. window 0: all keys.
std::vector<float> outputs(const std::vector<float>& q, const std::vector<float>& k,
                           const std::vector<float>& v, std::uint64_t dim, std::uint64_t step,
                           std::uint64_t window) {
  const std::uint64_t queries = q.size() / dim;
  const std::uint64_t tokens = k.size() / dim;
  const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(dim)));
  std::vector<float> p(queries * tokens);
  gemm_nt(q, k, p, queries, tokens, dim, 1);
  for (std::uint64_t i = 0; i < queries; ++i) {
    float* row = p.data() + i * tokens;
    const std::uint64_t end = i * step + 1;
    const std::uint64_t begin = window == 0 || end <= window ? 0 : end - window;
    const float largest = *std::max_element(row + begin, row + end);
    double sum = 0;
    for (std::uint64_t j = 0; j < tokens; ++j) {
      row[j] = j < begin || j >= end ? 0.0F : std::exp((row[j] - largest) * scale);
      sum += static_cast<double>(row[j]);
    }
    for (std::uint64_t j = begin; j < end; ++j)
      row[j] = static_cast<float>(static_cast<double>(row[j]) / sum);
  }
  std::vector<float> out(queries * dim);
  gemm_nt(p, v, out, queries, dim, tokens, 1);
  return out;
}

double squared_distance(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    sum += d * d;
  }
  return sum;
}

// What N, S and the shift would be with every head centred, or none.
KeyFolds folds(const formats::ModelConfig& config, formats::LayerStatistics statistics, bool centred) {
  const Recipe recipe = preset_recipe("best");
  statistics.k_centre_gain.assign(config.kv_heads, centred ? 1.0 : -1.0);
  return key_folds(recipe, statistics, config.kv_heads, config.head_dim, config.qk_norm);
}

}  // namespace

KeySample::KeySample(ActivationObserver& next, std::uint64_t length)
    : next_(next), length_(length), windows_(std::max<std::uint64_t>(1, kTokens / length)) {}

void KeySample::observe(Site site, std::span<const float> values, std::uint64_t rows,
                        std::uint64_t channels) {
  next_.observe(site, values, rows, channels);
  std::vector<float>* const to = site == Site::q             ? &q_
                                 : site == Site::k_post_rope ? &k_
                                 : site == Site::v           ? &v_
                                                             : nullptr;
  if (to == nullptr || !to->empty()) return;
  const std::uint64_t kept = std::min({rows, windows_ * length_, kTokens});
  to->assign(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(kept * channels));
}

std::vector<double> KeySample::centre_gain(const formats::ModelConfig& config, std::uint64_t layer,
                                           const formats::LayerStatistics& statistics, int threads) const {
  const KeyFolds plain = folds(config, statistics, false);
  const KeyFolds centred = folds(config, statistics, true);
  const std::uint64_t dim = config.head_dim;
  const std::uint64_t group = config.heads / config.kv_heads;
  const std::uint64_t tokens = k_.size() / config.kv_rows();
  const std::uint64_t window = config.sliding_window.empty() ? 0 : config.sliding_window[layer];
  std::vector<double> gain(config.kv_heads, 0.0);
  parallel_for(config.kv_heads, threads, [&](std::size_t g) {
    for (std::uint64_t first = 0; first < tokens; first += length_) {
      const std::uint64_t count = std::min(length_, tokens - first);
      const std::uint64_t step = (count + kQueries - 1) / kQueries;
      const std::vector<float> keys = head_rows(k_, config.kv_rows(), first, count, 1, g, dim);
      const std::vector<float> rows = head_rows(v_, config.kv_rows(), first, count, 1, g, dim);
      std::vector<float> values(rows.size());
      for (std::uint64_t j = 0; j < count; ++j) {
        for (std::uint64_t c = 0; c < dim; ++c) values[c * count + j] = rows[j * dim + c];
      }
      const std::vector<float> as_they_are = cached(keys, plain, g, dim);
      const std::vector<float> less_mean = cached(keys, centred, g, dim);
      for (std::uint64_t r = 0; r < group; ++r) {
        const std::vector<float> q = head_rows(q_, config.q_rows(), first, count, step, g * group + r, dim);
        const std::vector<float> exact = outputs(q, keys, values, dim, step, window);
        gain[g] += squared_distance(outputs(q, as_they_are, values, dim, step, window), exact) -
                   squared_distance(outputs(q, less_mean, values, dim, step, window), exact);
      }
    }
  });
  return gain;
}

}  // namespace fireq::calib
