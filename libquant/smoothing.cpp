#include "libquant/smoothing.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <string>

#include "common/error.hpp"

namespace fireq::libquant {
namespace {

[[noreturn]] void mismatch(const char* what, std::uint64_t expected, std::uint64_t found) {
  throw Error(ErrorKind::internal, std::string(what) + " differs in size")
      .expected(std::to_string(expected))
      .found(std::to_string(found));
}

template <typename Matrix>
void check_shape(const Matrix& w) {
  if (w.data.size() != w.rows * w.cols) mismatch("a matrix and its shape", w.rows * w.cols, w.data.size());
}

void add_column_sums(const ConstMatrixRef& w, std::vector<double>& sums) {
  for (std::uint64_t row = 0; row < w.rows; ++row) {
    const float* values = w.data.data() + row * w.cols;
    for (std::uint64_t j = 0; j < w.cols; ++j) sums[j] += static_cast<double>(std::fabs(values[j]));
  }
}

// Mean |w| per channel to lambda: c / mean, clamped around the median of the channels that have one.
ChannelScales from_means(const std::vector<double>& mean, double c) {
  if (!(std::isfinite(c) && c > 0)) {
    throw Error(ErrorKind::usage, "the smoothing constant is impossible")
        .expected("a finite number > 0")
        .found(std::to_string(c));
  }
  ChannelScales result;
  result.lambda.assign(mean.size(), 1.0F);
  std::vector<double> known;
  known.reserve(mean.size());
  for (std::size_t j = 0; j < mean.size(); ++j) {
    if (!std::isfinite(mean[j])) {
      throw Error(ErrorKind::input, "a weight is not a finite number")
          .expected("finite weights")
          .found("NaN or infinity in input channel " + std::to_string(j));
    }
    if (mean[j] > 0) known.push_back(c / mean[j]);
  }
  result.zero = mean.size() - known.size();
  if (known.empty()) return result;
  const std::size_t half = known.size() / 2;
  std::sort(known.begin(), known.end());
  const double median = known.size() % 2 == 1 ? known[half] : 0.5 * (known[half - 1] + known[half]);
  for (std::size_t j = 0; j < mean.size(); ++j) {
    if (!(mean[j] > 0)) continue;
    const double lambda = c / mean[j];
    const double clamped = std::clamp(lambda, median * 0x1p-8, median * 0x1p8);
    if (clamped != lambda) ++result.clamped;
    result.lambda[j] = static_cast<float>(clamped);
  }
  return result;
}

void check_heads(std::uint64_t heads, std::uint64_t kv_heads) {
  if (kv_heads == 0 || heads == 0 || heads % kv_heads != 0) {
    throw Error(ErrorKind::internal, "heads are no multiple of KV heads")
        .found(std::to_string(heads) + " and " + std::to_string(kv_heads));
  }
}

template <typename Op>
void by_column(const MatrixRef& w, std::span<const float> factor, Op op) {
  check_shape(w);
  if (factor.size() != w.cols) mismatch("a factor per column", w.cols, factor.size());
  for (std::uint64_t row = 0; row < w.rows; ++row) {
    float* values = w.data.data() + row * w.cols;
    for (std::uint64_t j = 0; j < w.cols; ++j) values[j] = op(values[j], factor[j]);
  }
}
template <typename Op>
void by_row(const MatrixRef& w, std::span<const float> factor, Op op) {
  check_shape(w);
  if (factor.size() != w.rows) mismatch("a factor per row", w.rows, factor.size());
  for (std::uint64_t row = 0; row < w.rows; ++row) {
    float* values = w.data.data() + row * w.cols;
    for (std::uint64_t j = 0; j < w.cols; ++j) values[j] = op(values[j], factor[row]);
  }
}
template <typename Op>
void by_element(std::span<float> v, std::span<const float> factor, Op op) {
  if (factor.size() != v.size()) mismatch("a factor per element", v.size(), factor.size());
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = op(v[i], factor[i]);
}
constexpr auto kTimes = [](float a, float b) { return a * b; };
constexpr auto kOver = [](float a, float b) { return a / b; };

// (numerator / denominator)^exponent, or 1 where the denominator is 0 or so small that FP32 cannot hold the
// factor.
float factor_or_one(double numerator, float denominator, double exponent) {
  if (!(denominator > 0)) return 1;
  const auto factor = static_cast<float>(std::pow(numerator / static_cast<double>(denominator), exponent));
  return std::isnormal(factor) ? factor : 1.0F;
}

void check_statistics(std::span<const float> values, const char* what) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (std::isfinite(values[i]) && values[i] >= 0) continue;
    throw Error(ErrorKind::input, std::string(what) + " is impossible")
        .expected("a finite number >= 0")
        .found(std::to_string(values[i]) + " at " + std::to_string(i));
  }
}

