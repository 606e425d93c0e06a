#include "calib/measured_cost.hpp"

#include <algorithm>
#include <cmath>
#include <map>

#include "calib/evaluate.hpp"
#include "common/error.hpp"

namespace fireq::calib {
namespace {

constexpr std::uint64_t kFitTokens = 1024;
constexpr std::uint64_t kFitLength = 128;
constexpr double kKeptDigits = 1e6;

// Six digits: what the folder records is then the same where sums are made in another order.
double rounded(double value) {
  return std::round(value * kKeptDigits) / kKeptDigits;
}

// Of the frequencies seen, plus what they lack on average because rare tokens were not seen: (kinds - 1) / 2
// tokens (Miller 1955, "Note on the bias of information estimates").
double unigram_entropy(const Windows& windows) {
  std::map<std::int32_t, std::uint64_t> counts;
  for (const std::int32_t id : windows.ids) ++counts[id];
  const auto all = static_cast<double>(windows.ids.size());
  double entropy = (static_cast<double>(counts.size()) - 1) / (2 * all);
  for (const auto& [id, count] : counts) {
    const double p = static_cast<double>(count) / all;
    entropy -= p * std::log(p);
  }
  return entropy;
}

}  // namespace

formats::MeasuredCost measure_cost(const WeightSource& packed, const WeightSource& original,
                                   const Windows& windows, int threads, Progress& progress) {
  if (!packed.packed()) throw Error(ErrorKind::internal, "a cost is that of packed weights");
  const bool cache = packed.quantization()->kv_cache;
  EvaluationOptions options;
  options.precision = {
      .fp8_activations = true, .int4_k = cache, .int4_v = cache, .fp8_q = true, .fp8_p = true};
  options.threads = threads;
  options.reference = &original;
  options.stream = true;
  options.stage = "measure";
  const EvaluationResult result = evaluate(packed, windows, options, progress);
  formats::MeasuredCost cost;
  cost.tokens = result.scored;
  cost.nll = rounded(result.nll_per_token);
  cost.delta_nll = rounded(*result.delta_nll);
  cost.delta_nll_stderr = rounded(*result.delta_nll_stderr);
  cost.kl = rounded(*result.kl_mean);
  cost.kl_stderr = rounded(*result.kl_stderr);
  return cost;
}

std::uint64_t measured_cost_bytes(const formats::ModelConfig& config, const Windows& windows) {
  // Hidden states, queries, keys and values of both models, and the rows that are scored.
  const std::uint64_t token = 4 * config.hidden + 2 * config.q_rows() + 2 * config.kv_rows();
  return 2 * sizeof(float) * token * windows.ids.size();
}

Windows text_fit_windows(const Windows& windows) {
  Windows out;
  out.length = std::min(windows.length, kFitLength);
  out.count = std::clamp<std::uint64_t>(kFitTokens / out.length, 1, windows.count);
  for (std::uint64_t i = 0; i < out.count; ++i) {
    const std::uint64_t w = i * windows.count / out.count;
    const auto begin = windows.ids.begin() + static_cast<std::ptrdiff_t>(w * windows.length);
    out.ids.insert(out.ids.end(), begin, begin + static_cast<std::ptrdiff_t>(out.length));
  }
  return out;
}

TextFit text_fit(const WeightSource& model, const Windows& windows, int threads, Progress& progress) {
  EvaluationOptions options;
  options.threads = threads;
  options.stream = true;
  options.stage = "check text";
  const EvaluationResult result = evaluate(model, text_fit_windows(windows), options, progress);
  return {result.nll_per_token, unigram_entropy(windows), result.scored};
}

}  // namespace fireq::calib
