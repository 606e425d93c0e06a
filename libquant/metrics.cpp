#include "libquant/metrics.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "common/error.hpp"

namespace fireq::libquant {

void ErrorSums::add(std::span<const float> reference, std::span<const float> value) {
  if (reference.size() != value.size()) {
    throw Error(ErrorKind::internal, "a reference and its approximation differ in size")
        .expected(std::to_string(reference.size()))
        .found(std::to_string(value.size()));
  }
  ErrorSums part;  // summed on its own first: one span's sums do not depend on what came before
  for (std::size_t i = 0; i < reference.size(); ++i) {
    const double exact = reference[i];
    const double error = static_cast<double>(value[i]) - exact;
    part.reference_sq += exact * exact;
    part.error_sq += error * error;
    // A NaN must not look like a perfect match.
    const double magnitude = std::fabs(error);
    if (!(magnitude <= part.max_abs_error)) part.max_abs_error = std::isnan(magnitude) ? HUGE_VAL : magnitude;
  }
  merge(part);
}

void ErrorSums::merge(const ErrorSums& other) {
  reference_sq += other.reference_sq;
  error_sq += other.error_sq;
  max_abs_error = std::max(max_abs_error, other.max_abs_error);
}

double ErrorSums::relative() const {
  return std::sqrt(relative_mse());
}

double ErrorSums::snr_db() const {
  return -10.0 * std::log10(relative_mse());
}

double ErrorSums::relative_mse() const {
  if (reference_sq == 0) return error_sq == 0 ? 0 : std::numeric_limits<double>::infinity();
  return error_sq / reference_sq;
}

ChannelSummary summarize(std::span<const float> absmax, std::span<const double> sumsq,
                         std::span<const double> sum4, std::uint64_t count) {
  if (sumsq.size() != absmax.size() || sum4.size() != absmax.size()) {
    throw Error(ErrorKind::internal, "channel statistics differ in size");
  }
  ChannelSummary summary;
  double second = 0, fourth = 0;
  for (std::size_t j = 0; j < absmax.size(); ++j) {
    summary.absmax = std::max(summary.absmax, static_cast<double>(absmax[j]));
    second += sumsq[j];
    fourth += sum4[j];
  }
  const double n = static_cast<double>(count) * static_cast<double>(absmax.size());
  if (n == 0 || second == 0) return summary;
  summary.rms = std::sqrt(second / n);
  summary.max_over_rms = summary.absmax / summary.rms;
  summary.kurtosis = (fourth / n) / ((second / n) * (second / n));
  return summary;
}

std::vector<OutlierChannel> top_outliers(std::span<const float> absmax, std::size_t k) {
  if (absmax.empty()) return {};
  // NaN sorts as infinity, so that it shows at the top and the order stays strict.
  std::vector<double> value(absmax.size());
  std::transform(absmax.begin(), absmax.end(), value.begin(),
                 [](float v) { return std::isnan(v) ? HUGE_VAL : static_cast<double>(v); });
  std::vector<std::uint64_t> order(absmax.size());
  std::iota(order.begin(), order.end(), std::uint64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&value](std::uint64_t a, std::uint64_t b) { return value[a] > value[b]; });
  const std::size_t half = order.size() / 2;
  const double median =
      order.size() % 2 == 1 ? value[order[half]] : 0.5 * (value[order[half - 1]] + value[order[half]]);
  std::vector<OutlierChannel> top(std::min(k, order.size()));
  for (std::size_t i = 0; i < top.size(); ++i) {
    const double v = value[order[i]];
    const double ratio = median > 0 ? v / median : v > 0 ? HUGE_VAL : 0.0;
    top[i] = {order[i], v, ratio};
  }
  return top;
}

}  // namespace fireq::libquant
