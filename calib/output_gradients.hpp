// What a linear's outputs are worth to the model: the curvature of KL(original || changed) in them, which is
// the mean of g g^T over tokens, g the gradient of -log p(y) for a token y drawn from the model's own
// prediction (the Fisher information). Rounding (libquant/curvature_quantizer.hpp) weighs a linear's output
// errors by it, blocks of layers behind and all.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "calib/dataset.hpp"
#include "calib/layer_gradients.hpp"
#include "calib/weights.hpp"
#include "common/progress.hpp"

namespace fireq::calib {

// Gradients behind every layer, over some of the windows, from one run through the model and back.
class OutputGradients {
 public:
  // source outlives this. Draws are a function of the number of the token alone.
  OutputGradients(const WeightSource& source, const Windows& windows, int threads, Progress& progress);

  // The sums of one layer. weights: with any folds that leave its function as it is; hidden [tokens of all
  // windows, hidden]: the layer's inputs. Frees what it keeps of the layer.
  OutputSums sums(std::uint64_t layer, const LayerWeights& weights, std::span<const float> hidden);

  static std::uint64_t tokens_used(const Windows& windows);
  // Resident bytes: what is kept, the work of one layer, its sums, and rounding its widest linears.
  static std::uint64_t bytes(const formats::ModelConfig& config, const Windows& windows);

 private:
  std::vector<float> head_gradient(std::span<const float> hidden) const;

  const WeightSource& source_;
  const int threads_;
  Windows windows_;                     // those that are used
  std::vector<std::uint64_t> numbers_;  // of them among all
  RopeTable rope_;
  std::vector<std::vector<std::uint16_t>> behind_;  // [layers][tokens, hidden] bf16
};

}  // namespace fireq::calib