void check_head_dim(std::uint64_t head_dim) {
  if (head_dim != 0 && head_dim % 2 == 0) return;
  throw Error(ErrorKind::input, "RoPE pairs need an even head_dim").found(std::to_string(head_dim));
}

void check_constants(const KeySmoothingOptions& options) {
  for (const double constant : {options.alpha, options.beta}) {
    if (std::isfinite(constant) && constant > 0) continue;
    throw Error(ErrorKind::usage, "a key smoothing constant is impossible")
        .expected("a finite number > 0")
        .found(std::to_string(constant));
  }
}

}  // namespace

ChannelScales channel_scales(std::span<const ConstMatrixRef> readers, double c) {
  if (readers.empty()) throw Error(ErrorKind::internal, "channel scales of no matrix");
  std::vector<double> mean(readers[0].cols, 0.0);
  std::uint64_t rows = 0;
  for (const ConstMatrixRef& w : readers) {
    check_shape(w);
    if (w.cols != mean.size()) mismatch("the readers of one input", mean.size(), w.cols);
    add_column_sums(w, mean);
    rows += w.rows;
  }
  if (rows > 0) {
    for (double& m : mean) m /= static_cast<double>(rows);
  }
  return from_means(mean, c);
}

ChannelScales value_channel_scales(const ConstMatrixRef& o_proj, std::uint64_t heads, std::uint64_t kv_heads,
                                   std::uint64_t head_dim, double c) {
  check_shape(o_proj);
  check_heads(heads, kv_heads);
  if (o_proj.cols != heads * head_dim) mismatch("o_proj's input", heads * head_dim, o_proj.cols);
  std::vector<double> sums(o_proj.cols, 0.0);
  add_column_sums(o_proj, sums);
  const std::uint64_t repeat = heads / kv_heads;
  std::vector<double> mean(kv_heads * head_dim, 0.0);
  for (std::uint64_t g = 0; g < kv_heads; ++g) {
    for (std::uint64_t r = 0; r < repeat; ++r) {
      for (std::uint64_t d = 0; d < head_dim; ++d)
        mean[g * head_dim + d] += sums[(g * repeat + r) * head_dim + d];
    }
  }
  if (o_proj.rows > 0) {
    for (double& m : mean) m /= static_cast<double>(o_proj.rows * repeat);
  }
  return from_means(mean, c);
}

std::vector<float> uniform_value_scales(std::uint64_t kv_heads, std::uint64_t head_dim, double v_factor) {
  if (!(std::isfinite(v_factor) && v_factor > 0)) {
    throw Error(ErrorKind::usage, "the factor of v_proj is impossible")
        .expected("a finite number > 0")
        .found(std::to_string(v_factor));
  }
  return std::vector<float>(kv_heads * head_dim, static_cast<float>(1.0 / v_factor));
}

std::vector<float> expand_value_channels(std::span<const float> lambda, std::uint64_t heads,
                                         std::uint64_t kv_heads, std::uint64_t head_dim) {
  check_heads(heads, kv_heads);
  if (lambda.size() != kv_heads * head_dim)
    mismatch("a factor per value channel", kv_heads * head_dim, lambda.size());
  const std::uint64_t repeat = heads / kv_heads;
  std::vector<float> spread(heads * head_dim);
  for (std::uint64_t head = 0; head < heads; ++head) {
    const std::uint64_t g = head / repeat;
    for (std::uint64_t d = 0; d < head_dim; ++d) spread[head * head_dim + d] = lambda[g * head_dim + d];
  }
  return spread;
}

void scale_columns(const MatrixRef& w, std::span<const float> factor) {
  by_column(w, factor, kTimes);
}
void divide_rows(const MatrixRef& w, std::span<const float> factor) {
  by_row(w, factor, kOver);
}
void scale_rows(const MatrixRef& w, std::span<const float> factor) {
  by_row(w, factor, kTimes);
}
void divide(std::span<float> v, std::span<const float> factor) {
  by_element(v, factor, kOver);
}
void scale(std::span<float> v, std::span<const float> factor) {
  by_element(v, factor, kTimes);
}

