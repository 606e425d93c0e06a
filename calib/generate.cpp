#include "calib/generate.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <string>

#include "calib/decode_session.hpp"
#include "common/error.hpp"
#include "common/progress.hpp"

namespace fireq::calib {
namespace {

double seconds_since(std::chrono::steady_clock::time_point t) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - t).count();
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options) : options_(options), state_(options.seed) {
  if (!(options.temperature >= 0) || !std::isfinite(options.temperature)) {
    throw Error(ErrorKind::usage, "temperature must be 0 or more").found(std::to_string(options.temperature));
  }
  if (!(options.top_p > 0 && options.top_p <= 1)) {
    throw Error(ErrorKind::usage, "top-p must be over 0 and at most 1").found(std::to_string(options.top_p));
  }
}

double Sampler::uniform() {
  state_ += 0x9e3779b97f4a7c15ULL;  // splitmix64: the same stream on every platform
  std::uint64_t z = state_;
  z = (z ^ (z >> 30U)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27U)) * 0x94d049bb133111ebULL;
  z ^= z >> 31U;
  return static_cast<double>(z >> 11U) * 0x1p-53;
}

std::int32_t Sampler::next(std::span<const float> logits) {
  const auto best = std::max_element(logits.begin(), logits.end());
  if (options_.temperature == 0) return static_cast<std::int32_t>(best - logits.begin());
  weight_.resize(logits.size());
  double total = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    weight_[i] = std::exp(static_cast<double>(logits[i] - *best) / options_.temperature);
    total += weight_[i];
  }
  if (options_.top_p >= 1) {  // all tokens, no order needed
    double point = uniform() * total;
    std::size_t drawn = 0;
    for (std::size_t i = 0; i < weight_.size() && point >= 0; ++i) {
      if (weight_[i] == 0) continue;
      drawn = i;
      point -= weight_[i];
    }
    return static_cast<std::int32_t>(drawn);
  }
  order_.resize(logits.size());
  std::iota(order_.begin(), order_.end(), 0U);
  // Ties by id, so that the order is the same everywhere.
  std::sort(order_.begin(), order_.end(), [&](std::uint32_t a, std::uint32_t b) {
    return weight_[a] != weight_[b] ? weight_[a] > weight_[b] : a < b;
  });
  std::size_t kept = 0;
  double mass = 0;
  while (kept < order_.size() && (kept == 0 || mass < options_.top_p * total))
    mass += weight_[order_[kept++]];
  double point = uniform() * mass;
  for (std::size_t i = 0; i < kept; ++i) {
    point -= weight_[order_[i]];
    if (point < 0) return static_cast<std::int32_t>(order_[i]);
  }
  return static_cast<std::int32_t>(order_[kept - 1]);
}

GenerationResult generate(const WeightSource& model, std::span<const std::int32_t> prompt,
                          const GenerationOptions& options,
                          const std::function<void(std::int32_t)>& on_token) {
  const std::uint64_t context = model.config().context;
  if (prompt.empty()) throw Error(ErrorKind::usage, "the prompt has no token").hint("give some text with -p");
  if (prompt.size() >= context) {
    throw Error(ErrorKind::usage, "the prompt fills the model's context")
        .expected("fewer than " + std::to_string(context) + " tokens")
        .found(std::to_string(prompt.size()));
  }
  Sampler sampler(options.sampling);
  DecodeSession session(model, options.precision, options.threads);
  GenerationResult result;
  result.prompt_tokens = prompt.size();
  const auto start = std::chrono::steady_clock::now();
  std::vector<float> logits = session.step(prompt);
  result.prompt_seconds = seconds_since(start);
  const auto after_prompt = std::chrono::steady_clock::now();
  while (result.new_tokens < options.max_new_tokens) {
    check_interrupt();
    const std::int32_t id = sampler.next(logits);
    if (std::find(options.stop_ids.begin(), options.stop_ids.end(), id) != options.stop_ids.end()) {
      result.reason = StopReason::eos;
      break;
    }
    on_token(id);
    ++result.new_tokens;
    if (prompt.size() + result.new_tokens >= context) {
      result.reason = StopReason::context;
      break;
    }
    if (result.new_tokens < options.max_new_tokens) logits = session.step(std::span(&id, 1));
  }
  result.seconds = seconds_since(after_prompt);
  return result;
}

}  // namespace fireq::calib
