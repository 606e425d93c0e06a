// Perplexity, and KL against a reference model, over windows of tokens.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "calib/dataset.hpp"
#include "calib/forward.hpp"
#include "calib/weights.hpp"
#include "common/progress.hpp"
#include "formats/statistics.hpp"

namespace fireq::calib {

struct EvaluationResult {
  double ppl = 0, nll_per_token = 0, nll_stderr = 0;  // stderr of the mean over scored tokens
  std::uint64_t tokens = 0, windows = 0, scored = 0;
  std::vector<double> window_nll;  // mean of each window, for comparing two runs window by window
  double seconds = 0;              // forward and scoring, without loading and tokenising
  double cpu_seconds = 0;          // of all threads, over the same span; a streamed model's loading counts
  // With a reference: KL(reference || model) in nats per scored token, and share of equal argmax.
  std::optional<double> kl_mean, kl_max, kl_stderr, top1_agree;
  // And the mean difference of the two models' nll of the same tokens, with its own standard error: far
  // smaller than that of either nll, since both models find the same tokens hard.
  std::optional<double> delta_nll, delta_nll_stderr;
};

struct EvaluationOptions {
  Precision precision;
  int threads = 0;
  // Runs the model's quantised linears (the reference's stay on the CPU). The model must be packed and
  // precision.fp8_activations on: Error(usage) otherwise.
  LinearBackend* backend = nullptr;
  const WeightSource* reference = nullptr;  // run in FP32
  Precision reference_precision;
  bool stream = false;  // a layer at a time and little of the head, however small the models are
  std::string_view stage = "evaluate";  // its name in the progress
};

// Perplexity over windows, each scoring its last length - 1 tokens. Models whose FP32 weights (with the
// reference's) fit in 1 GiB stay in memory; larger ones stream, a layer at a time, through chunks of windows.
EvaluationResult evaluate(const WeightSource& model, const Windows& windows, const EvaluationOptions& options,
                          Progress& progress);

// Upper estimate of what evaluate() holds at once for a model with a reference of the same shape, beside the
// fixed share of every run.
std::uint64_t comparison_memory(const formats::ModelConfig& config, const Windows& windows);

// FP32 logits [ids, vocab] of one window (for golden tests and validate).
std::vector<float> window_logits(const WeightSource& model, std::span<const std::int32_t> ids,
                                 const Precision& precision, int threads);

// Runs every layer over the windows once in FP32, streaming weights, and collects every site. The caller, who
// knows them, sets meta's fingerprints and seed.
formats::CalibrationStatistics calibrate(const WeightSource& model, const Windows& windows, int threads,
                                         Progress& progress);

}  // namespace fireq::calib
