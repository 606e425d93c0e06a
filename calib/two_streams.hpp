// Quantising layer by layer against the original: two streams of hidden states over the calibration tokens,
// h_f with the original weights and h_q with what is quantised so far and FP8 inputs (docs/recipes.md,
// "best"). In the order q k v, o, gate up, down, each linear is given a target that makes its outputs on h_q
// what the original's were on h_f, plus, for o and down, what the residual stream lacks already; it is then
// rounded under the curvature of its inputs (libquant/curvature_quantizer.hpp).
//
// The streams depend on the original weights and on the packed ones alone: replay() of a layer that was
// quantised by an earlier run leaves exactly the streams of that run.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "calib/dataset.hpp"
#include "calib/forward.hpp"
#include "calib/modules.hpp"
#include "calib/output_gradients.hpp"
#include "calib/recipe.hpp"
#include "calib/weights.hpp"
#include "libquant/curvature.hpp"
#include "libquant/fp8_linear.hpp"

namespace fireq::calib {

// A layer's linears as they are stored: `fp8` of a linear in FP8, `linear` of one in 4 bits; neither of one
// that stays as it is.
struct QuantizedLayer {
  std::array<libquant::QuantizedLinear, kLinears> linear;
  std::array<libquant::Fp8Linear, kLinears> fp8;
  libquant::QuantizedLinear& operator[](std::size_t i) { return linear[i]; }
  const libquant::QuantizedLinear& operator[](std::size_t i) const { return linear[i]; }
};

// What a layer's quantisation met.
struct StreamReport {
  std::uint64_t dead_channels = 0;       // input channels that were always zero, over the four inputs
  std::vector<std::string> raised;       // inputs whose damping had to be raised
  std::array<double, kLinears> error{};  // sqrt of (w* - v) H (w* - v)^T over w* H w*^T, all rows together
};

class TwoStreams {
 public:
  // source, windows, recipe and modules outlive this. modules: null when all linears are in 4 bits, with the
  // recipe's weight keys. Inputs of all linears are FP8 in the quantised stream, whatever their own
  // precision.
  TwoStreams(const WeightSource& source, const Windows& windows, const Recipe& recipe, int threads,
             Progress& progress, const Modules* modules = nullptr);

  // weights: the layer's original ones with the recipe's folds. Both streams then stand after the layer.
  QuantizedLayer quantize(std::uint64_t layer, LayerWeights weights, StreamReport& report);
  void replay(std::uint64_t layer, LayerWeights weights, const QuantizedLayer& quantized);

  // Resident bytes beside the weights: both streams, the quantised inputs of one linear, and for `quantize`
  // the curvature of the widest input with its factors.
  static std::uint64_t bytes(const formats::ModelConfig& config, const Recipe& recipe,
                             const Windows& windows);

 private:
  struct Layer;  // one layer at work
  // Inputs of one linear on the quantised side: FP8 codes and a scale per token.
  struct QuantizedInputs {
    std::uint64_t channels = 0;
    std::vector<std::uint8_t> code;  // [tokens, channels]
    std::vector<float> scale;        // [tokens]
  };
  // One batch of a site: both sides' inputs, [rows, stride].
  struct SiteBatch {
    FloatBuffer original, quantized;
    std::size_t stride = 0;
  };

  void run(Layer& work);
  void norm_inputs(const std::vector<float>& norm, libquant::Curvature& sums);
  void attention_inputs(Layer& work, libquant::Curvature* sums, std::vector<float>* residual);
  void down_inputs(Layer& work, libquant::Curvature* sums, std::vector<float>* residual);
  void quantize_inputs(const Batch& batch, SiteBatch& site, std::uint64_t channels);
  FloatBuffer lacking(const Batch& batch) const;
  void add(const Batch& batch, SiteBatch& site, std::uint64_t channels, bool weigh, FloatBuffer& lack,
           libquant::Curvature& sums, std::vector<float>* residual) const;
  void quantize_linears(Layer& work, std::span<const LinearIndex> which, libquant::Curvature& sums,
                        std::span<const float> residual, const char* site);
  ModuleChoice chosen(const Layer& work, std::size_t linear) const;
  formats::ModulePrecision precision(const Layer& work, std::size_t linear) const;
  LinearPanels stored_panels(const Layer& work, std::size_t linear) const;
  void advance_original(const LinearPanels& linear, const Batch& batch, const SiteBatch& site);
  void advance_quantized(const LinearPanels& linear);
  std::vector<Batch> batches() const;

  const WeightSource& source_;
  const Windows& windows_;
  const Recipe& recipe_;
  const int threads_;
  const Modules* const modules_;
  RopeTable rope_;
  LayerRunner original_runner_, quantized_runner_;
  std::vector<float> original_, quantized_;  // h_f and h_q [tokens, hidden]
  QuantizedInputs inputs_;                   // of o or down
  std::optional<OutputGradients> gradients_;
  Pool<FloatBuffer> areas_;
};

}  // namespace fireq::calib
