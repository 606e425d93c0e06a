#include "formats/statistics.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/checked.hpp"
#include "common/error.hpp"
#include "formats/names.hpp"
#include "formats/statistics_file.hpp"

namespace fireq::formats {
namespace {

constexpr std::array<std::string_view, kSites> kSiteNames{"attn_in", "q",    "k_pre_rope", "k_post_rope",
                                                          "v",       "o_in", "mlp_in",     "down_in"};

template <typename T>
void take_maxima(std::vector<T>& into, const std::vector<T>& from) {
  std::transform(into.begin(), into.end(), from.begin(), into.begin(),
                 [](T a, T b) { return std::max(a, b); });
}

void add_sums(std::vector<double>& into, const std::vector<double>& from) {
  std::transform(into.begin(), into.end(), from.begin(), into.begin(), std::plus<>());
}

std::optional<unsigned __int128> parse_hex128(const std::string& text) {
  if (text.size() != 32) return std::nullopt;
  unsigned __int128 value = 0;
  for (const char c : text) {
    const std::size_t digit = std::string_view("0123456789abcdef").find(c);
    if (digit == std::string_view::npos) return std::nullopt;
    value = value << 4U | digit;
  }
  return value;
}

Error mismatch(const char* what, std::uint64_t expected, std::uint64_t found) {
  Error error(ErrorKind::input, std::string("statistics of another model: ") + what + " differs");
  return error.expected(std::to_string(expected)).found(std::to_string(found));
}

// Everything that could fail, before anything changes.
void check_mergeable(const CalibrationStatistics& a, const CalibrationStatistics& b) {
  if (a.meta.model_fingerprint != b.meta.model_fingerprint) {
    throw Error(ErrorKind::input, "statistics of another model")
        .expected("model fingerprint " + a.meta.model_fingerprint)
        .found(b.meta.model_fingerprint)
        .hint("only statistics of one model can be merged");
  }
  if (a.layers.size() != b.layers.size()) {
    throw mismatch("the number of layers", a.layers.size(), b.layers.size());
  }
  if (a.meta.kv_heads != b.meta.kv_heads) {
    throw mismatch("the number of KV heads", a.meta.kv_heads, b.meta.kv_heads);
  }
  if (a.meta.head_dim != b.meta.head_dim) throw mismatch("head_dim", a.meta.head_dim, b.meta.head_dim);
  for (std::size_t layer = 0; layer < a.layers.size(); ++layer) {
    for (std::size_t s = 0; s < kSites; ++s) {
      const SiteStatistics& x = a.layers[layer].sites[s];
      const SiteStatistics& y = b.layers[layer].sites[s];
      if (x.empty() || y.empty() || x.absmax.size() == y.absmax.size()) continue;
      const std::string what =
          "channels of layer " + std::to_string(layer) + " " + std::string(kSiteNames[s]);
      throw mismatch(what.c_str(), x.absmax.size(), y.absmax.size());
    }
  }
}

std::string merge_fingerprints(const std::string& a, const std::string& b) {
  const auto x = parse_hex128(a);
  const auto y = parse_hex128(b);
  if (!x || !y) {
    throw Error(ErrorKind::input, "text fingerprint is malformed")
        .expected("32 hexadecimal digits")
        .found(in_quotes(x ? b : a));
  }
  const unsigned __int128 sum = *x + *y;
  return hex128(static_cast<std::uint64_t>(sum >> 64U), static_cast<std::uint64_t>(sum));
}

class Checker {
 public:
  explicit Checker(const std::string& path) : path_(path) {}

  void layer(const LayerStatistics& layer, std::size_t index, const StatisticsMeta& meta) {
    const std::string group = "/layers/" + layer_group_name(index) + "/";
    for (std::size_t s = 0; s < kSites; ++s) {
      const std::uint64_t kv = is_kv(static_cast<Site>(s)) ? meta.kv_heads * meta.head_dim : 0;
      site(layer.sites[s], group + std::string(kSiteNames[s]) + "/", kv);
    }
    if (!layer.k_pair_radius.empty()) {
      const std::string name = group + kRadiusDataset.name;
      size(name, layer.k_pair_radius.size(), meta.kv_heads * (meta.head_dim / 2));
      values(name, layer.k_pair_radius, true);
    }
    if (!layer.k_centre_gain.empty()) {
      const std::string name = group + kCentreDataset.name;
      size(name, layer.k_centre_gain.size(), meta.kv_heads);
      values(name, layer.k_centre_gain, false);
    }
    if (!layer.q_products.empty()) {
      const std::string name = group + kProductsDataset.name;
      size(name, layer.q_products.size(), meta.kv_heads * meta.head_dim * meta.head_dim);
      values(name, layer.q_products, false);
    }
  }

 private:
  static bool is_kv(Site site) {
    return site == Site::k_pre_rope || site == Site::k_post_rope || site == Site::v;
  }