KeySmoothing key_smoothing(std::span<const float> pair_radius, std::span<const float> post_rope_absmax,
                           std::uint64_t kv_heads, std::uint64_t head_dim,
                           const KeySmoothingOptions& options) {
  check_head_dim(head_dim);
  const std::uint64_t half = head_dim / 2;
  if (pair_radius.size() != kv_heads * half)
    mismatch("a radius per pair", kv_heads * half, pair_radius.size());
  if (post_rope_absmax.size() != kv_heads * head_dim) {
    mismatch("a maximum per key channel", kv_heads * head_dim, post_rope_absmax.size());
  }
  check_constants(options);
  check_statistics(pair_radius, "a pair radius of keys");
  check_statistics(post_rope_absmax, "a key maximum after RoPE");

  KeySmoothing result;
  result.n.assign(kv_heads * head_dim, 1.0F);
  result.s.assign(kv_heads * head_dim, 1.0F);
  std::vector<bool> touched(kv_heads * half, false);  // pairs in T'
  if (options.use_s) {
    const auto rounded = static_cast<std::uint64_t>(std::llround(static_cast<double>(head_dim) / 16.0));
    const std::uint64_t wanted = options.top_k != 0 ? options.top_k : std::max<std::uint64_t>(1, rounded);
    const std::uint64_t top_k = std::min(wanted, head_dim);
    std::vector<std::uint64_t> order(head_dim);
    for (std::uint64_t h = 0; h < kv_heads; ++h) {
      const float* m = post_rope_absmax.data() + h * head_dim;
      std::iota(order.begin(), order.end(), std::uint64_t{0});
      std::stable_sort(order.begin(), order.end(),
                       [m](std::uint64_t a, std::uint64_t b) { return m[a] > m[b]; });
      for (std::uint64_t i = 0; i < top_k; ++i) touched[h * half + order[i] % half] = true;
      for (std::uint64_t j = 0; j < head_dim; ++j) {
        if (touched[h * half + j % half]) {
          result.s[h * head_dim + j] = factor_or_one(options.beta, m[j], options.s_exponent);
        }
      }
    }
  }
  if (!options.use_n) return result;
  for (std::uint64_t i = 0; i < half; ++i) {
    float largest = 0;
    bool any_touched = false;
    for (std::uint64_t h = 0; h < kv_heads; ++h) {
      largest = std::max(largest, pair_radius[h * half + i]);
      any_touched = any_touched || touched[h * half + i];
    }
    for (std::uint64_t h = 0; h < kv_heads; ++h) {
      if (options.shared_heads ? any_touched : touched[h * half + i]) continue;
      const float r = options.shared_heads ? largest : pair_radius[h * half + i];
      const float n = factor_or_one(options.alpha, r, options.n_exponent);
      result.n[h * head_dim + i] = n;
      result.n[h * head_dim + i + half] = n;
    }
  }
  return result;
}

namespace {

// Sizes with a floor, so that a channel which is all but silent gets no factor beyond reason.
std::vector<double> floored_sizes(std::span<const double> size, std::uint64_t kv_heads, std::uint64_t dim,
                                  const char* what) {
  std::vector<double> out(size.begin(), size.end());
  for (std::size_t i = 0; i < out.size(); ++i) {
    if (std::isfinite(out[i]) && out[i] >= 0) continue;
    throw Error(ErrorKind::input, std::string(what) + " is impossible")
        .expected("a finite number >= 0")
        .found(std::to_string(out[i]) + " at " + std::to_string(i));
  }
  constexpr double kFloor = 0x1p-12;  // of the head's largest
  for (std::uint64_t h = 0; h < kv_heads; ++h) {
    const auto head = out.begin() + static_cast<std::ptrdiff_t>(h * dim);
    const double largest = *std::max_element(head, head + static_cast<std::ptrdiff_t>(dim));
    for (std::uint64_t j = 0; j < dim; ++j) {
      double& x = out[h * dim + j];
      x = largest > 0 ? std::max(x, kFloor * largest) : 1.0;
    }
  }
  return out;
}

// Power mean of two or more sizes.
double power_mean(std::span<const double> sizes, double power) {
  double sum = 0;
  for (const double x : sizes) sum += std::pow(x, power);
  return std::pow(sum / static_cast<double>(sizes.size()), 1 / power);
}

// Key smoothing by size, for all heads of a layer.
class SizeSmoother {
 public:
  SizeSmoother(std::span<const double> query, std::span<const double> key, std::uint64_t kv_heads,
               std::uint64_t dim, const KeySmoothingOptions& options)
      : options_(options),
        heads_(kv_heads),
        dim_(dim),
        half_(dim / 2),
        query_(floored_sizes(query, kv_heads, dim, "a query size")),
        key_(floored_sizes(key, kv_heads, dim, "a key size")),
        pair_(kv_heads * half_),
        touched_(kv_heads * half_, false) {}

