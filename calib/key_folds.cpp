#include "calib/key_folds.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "common/error.hpp"
#include "libquant/kv_rounding.hpp"
#include "libquant/smoothing.hpp"

namespace fireq::calib {
namespace {

using formats::Site;
using formats::SiteStatistics;

void require(const char* what, std::uint64_t expected, std::uint64_t found) {
  if (expected == found) return;
  throw Error(ErrorKind::input, std::string("statistics do not fit the model: ") + what)
      .expected(std::to_string(expected) + " channels")
      .found(std::to_string(found));
}

// Root mean square of the queries that meet each key channel.
std::vector<double> query_sizes(const SiteStatistics& q, std::uint64_t kv_rows, std::uint64_t head_dim) {
  const std::uint64_t group = q.sumsq.size() / kv_rows;
  std::vector<double> size(kv_rows);
  for (std::uint64_t c = 0; c < kv_rows; ++c) {
    double sum = 0;
    for (std::uint64_t r = 0; r < group; ++r)
      sum += q.sumsq[(c / head_dim * group + r) * head_dim + c % head_dim];
    size[c] = q.count == 0 ? 0 : std::sqrt(sum / static_cast<double>(q.count * group));
  }
  return size;
}

// Fourth root of the keys' fourth moment about `centre`.
std::vector<double> key_sizes(const SiteStatistics& k, const std::vector<double>& centre) {
  std::vector<double> size(k.sum4.size());
  const double n = k.count == 0 ? 1 : static_cast<double>(k.count);
  for (std::size_t c = 0; c < size.size(); ++c) {
    const double m = centre[c];
    const double square = k.sumsq[c] / n - 2 * m * k.sum1[c] / n + m * m;
    const double fourth = k.sum4[c] / n - 4 * m * k.sum3[c] / n + 6 * m * m * k.sumsq[c] / n -
                          4 * m * m * m * k.sum1[c] / n + m * m * m * m;
    // Where the difference of large sums has lost its digits: never less than the square of the second.
    size[c] = std::sqrt(std::sqrt(std::max(fourth, std::max(square, 0.0) * std::max(square, 0.0))));
  }
  return size;
}

// The mean of each channel on heads where taking it off lessens the error, 0 elsewhere.
std::vector<double> centres(const formats::LayerStatistics& statistics, std::uint64_t head_dim) {
  const SiteStatistics& k = statistics.site(Site::k_post_rope);
  std::vector<double> centre(k.sum1.size(), 0.0);
  if (statistics.k_centre_gain.empty() || k.count == 0) return centre;
  require("k_centre_gain", k.sum1.size(), statistics.k_centre_gain.size() * head_dim);
  for (std::size_t c = 0; c < centre.size(); ++c) {
    if (statistics.k_centre_gain[c / head_dim] > 0) centre[c] = k.sum1[c] / static_cast<double>(k.count);
  }
  return centre;
}

// The queries' products, less what keys were multiplied with, as factors of each head.
std::vector<float> roundings(const std::vector<double>& products, const libquant::KeySmoothing& keys,
                             std::uint64_t kv_heads, std::uint64_t head_dim) {
  if (products.size() != kv_heads * head_dim * head_dim) {
    throw Error(ErrorKind::input, "statistics do not fit the recipe: q_products")
        .expected(std::to_string(kv_heads * head_dim * head_dim) + " values, for keys.together")
        .found(std::to_string(products.size()))
        .hint("calibrate again, or set keys.together to false");
  }
  std::vector<float> out;
  std::vector<double> moment(head_dim * head_dim);
  for (std::uint64_t h = 0; h < kv_heads; ++h) {
    const auto factor = [&](std::uint64_t c) {
      return static_cast<double>(keys.n[h * head_dim + c]) * static_cast<double>(keys.s[h * head_dim + c]);
    };
    for (std::uint64_t i = 0; i < head_dim; ++i) {
      for (std::uint64_t j = 0; j < head_dim; ++j) {
        moment[i * head_dim + j] = products[(h * head_dim + i) * head_dim + j] / (factor(i) * factor(j));
      }
    }
    const std::vector<float> of_head = libquant::kv_rounding(moment, head_dim);
    out.insert(out.end(), of_head.begin(), of_head.end());
  }
  return out;
}

}  // namespace

KeyFolds key_folds(const Recipe& recipe, const formats::LayerStatistics& statistics, std::uint64_t kv_heads,
                   std::uint64_t head_dim, bool qk_norm) {
  libquant::KeySmoothingOptions options;
  options.use_n = recipe.key_n;
  options.use_s = recipe.key_s;
  options.shared_heads = qk_norm;
  options.alpha = recipe.key_alpha;
  options.beta = recipe.key_beta;
  options.n_exponent = recipe.key_n_exponent;
  options.s_exponent = recipe.key_s_exponent;
  options.top_k = recipe.key_top_k;
  const SiteStatistics& k = statistics.site(Site::k_post_rope);
  const std::vector<double> centre =
      recipe.key_centre ? centres(statistics, head_dim) : std::vector<double>(k.sum4.size(), 0.0);
  libquant::KeySmoothing keys;
  if (recipe.key_factors == KeyFactors::maxima) {
    keys = libquant::key_smoothing(statistics.k_pair_radius, k.absmax, kv_heads, head_dim, options);
  } else {
    const SiteStatistics& q = statistics.site(Site::q);
    const std::uint64_t rows = kv_heads * head_dim;
    require("k_post_rope", rows, k.sum4.size());
    if (q.sumsq.empty() || q.sumsq.size() % rows != 0) require("q", rows, q.sumsq.size());
    keys = libquant::key_smoothing_by_size(query_sizes(q, rows, head_dim), key_sizes(k, centre), kv_heads,
                                           head_dim, options);
  }
  std::vector<float> shift(centre.size());
  for (std::size_t c = 0; c < shift.size(); ++c) {
    shift[c] = static_cast<float>(centre[c] * static_cast<double>(keys.n[c]));
  }
  std::vector<float> rounding;
  if (recipe.keys_together) rounding = roundings(statistics.q_products, keys, kv_heads, head_dim);
  return {std::move(keys.n), std::move(keys.s), std::move(shift), std::move(rounding)};
}

}  // namespace fireq::calib
