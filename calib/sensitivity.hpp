// What it costs the model when some of its linears, and no others, are stored in fewer bits.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "calib/dataset.hpp"
#include "calib/linear_quantizer.hpp"
#include "calib/modules.hpp"
#include "calib/recipe.hpp"
#include "calib/weights.hpp"
#include "common/progress.hpp"
#include "formats/statistics.hpp"

namespace fireq::calib {

// Linears of one layer that share a precision: one, or those that a serving engine holds as one.
struct PrecisionUnit {
  std::uint64_t layer = 0;
  std::vector<std::size_t> linears;
};

// Variants whose logits are made side by side, against the original's made once.
inline constexpr std::size_t kScoredTogether = 16;

// What the measurements need to know of a run. All outlive the measurement.
struct PlannedRun {
  const WeightSource& source;
  const Recipe& recipe;
  const Modules& modules;                                      // weight keys of each linear
  const formats::CalibrationStatistics* statistics = nullptr;  // where the recipe needs them
  int threads = 0;
};

// The original model with every linear, the embedding and the head as `modules` would store them; 4-bit
// linears are rounded to the nearest, row by row, also where the recipe will round under the curvature.
class PlannedWeights final : public ForwardingWeights {
 public:
  explicit PlannedWeights(const PlannedRun& run) : ForwardingWeights(run.source), run_(run) {}
  LayerWeights load_layer(std::uint64_t layer, int threads) const override;
  void embed(std::span<const std::int32_t> ids, std::span<float> out) const override;
  void head_rows(std::uint64_t begin, std::uint64_t count, std::span<float> out) const override;
  libquant::QuantizedLinear quantized(std::uint64_t layer, std::size_t linear) const override;

 private:
  PlannedRun run_;
};

// The first windows of a calibration, cut so that they are about `tokens` tokens.
Windows sample_windows(const Windows& windows, std::uint64_t tokens);

// Mean KL(original || model) per scored token, in nats, over windows, with FP8 inputs of quantised linears,
// and keys, values, queries and probabilities not quantised.
double planned_kl(const PlannedRun& run, const Windows& windows);
double stored_kl(const WeightSource& packed, const WeightSource& original, const Windows& windows,
                 int threads);

// The same KL of each unit alone in each of `precisions`: result [unit][precision]. All other linears are the
// originals, in FP32. Units in the order of their layers. Each layer is loaded once for as many units as fit
// in memory (`bytes` of hidden states), so that the work is that of units * precisions / 2 forward passes and
// as many output heads, and a sixteenth of these more for the original's.
std::vector<std::vector<double>> unit_kl(const PlannedRun& run, const Windows& windows,
                                         std::span<const PrecisionUnit> units,
                                         std::span<const formats::ModulePrecision> precisions,
                                         std::uint64_t bytes, Progress& progress);
// Upper estimate of what that holds beside the fixed share of every run.
std::uint64_t unit_kl_memory(const formats::ModelConfig& config, std::uint64_t tokens, std::size_t units,
                             std::size_t precisions, std::uint64_t bytes);

}  // namespace fireq::calib
