// The whole model's codes tuned together, after every layer has been rounded by itself: least
// KL(original || packed) over the calibration windows, FP8 inputs and all. Gradients run through the packed
// model, straight through its roundings; scales stay, and codes move as libquant/latent_linear.hpp says.
#pragma once

#include <cstdint>
#include <vector>

#include "calib/dataset.hpp"
#include "calib/modules.hpp"
#include "calib/recipe.hpp"
#include "calib/two_streams.hpp"
#include "calib/weights.hpp"
#include "common/progress.hpp"

namespace fireq::calib {

// All of a model's layers and what moves their codes are held at once, 16 bytes a weight, and the output head
// in FP32. A model for which that is more than this is left as it was rounded.
inline constexpr std::uint64_t kTunedModelBytes = std::uint64_t{4} << 30U;
bool can_tune_codes(const formats::ModelConfig& config);

// recipe.tune_passes asks for it, and there is enough text, at least 16 windows of it: with too little of it
// codes learn the text by heart, and other text gains nothing (docs/results.md).
bool wants_tuned_codes(const formats::ModelConfig& config, const Recipe& recipe, const Windows& windows);

// Both.
bool tunes_codes(const formats::ModelConfig& config, const Recipe& recipe, const Windows& windows);

// Every eighth window is held back, to judge by. A step sees some of the others; a pass all of them, but for
// a rest that fills no step.
struct TuningWork {
  std::uint64_t judged = 0, tuned = 0;  // windows
  std::uint64_t windows_per_step = 0;
  std::uint64_t steps = 0;
};
TuningWork tuning_work(const Windows& windows, const Recipe& recipe);

struct TunedLayer {
  LayerWeights weights;  // with the recipe's folds; a matrix stored in 4 bits or FP8 becomes what is stored
  QuantizedLayer quantized;
};

struct TuningReport {
  // Mean KL(original || packed) per token of the windows held back.
  double before = 0, after = 0;
  bool kept() const noexcept { return after < before; }
};

// original: the unquantised model. layers: all of its layers as they were packed; codes of 4-bit linears
// change, unless the windows held back say that they should not have. The same bytes for any number of
// threads.
TuningReport tune_codes(const WeightSource& original, const Windows& windows, const Recipe& recipe,
                        const Modules& modules, std::vector<TunedLayer>& layers, int threads,
                        Progress& progress);

// Resident bytes while it works.
std::uint64_t tuning_bytes(const formats::ModelConfig& config, const Windows& windows, const Recipe& recipe);

}  // namespace fireq::calib
