// Error metrics and outlier statistics, FP64 sums in a fixed order.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace fireq::libquant {

// Sums of squares of a reference and of the difference to it; mergeable (maxima exactly, sums to FP64
// rounding).
struct ErrorSums {
  double reference_sq = 0;
  double error_sq = 0;
  double max_abs_error = 0;
  void add(std::span<const float> reference, std::span<const float> value);
  void merge(const ErrorSums& other);
  double relative() const;  // Frobenius norm of the error over the reference's; 0 for 0/0, inf for x/0
  double snr_db() const;    // -20 log10(relative)
  double relative_mse() const;
};

// Moments over all channels of a site: rms = sqrt(mean x^2), kurtosis = mean x^4 / (mean x^2)^2 (3 for a
// Gaussian; moments about zero). Zeros where nothing was counted.
struct ChannelSummary {
  double absmax = 0, rms = 0, max_over_rms = 0, kurtosis = 0;
};
struct OutlierChannel {
  std::uint64_t channel = 0;
  double absmax = 0;
  double ratio =
      0;  // absmax over the site's median channel absmax; infinity when that is 0 and absmax is not
};
// From per-channel absmax [C], sum x^2 [C], sum x^4 [C] and a count of tokens per channel.
ChannelSummary summarize(std::span<const float> absmax, std::span<const double> sumsq,
                         std::span<const double> sum4, std::uint64_t count);
// The k channels with the largest absmax, largest first, ties by channel.
std::vector<OutlierChannel> top_outliers(std::span<const float> absmax, std::size_t k);

}  // namespace fireq::libquant
