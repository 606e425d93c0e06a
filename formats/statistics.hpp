// Calibration statistics as plain data, and their HDF5 file (docs/checkpoint-format.md, "Statistics file").
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "formats/file_system.hpp"

namespace fireq::formats {

enum class Site : std::uint8_t { attn_in, q, k_pre_rope, k_post_rope, v, o_in, mlp_in, down_in };
inline constexpr std::size_t kSites = 8;
std::string_view site_name(Site site) noexcept;

// Log2 histogram of |x|: bin 0 holds |x| < 2^-16 (zero too), bin i holds [2^(i-17), 2^(i-16)), the last bin
// everything above.
inline constexpr std::size_t kHistogramBins = 40;

// Sums over tokens, per channel. Mergeable: maxima and counts exact, FP64 sums to 1e-12.
struct SiteStatistics {
  std::vector<float> absmax;             // [C]
  std::vector<double> abssum;            // [C] sum |x|
  std::vector<double> sumsq;             // [C] sum x^2
  std::vector<double> sum3;              // [C] sum x^3 (kurtosis inputs)
  std::vector<double> sum4;              // [C] sum x^4
  std::vector<double> sum1;              // [C] sum x
  std::vector<std::uint64_t> histogram;  // [kHistogramBins] over all channels
  std::uint64_t count = 0;               // tokens

  bool empty() const noexcept { return count == 0; }
  void merge(const SiteStatistics& other);  // Error(input) when channel counts differ
};

struct LayerStatistics {
  std::array<SiteStatistics, kSites> sites;
  std::vector<float> k_pair_radius;  // [kv_heads * head_dim/2], max over tokens of the pre-RoPE pair radius
  // [kv_heads] or empty: squared error of the attention's outputs with keys cached in INT4 as they are, less
  // that with their mean taken off first; summed over sampled tokens (calib/key_centre.hpp).
  std::vector<double> k_centre_gain;
  // [kv_heads, head_dim, head_dim] or empty: sum of q^T q over tokens and over the query heads of each KV
  // head, q after RoPE. Symmetric.
  std::vector<double> q_products;

  SiteStatistics& site(Site s) { return sites[static_cast<std::size_t>(s)]; }
  const SiteStatistics& site(Site s) const { return sites[static_cast<std::size_t>(s)]; }
  void merge(const LayerStatistics& other);
};

struct StatisticsMeta {
  std::string model_fingerprint;
  // Of the token ids: 32 hex digits. Merging adds them as 128-bit numbers, so that neither order nor grouping
  // matters.
  std::string text_fingerprint;
  std::uint64_t tokens = 0;
  std::uint64_t windows = 0;
  std::uint64_t seed = 0;  // merged: 0 unless all are equal
  std::uint64_t kv_heads = 0, head_dim = 0;
};

struct CalibrationStatistics {
  StatisticsMeta meta;
  std::vector<LayerStatistics> layers;
  // Error(input) for another model's statistics; *this is then unchanged.
  void merge(const CalibrationStatistics& other);
};

// The rules of the content: sizes agree, values finite, maxima and even sums not negative, histograms hold
// count x channels values. Throws Error(input) with the dataset's name as the tensor.
void check_statistics(const CalibrationStatistics& statistics, const std::string& path_for_errors);

// Bytes of the file: equal statistics give equal bytes (of one version of the HDF5 library). Both
// check_statistics() first. Calls are serialised: the library has one global state.
std::string statistics_file_bytes(const CalibrationStatistics& statistics,
                                  const std::string& path_for_errors);
void write_statistics(FileSystem& fs, const std::string& path, const CalibrationStatistics& statistics);

// Throws Error(input) when the file is damaged or breaks a rule. A checksum over the whole file is compared
// first. The HDF5 library is not used to read: it is not made for files of strangers.
CalibrationStatistics read_statistics(const std::string& path);

}  // namespace fireq::formats
