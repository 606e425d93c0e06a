// Folds a recipe's smoothing into one decoder layer's FP32 weights (docs/numerics.md, "Smoothing"). The layer
// computes the same function afterwards, up to rounding: what leaves a producer divided meets columns
// multiplied.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "calib/recipe.hpp"
#include "calib/weights.hpp"
#include "formats/statistics.hpp"

namespace fireq::calib {

struct FoldReport {
  std::array<bool, kLinears> weight_changed{};
  std::array<bool, kLinears> bias_changed{};
  bool mlp_norm_changed = false;
  bool qk_norm_changed = false;
  std::uint64_t clamped = 0;        // lambdas that hit the clamp
  std::uint64_t zero_channels = 0;  // input channels without weight, left alone
  // Mean x^2 of each input channel after folding, for q/k/v, o, gate/up, down; empty without statistics.
  std::array<std::vector<float>, kLinears> input_mean_square;
  std::array<std::vector<float>, kLinears> input_mean;  // the same of x
};

// Which parts of a layer a recipe changes, known without the weights (for plans and for reading tensors raw).
FoldReport planned_changes(const formats::ModelConfig& config, const Recipe& recipe);

// `statistics` may be null when the recipe needs none. Throws Error(input) when its shapes do not fit the
// model.
FoldReport fold_layer(const formats::ModelConfig& config, const Recipe& recipe,
                      const formats::LayerStatistics* statistics, LayerWeights& weights);

// The original model with the folds that a FireQ folder was made with (its recipe and calibration.h5): the
// unquantised twin of the packed weights, in FP32. `original` must outlive the result. Error(input) when the
// folder lacks calibration.h5 and its recipe needs it, or was made from another model (fingerprints differ).
std::unique_ptr<WeightSource> fold_like(const WeightSource& original, const std::string& fireq_folder,
                                        const formats::QuantizationConfig& quantization);

// Error(input) naming the first difference when two models are not of one shape.
void require_same_shape(const formats::ModelConfig& model, const formats::ModelConfig& reference,
                        const std::string& reference_path);

}  // namespace fireq::calib
