#include "calib/key_folds.hpp"

#include <cmath>
#include <string>
#include <utility>

#include "common/error.hpp"
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
    for (std::uint64_t r = 0; r < group; ++r) sum += q.sumsq[(c / head_dim * group + r) * head_dim + c % head_dim];
    size[c] = q.count == 0 ? 0 : std::sqrt(sum / static_cast<double>(q.count * group));
  }
  return size;
}

// Fourth root of the keys' fourth moment.
std::vector<double> key_sizes(const SiteStatistics& k) {
  std::vector<double> size(k.sum4.size());
  for (std::size_t c = 0; c < size.size(); ++c) {
    size[c] = k.count == 0 ? 0 : std::sqrt(std::sqrt(k.sum4[c] / static_cast<double>(k.count)));
  }
  return size;
}

}  // namespace

KeyFolds key_folds(const Recipe& recipe, const formats::LayerStatistics& statistics,
                   std::uint64_t kv_heads, std::uint64_t head_dim, bool qk_norm) {
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
  libquant::KeySmoothing keys;
  if (recipe.key_factors == KeyFactors::maxima) {
    keys = libquant::key_smoothing(statistics.k_pair_radius, k.absmax, kv_heads, head_dim, options);
  } else {
    const SiteStatistics& q = statistics.site(Site::q);
    const std::uint64_t rows = kv_heads * head_dim;
    require("k_post_rope", rows, k.sum4.size());
    if (q.sumsq.empty() || q.sumsq.size() % rows != 0) require("q", rows, q.sumsq.size());
    keys = libquant::key_smoothing_by_size(query_sizes(q, rows, head_dim), key_sizes(k), kv_heads, head_dim,
                                           options);
  }
  return {std::move(keys.n), std::move(keys.s)};
}

}  // namespace fireq::calib
