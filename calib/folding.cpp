#include "calib/folding.hpp"

#include <algorithm>
#include <cmath>
#include <span>
#include <utility>

#include "calib/key_folds.hpp"
#include "common/error.hpp"
#include "libquant/kv_rounding.hpp"
#include "libquant/smoothing.hpp"

namespace fireq::calib {
namespace {

namespace lq = libquant;
using formats::LayerStatistics;
using formats::ModelConfig;
using formats::Site;

lq::MatrixRef matrix(LinearWeights& w) {
  return {w.weight, w.rows, w.cols};
}
lq::ConstMatrixRef matrix(const LinearWeights& w) {
  return {w.weight, w.rows, w.cols};
}

void check_statistics(const ModelConfig& config, const LayerStatistics& statistics) {
  const auto require = [](const char* what, std::uint64_t expected, std::uint64_t found) {
    if (expected == found) return;
    throw Error(ErrorKind::input, std::string("statistics do not fit the model: ") + what)
        .expected(std::to_string(expected) + " channels")
        .found(std::to_string(found));
  };
  require("attn_in", config.hidden, statistics.site(Site::attn_in).absmax.size());
  require("k_post_rope", config.kv_rows(), statistics.site(Site::k_post_rope).absmax.size());
  require("v", config.kv_rows(), statistics.site(Site::v).absmax.size());
  require("o_in", config.q_rows(), statistics.site(Site::o_in).absmax.size());
  require("mlp_in", config.hidden, statistics.site(Site::mlp_in).absmax.size());
  require("down_in", config.ffn, statistics.site(Site::down_in).absmax.size());
  require("k_pair_radius", config.kv_rows() / 2, statistics.k_pair_radius.size());
}

// The mean over tokens of one of a site's sums.
std::vector<float> mean_of(const LayerStatistics* statistics, Site site,
                           std::vector<double> formats::SiteStatistics::*sums) {
  if (statistics == nullptr) return {};
  const formats::SiteStatistics& s = statistics->site(site);
  std::vector<float> mean((s.*sums).size());
  for (std::size_t c = 0; c < mean.size(); ++c) {
    mean[c] = s.count == 0 ? 0.0F : static_cast<float>((s.*sums)[c] / static_cast<double>(s.count));
  }
  return mean;
}

// Multiplies input columns by `factor`: the activations that reach them were divided by it.
void fold_columns(LinearWeights& w, std::span<const float> factor, std::vector<float>& input_mean_square,
                  std::vector<float>& input_mean) {
  lq::scale_columns(matrix(w), factor);
  for (std::size_t c = 0; c < input_mean_square.size(); ++c) input_mean_square[c] /= factor[c] * factor[c];
  for (std::size_t c = 0; c < input_mean.size(); ++c) input_mean[c] /= factor[c];
}

void divide_output(LinearWeights& w, std::span<const float> factor) {
  lq::divide_rows(matrix(w), factor);
  if (!w.bias.empty()) lq::divide(w.bias, factor);
}

// N: keys before RoPE are multiplied, queries of the same group divided (rows and biases, or the per-head
// norms).
void fold_keys(const ModelConfig& config, std::span<const float> n, LayerWeights& w) {
  const std::uint64_t d = config.head_dim;
  if (config.qk_norm) {
    const std::span<const float> one = n.first(d);  // the same for every head
    lq::scale(w.k_norm, one);
    lq::divide(w.q_norm, one);
    return;
  }
  lq::scale_rows(matrix(w.linear[kK]), n);
  if (!w.linear[kK].bias.empty()) lq::scale(w.linear[kK].bias, n);
  const std::uint64_t repeats = config.heads / config.kv_heads;
  std::vector<float> q(config.q_rows());
  for (std::uint64_t h = 0; h < config.heads; ++h) {
    for (std::uint64_t i = 0; i < d; ++i) q[h * d + i] = n[(h / repeats) * d + i];
  }
  divide_output(w.linear[kQ], q);
}

// Values leave v_proj divided by lambda [kv_heads * D] and meet o_proj's columns multiplied.
void fold_values(const ModelConfig& config, std::span<const float> lambda, LayerWeights& w,
                 FoldReport& report) {
  divide_output(w.linear[kV], lambda);
  const std::vector<float> columns =
      lq::expand_value_channels(lambda, config.heads, config.kv_heads, config.head_dim);
  fold_columns(w.linear[kO], columns, report.input_mean_square[kO], report.input_mean[kO]);
}

// After it the mean squares of o's inputs are those of rotated channels that do not know one another.
void rotate_value_heads(const ModelConfig& config, LayerWeights& w, FoldReport& report) {
  const std::uint64_t d = config.head_dim;
  lq::rotate_values(matrix(w.linear[kV]), w.linear[kV].bias, matrix(w.linear[kO]), config.heads,
                    config.kv_heads, d);
  std::vector<float>& square = report.input_mean_square[kO];
  if (square.empty()) return;
  const std::vector<double> r = lq::spreading_rotation(d);
  std::vector<float> rotated(square.size());
  for (std::uint64_t c = 0; c < square.size(); ++c) {
    double sum = 0;
    for (std::uint64_t i = 0; i < d; ++i) {
      const double weight = r[i * d + c % d];
      sum += weight * weight * static_cast<double>(square[c - c % d + i]);
    }
    rotated[c] = static_cast<float>(sum);
  }
  square = std::move(rotated);
  std::vector<float>& mean = report.input_mean[kO];
  std::vector<float> turned(mean.size());
  for (std::uint64_t c = 0; c < mean.size(); ++c) {
    double sum = 0;
    for (std::uint64_t i = 0; i < d; ++i) sum += r[i * d + c % d] * static_cast<double>(mean[c - c % d + i]);
    turned[c] = static_cast<float>(sum);
  }
  mean = std::move(turned);
}

// A power of two per KV head that brings the largest sigma_V = max|v| / 7 of the head to [1, 2) where it is
// below 1/4: the scales of ordinary tokens, some octaves lower, then stay normal E4M3 numbers (from 2^-6 on).
// v = max|v| after Lambda_1.
std::vector<float> value_powers(const ModelConfig& config, std::span<const float> absmax,
                                std::span<const float> lambda1) {
  std::vector<float> divide_by(config.kv_rows(), 1.0F);
  for (std::uint64_t g = 0; g < config.kv_heads; ++g) {
    float largest = 0;
    for (std::uint64_t i = g * config.head_dim; i < (g + 1) * config.head_dim; ++i) {
      largest = std::max(largest, absmax[i] / (lambda1.empty() ? 1.0F : lambda1[i]));
    }
    const float sigma = largest / 7.0F;
    if (!(sigma > 0) || sigma >= 0.25F) continue;
    const int exponent = std::clamp(-static_cast<int>(std::floor(std::log2(sigma))), 0, 32);
    const float factor = std::ldexp(1.0F, -exponent);
    std::fill_n(divide_by.begin() + static_cast<std::ptrdiff_t>(g * config.head_dim), config.head_dim,
                factor);
  }
  return divide_by;
}

// What the errors of a value's channels cost together: o_proj's columns of all query heads of its group.
std::vector<float> value_roundings(const ModelConfig& config, const LayerWeights& w) {
  const std::uint64_t d = config.head_dim;
  const std::uint64_t group = config.heads / config.kv_heads;
  const LinearWeights& o = w.linear[kO];
  std::vector<float> out;
  for (std::uint64_t g = 0; g < config.kv_heads; ++g) {
    std::vector<double> moment(d * d, 0.0);
    for (std::uint64_t row = 0; row < o.rows; ++row) {
      for (std::uint64_t r = 0; r < group; ++r) {
        const float* x = o.weight.data() + row * o.cols + (g * group + r) * d;
        for (std::uint64_t i = 0; i < d; ++i) {
          for (std::uint64_t j = 0; j < d; ++j) {
            moment[i * d + j] += static_cast<double>(x[i]) * static_cast<double>(x[j]);
          }
        }
      }
    }
    const std::vector<float> of_head = lq::kv_rounding(moment, d);
    out.insert(out.end(), of_head.begin(), of_head.end());
  }
  return out;
}

}  // namespace

FoldReport planned_changes(const ModelConfig& config, const Recipe& recipe) {
  FoldReport plan;
  const auto change = [&](std::size_t i, bool bias_too) {
    plan.weight_changed[i] = true;
    if (bias_too && formats::linear_has_bias(config, i)) plan.bias_changed[i] = true;
  };
  if (recipe.key_n) {
    if (config.qk_norm) {
      plan.qk_norm_changed = true;
    } else {
      change(kQ, true);
      change(kK, true);
    }
  }
  if (recipe.lambda1 != ValueScaling::off || recipe.value_power_of_two || recipe.value_rotation) {
    change(kV, true);
    change(kO, false);
  }
  if (recipe.lambda2) {
    plan.mlp_norm_changed = true;
    change(kGate, false);
    change(kUp, false);
  }
  if (recipe.lambda3) {
    change(kUp, true);
    change(kDown, false);
  }
  return plan;
}

FoldReport fold_layer(const ModelConfig& config, const Recipe& recipe, const LayerStatistics* statistics,
                      LayerWeights& w) {
  if (statistics == nullptr && recipe.needs_statistics()) {
    throw Error(ErrorKind::internal, "recipe needs statistics and none were given");
  }
  if (statistics != nullptr) check_statistics(config, *statistics);
  FoldReport report = planned_changes(config, recipe);
  const auto fill = [&](auto& to, std::vector<double> formats::SiteStatistics::*sums) {
    to[kQ] = to[kK] = to[kV] = mean_of(statistics, Site::attn_in, sums);
    to[kO] = mean_of(statistics, Site::o_in, sums);
    to[kGate] = to[kUp] = mean_of(statistics, Site::mlp_in, sums);
    to[kDown] = mean_of(statistics, Site::down_in, sums);
  };
  fill(report.input_mean_square, &formats::SiteStatistics::sumsq);
  fill(report.input_mean, &formats::SiteStatistics::sum1);

  if (recipe.key_n || recipe.key_s || recipe.key_centre || recipe.keys_together) {
    KeyFolds keys = key_folds(recipe, *statistics, config.kv_heads, config.head_dim, config.qk_norm);
    if (recipe.key_n) fold_keys(config, keys.n, w);
    if (recipe.key_s) w.k_post_rope_scale = std::move(keys.s);
    if (recipe.key_centre) w.k_post_rope_shift = std::move(keys.shift);
    w.k_rounding = std::move(keys.rounding);
  }

  std::vector<float> lambda1;
  if (recipe.lambda1 == ValueScaling::channel) {
    lq::ChannelScales scales = lq::value_channel_scales(matrix(std::as_const(w.linear[kO])), config.heads,
                                                        config.kv_heads, config.head_dim, recipe.lambda1_c);
    report.clamped += scales.clamped;
    report.zero_channels += scales.zero;
    lambda1 = std::move(scales.lambda);
  } else if (recipe.lambda1 == ValueScaling::scalar) {
    lambda1.assign(config.kv_rows(), static_cast<float>(1.0 / recipe.lambda1_scalar));
  }
  if (!lambda1.empty()) fold_values(config, lambda1, w, report);
  if (recipe.value_power_of_two) {
    fold_values(config, value_powers(config, statistics->site(Site::v).absmax, lambda1), w, report);
  }

  if (recipe.value_rotation) rotate_value_heads(config, w, report);
  if (recipe.values_together) w.v_rounding = value_roundings(config, w);

  if (recipe.lambda2) {
    const std::array<lq::ConstMatrixRef, 2> readers{matrix(std::as_const(w.linear[kGate])),
                                                    matrix(std::as_const(w.linear[kUp]))};
    const lq::ChannelScales scales = lq::channel_scales(readers, recipe.lambda2_c);
    report.clamped += scales.clamped;
    report.zero_channels += scales.zero;
    fold_columns(w.linear[kGate], scales.lambda, report.input_mean_square[kGate], report.input_mean[kGate]);
    fold_columns(w.linear[kUp], scales.lambda, report.input_mean_square[kUp], report.input_mean[kUp]);
    lq::divide(w.mlp_norm, scales.lambda);
  }
  if (recipe.lambda3) {
    const std::array<lq::ConstMatrixRef, 1> readers{matrix(std::as_const(w.linear[kDown]))};
    const lq::ChannelScales scales = lq::channel_scales(readers, recipe.lambda3_c);
    report.clamped += scales.clamped;
    report.zero_channels += scales.zero;
    fold_columns(w.linear[kDown], scales.lambda, report.input_mean_square[kDown], report.input_mean[kDown]);
    divide_output(w.linear[kUp], scales.lambda);
  }
  return report;
}

}  // namespace fireq::calib