  KeySmoothing run() {
    for (std::uint64_t h = 0; h < heads_; ++h) {
      for (std::uint64_t i = 0; i < half_; ++i) pair_[h * half_ + i] = pair_factor(h, i);
    }
    if (options_.use_s) choose_pairs();
    KeySmoothing result;
    result.n.assign(heads_ * dim_, 1.0F);
    result.s.assign(heads_ * dim_, 1.0F);
    std::vector<double> unit(heads_);
    for (std::uint64_t h = 0; h < heads_; ++h) unit[h] = unit_of(h);
    if (options_.shared_heads) unit.assign(heads_, *std::min_element(unit.begin(), unit.end()));
    for (std::uint64_t h = 0; h < heads_; ++h) {
      for (std::uint64_t j = 0; j < dim_; ++j) {
        const auto factor = static_cast<float>(unit[h] * factor_of(h, j));
        if (!std::isnormal(factor)) continue;
        if (touched_[h * half_ + j % half_]) {
          result.s[h * dim_ + j] = factor;
        } else if (options_.use_n) {
          result.n[h * dim_ + j] = factor;
        }
      }
    }
    return result;
  }

 private:
  static double formula(double query, double key, double e) {
    return std::pow(query, 1 - e) / std::pow(key, e);
  }
  double single_factor(std::uint64_t h, std::uint64_t j) const {
    return formula(query_[h * dim_ + j], key_[h * dim_ + j], options_.s_exponent);
  }
  // Both members of a pair together; with shared_heads, those of all heads.
  double pair_factor(std::uint64_t h, std::uint64_t i) const {
    std::vector<double> q, k;
    for (std::uint64_t head = options_.shared_heads ? 0 : h; head < (options_.shared_heads ? heads_ : h + 1);
         ++head) {
      for (const std::uint64_t j : {i, i + half_}) {
        q.push_back(query_[head * dim_ + j]);
        k.push_back(key_[head * dim_ + j]);
      }
    }
    return formula(power_mean(q, 2), power_mean(k, 4), options_.n_exponent);
  }
  double factor_of(std::uint64_t h, std::uint64_t j) const {
    return touched_[h * half_ + j % half_] ? single_factor(h, j) : pair_[h * half_ + j % half_];
  }

  // T': the pairs whose members want the most different factors.
  void choose_pairs() {
    const auto rounded = static_cast<std::uint64_t>(std::llround(static_cast<double>(dim_) / 16.0));
    const std::uint64_t wanted = options_.top_k != 0 ? options_.top_k : std::max<std::uint64_t>(1, rounded);
    std::vector<double> gain(heads_ * half_);
    for (std::uint64_t h = 0; h < heads_; ++h) {
      for (std::uint64_t i = 0; i < half_; ++i) {
        const double pair = pair_[h * half_ + i];
        const double both = std::fabs(std::log(single_factor(h, i) / pair)) +
                            std::fabs(std::log(single_factor(h, i + half_) / pair));
        gain[(options_.shared_heads ? 0 : h) * half_ + i] += both;
      }
    }
    std::vector<std::uint64_t> order(half_);
    for (std::uint64_t h = 0; h < heads_; ++h) {
      const double* g = gain.data() + (options_.shared_heads ? 0 : h) * half_;
      std::iota(order.begin(), order.end(), std::uint64_t{0});
      std::stable_sort(order.begin(), order.end(),
                       [g](std::uint64_t a, std::uint64_t b) { return g[a] > g[b]; });
      for (std::uint64_t i = 0; i < std::min(wanted, half_); ++i) touched_[h * half_ + order[i]] = true;
    }
  }

