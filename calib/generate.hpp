// Text generation: sampling from a model's next-token distribution.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "calib/forward.hpp"
#include "calib/weights.hpp"

namespace fireq::calib {

struct SamplingOptions {
  double temperature = 0.8;  // 0: the most likely token
  double top_p = 0.95;       // smallest set of tokens whose probability reaches this
  std::uint64_t seed = 0;
};

// Draws the next token. The same options and logits give the same draws, one after another.
class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options);
  std::int32_t next(std::span<const float> logits);

 private:
  double uniform();  // [0, 1)
  SamplingOptions options_;
  std::uint64_t state_;
  std::vector<std::uint32_t> order_;
  std::vector<double> weight_;
};

struct GenerationOptions {
  SamplingOptions sampling;
  std::uint64_t max_new_tokens = 256;
  std::vector<std::int64_t> stop_ids;  // generation ends at one of these; it is not reported
  Precision precision;
  int threads = 0;
};

enum class StopReason : std::uint8_t { eos, length, context };

struct GenerationResult {
  std::uint64_t prompt_tokens = 0, new_tokens = 0;
  double prompt_seconds = 0, seconds = 0;  // seconds: the tokens after the prompt
  StopReason reason = StopReason::length;
};

// `on_token` sees each new token as it comes. The prompt must not be empty and must fit the context
// (Error(usage)).
GenerationResult generate(const WeightSource& model, std::span<const std::int32_t> prompt,
                          const GenerationOptions& options,
                          const std::function<void(std::int32_t)>& on_token);

}  // namespace fireq::calib
