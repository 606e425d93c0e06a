// Whether a head's keys are better cached less their mean. Attention does not change when one vector is taken
// off all keys of a head: every score of a query loses the same. What is left to round is smaller where keys
// have a mean that RoPE hardly turns; but a key far from the others, such as that of an attention sink, moves
// away. So it is tried on sampled tokens.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "calib/forward.hpp"
#include "formats/model_config.hpp"
#include "formats/statistics.hpp"

namespace fireq::calib {

// Keeps queries, keys and values of the first tokens of one layer and passes everything on.
class KeySample final : public ActivationObserver {
 public:
  // Whole windows of `length` tokens, or the head of one, up to 1024 tokens. `next` outlives this.
  KeySample(ActivationObserver& next, std::uint64_t length);
  void observe(formats::Site site, std::span<const float> values, std::uint64_t rows,
               std::uint64_t channels) override;

  // [KV heads] squared error of the attention's outputs with INT4 keys as they are, less that with the mean
  // taken off; N and S by moments in both. statistics: of the layer, all tokens. The same for any thread
  // count.
  std::vector<double> centre_gain(const formats::ModelConfig& config, std::uint64_t layer,
                                  const formats::LayerStatistics& statistics, int threads) const;

 private:
  ActivationObserver& next_;
  std::uint64_t length_;   // of a kept window
  std::uint64_t windows_;  // that are kept at most
  std::vector<float> q_, k_, v_;
};

}  // namespace fireq::calib