  void site(const SiteStatistics& s, const std::string& group, std::uint64_t kv_channels) {
    if (s.empty()) {
      if (!s.absmax.empty() &&
          std::any_of(s.absmax.begin(), s.absmax.end(), [](float v) { return v != 0; })) {
        throw error(group + "count", "values without tokens").expected("a count above 0").found("0");
      }
      return;
    }
    const std::size_t channels = s.absmax.size();
    if (channels == 0) throw error(group + "absmax", "a site without channels");
    if (kv_channels != 0) size(group + "absmax", channels, kv_channels);
    values(group + "absmax", s.absmax, true);
    const std::array<std::pair<const char*, const std::vector<double>*>, 5> sums{{{"abssum", &s.abssum},
                                                                                  {"sumsq", &s.sumsq},
                                                                                  {"sum4", &s.sum4},
                                                                                  {"sum1", &s.sum1},
                                                                                  {"sum3", &s.sum3}}};
    for (std::size_t i = 0; i < sums.size(); ++i) {
      size(group + sums[i].first, sums[i].second->size(), channels);
      values(group + sums[i].first, *sums[i].second, i < 3);
    }
    size(group + "histogram", s.histogram.size(), kHistogramBins);
    std::uint64_t total = 0;
    for (const std::uint64_t n : s.histogram) total = checked_add(total, n, group + "histogram");
    const std::uint64_t expected = checked_mul(s.count, channels, group + "count");
    if (total != expected) {
      throw error(group + "histogram", "the histogram does not hold every value")
          .expected(std::to_string(expected))
          .found(std::to_string(total));
    }
  }

  Error error(const std::string& name, std::string message) const {
    return std::move(Error(ErrorKind::input, std::move(message)).path(path_).tensor(name));
  }
  void size(const std::string& name, std::uint64_t found, std::uint64_t expected) const {
    if (found == expected) return;
    throw error(name, "wrong number of values")
        .expected(std::to_string(expected))
        .found(std::to_string(found));
  }
  template <typename T>
  void values(const std::string& name, const std::vector<T>& list, bool not_negative) const {
    for (std::size_t i = 0; i < list.size(); ++i) {
      if (std::isfinite(list[i]) && !(not_negative && list[i] < 0)) continue;
      throw error(name, "a value is out of range")
          .expected(not_negative ? "finite values of 0 or more" : "finite values")
          .found(std::to_string(list[i]) + " at [" + std::to_string(i) + "]");
    }
  }

  const std::string& path_;
};

}  // namespace

std::string_view site_name(Site site) noexcept {
  return kSiteNames[static_cast<std::size_t>(site)];
}

void SiteStatistics::merge(const SiteStatistics& other) {
  if (other.empty()) return;
  if (empty()) {
    *this = other;
    return;
  }
  if (absmax.size() != other.absmax.size()) {
    throw mismatch("the number of channels", absmax.size(), other.absmax.size());
  }
  const std::uint64_t tokens = checked_add(count, other.count, "tokens of merged statistics");
  take_maxima(absmax, other.absmax);
  add_sums(abssum, other.abssum);
  add_sums(sumsq, other.sumsq);
  add_sums(sum3, other.sum3);
  add_sums(sum4, other.sum4);
  add_sums(sum1, other.sum1);
  std::transform(histogram.begin(), histogram.end(), other.histogram.begin(), histogram.begin(),
                 std::plus<>());
  count = tokens;
}

namespace {

// Sums that either side may lack.
void merge_sums(const char* what, std::vector<double>& sums, const std::vector<double>& other) {
  if (sums.empty()) {
    sums = other;
  } else if (!other.empty()) {
    if (sums.size() != other.size()) throw mismatch(what, sums.size(), other.size());
    add_sums(sums, other);
  }
}

}  // namespace

void LayerStatistics::merge(const LayerStatistics& other) {
  for (std::size_t s = 0; s < kSites; ++s) sites[s].merge(other.sites[s]);
  if (k_pair_radius.empty()) {
    k_pair_radius = other.k_pair_radius;
  } else if (!other.k_pair_radius.empty()) {
    if (k_pair_radius.size() != other.k_pair_radius.size()) {
      throw mismatch("the number of key pairs", k_pair_radius.size(), other.k_pair_radius.size());
    }
    take_maxima(k_pair_radius, other.k_pair_radius);
  }
  merge_sums("the number of KV heads", k_centre_gain, other.k_centre_gain);
  merge_sums("the number of query products", q_products, other.q_products);
}

void CalibrationStatistics::merge(const CalibrationStatistics& other) {
  check_mergeable(*this, other);
  StatisticsMeta merged = meta;
  merged.text_fingerprint = merge_fingerprints(meta.text_fingerprint, other.meta.text_fingerprint);
  merged.tokens = checked_add(meta.tokens, other.meta.tokens, "tokens of merged statistics");
  merged.windows = checked_add(meta.windows, other.meta.windows, "windows of merged statistics");
  merged.seed = meta.seed == other.meta.seed ? meta.seed : 0;
  std::vector<LayerStatistics> sums = layers;
  for (std::size_t i = 0; i < sums.size(); ++i) sums[i].merge(other.layers[i]);
  layers = std::move(sums);
  meta = std::move(merged);
}

void check_statistics(const CalibrationStatistics& statistics, const std::string& path_for_errors) {
  const StatisticsMeta& meta = statistics.meta;
  for (const std::string* const text : {&meta.model_fingerprint, &meta.text_fingerprint}) {
    const bool plain = std::all_of(text->begin(), text->end(), [](char c) { return c > ' ' && c <= '~'; });
    if (plain && text->size() <= 64) continue;
    throw Error(ErrorKind::input, "a fingerprint is malformed")
        .path(path_for_errors)
        .tensor("/meta")
        .expected("at most 64 visible ASCII characters")
        .found(in_quotes(*text));
  }
  constexpr std::uint64_t kMostHeads = std::uint64_t{1} << 31U;
  if (meta.kv_heads > kMostHeads || meta.head_dim > kMostHeads) {
    throw Error(ErrorKind::input, "kv_heads or head_dim is out of range")
        .path(path_for_errors)
        .tensor("/meta");
  }
  Checker checker(path_for_errors);
  for (std::size_t i = 0; i < statistics.layers.size(); ++i) checker.layer(statistics.layers[i], i, meta);
}

}  // namespace fireq::formats
