// Generation: one sequence that grows, with its keys and values kept.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "calib/model_runner.hpp"
#include "calib/scoring.hpp"

namespace fireq::calib {

class DecodeSession {
 public:
  // Loads all layers and the output head in FP32; the source must outlive the session.
  DecodeSession(const WeightSource& source, const Precision& precision, int threads);

  // Appends the tokens (at least one) and returns the logits [vocab] after the last. The same bits as
  // window_logits of the whole sequence, however it is cut into steps.
  std::vector<float> step(std::span<const std::int32_t> new_ids);

  std::uint64_t length() const noexcept { return length_; }
  void reset() noexcept { length_ = 0; }  // an empty sequence again

 private:
  const WeightSource& source_;
  const int threads_;
  ModelRunner runner_;
  OutputHead head_;
  std::vector<KvCache> caches_;
  std::uint64_t length_ = 0;
};

}  // namespace fireq::calib