  // With N: the largest key of the head becomes alpha. Without: factors are relative to the untouched pairs,
  // which keep theirs.
  double unit_of(std::uint64_t h) const {
    double largest = 0;
    double logarithms = 0;
    std::uint64_t untouched = 0;
    for (std::uint64_t j = 0; j < dim_; ++j) {
      largest = std::max(largest, key_[h * dim_ + j] * factor_of(h, j));
      if (touched_[h * half_ + j % half_]) continue;
      logarithms += std::log(factor_of(h, j));
      ++untouched;
    }
    if (options_.use_n) return options_.alpha / largest;
    return untouched == 0 ? options_.alpha / largest : std::exp(-logarithms / static_cast<double>(untouched));
  }

  const KeySmoothingOptions& options_;
  const std::uint64_t heads_, dim_, half_;
  const std::vector<double> query_, key_;  // [heads, D]
  std::vector<double> pair_;               // [heads, D/2]
  std::vector<bool> touched_;              // [heads, D/2]
};

// rows [dim, cols] = R^T rows.
void rotate_rows(float* rows, std::uint64_t cols, std::uint64_t dim, const std::vector<double>& r) {
  std::vector<double> column(dim);
  for (std::uint64_t c = 0; c < cols; ++c) {
    for (std::uint64_t d = 0; d < dim; ++d) column[d] = static_cast<double>(rows[d * cols + c]);
    for (std::uint64_t e = 0; e < dim; ++e) {
      double sum = 0;
      for (std::uint64_t d = 0; d < dim; ++d) sum += r[d * dim + e] * column[d];
      rows[e * cols + c] = static_cast<float>(sum);
    }
  }
}

}  // namespace

KeySmoothing key_smoothing_by_size(std::span<const double> query_size, std::span<const double> key_size,
                                   std::uint64_t kv_heads, std::uint64_t head_dim,
                                   const KeySmoothingOptions& options) {
  check_head_dim(head_dim);
  for (const auto& size : {query_size, key_size}) {
    if (size.size() != kv_heads * head_dim)
      mismatch("a size per key channel", kv_heads * head_dim, size.size());
  }
  check_constants(options);
  return SizeSmoother(query_size, key_size, kv_heads, head_dim, options).run();
}

std::vector<double> spreading_rotation(std::uint64_t dim) {
  std::vector<double> r(dim * dim);
  const auto n = static_cast<double>(dim);
  for (std::uint64_t d = 0; d < dim; ++d) {
    for (std::uint64_t e = 0; e < dim; ++e) {
      const double angle = std::numbers::pi * static_cast<double>((2 * d + 1) * e) / (2 * n);
      r[d * dim + e] = std::cos(angle) * std::sqrt((e == 0 ? 1 : 2) / n);
    }
  }
  return r;
}

void rotate_values(const MatrixRef& v_proj, std::span<float> v_bias, const MatrixRef& o_proj,
                   std::uint64_t heads, std::uint64_t kv_heads, std::uint64_t head_dim) {
  check_shape(v_proj);
  check_shape(o_proj);
  check_heads(heads, kv_heads);
  if (v_proj.rows != kv_heads * head_dim) mismatch("v_proj's output", kv_heads * head_dim, v_proj.rows);
  if (o_proj.cols != heads * head_dim) mismatch("o_proj's input", heads * head_dim, o_proj.cols);
  if (!v_bias.empty() && v_bias.size() != v_proj.rows) mismatch("v_proj's bias", v_proj.rows, v_bias.size());
  const std::vector<double> r = spreading_rotation(head_dim);
  for (std::uint64_t g = 0; g < kv_heads; ++g) {
    rotate_rows(v_proj.data.data() + g * head_dim * v_proj.cols, v_proj.cols, head_dim, r);
    if (!v_bias.empty()) rotate_rows(v_bias.data() + g * head_dim, 1, head_dim, r);
  }
  for (std::uint64_t row = 0; row < o_proj.rows; ++row) {
    for (std::uint64_t h = 0; h < heads; ++h) {
      rotate_rows(o_proj.data.data() + row * o_proj.cols + h * head_dim, 1, head_dim, r);
    }
  }
}

}  // namespace fireq::libquant
