// Calibration statistics of one layer, gathered from its activations (formats/statistics.hpp says what they
// are). Sums are FP64, each channel's tokens in order: the same bits for any thread count and any cut of the
// text into batches.
#pragma once

#include <cstdint>
#include <span>

#include "calib/forward.hpp"
#include "formats/statistics.hpp"

namespace fireq::calib {

class StatisticsCollector final : public ActivationObserver {
 public:
  // Adds to `statistics`, which outlives the collector.
  StatisticsCollector(formats::LayerStatistics& statistics, std::uint64_t kv_heads, std::uint64_t head_dim,
                      int threads);
  void observe(formats::Site site, std::span<const float> values, std::uint64_t rows,
               std::uint64_t channels) override;

 private:
  void add_moments(formats::SiteStatistics& site, std::span<const float> values, std::uint64_t rows,
                   std::uint64_t channels) const;
  void add_pair_radius(std::span<const float> keys, std::uint64_t rows, std::uint64_t channels) const;
  void add_query_products(std::span<const float> queries, std::uint64_t rows, std::uint64_t channels) const;

  formats::LayerStatistics& statistics_;
  const std::uint64_t kv_heads_, head_dim_;
  const int threads_;
};

// Bin of |x| in the histogram.
std::size_t histogram_bin(float x) noexcept;

}  // namespace fireq::calib
