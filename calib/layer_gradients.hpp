// Gradients through one decoder layer in FP32: from that of some loss behind the layer to that before it, and
// on the way the second moments of the gradients of its seven linears' outputs, or the gradients of their
// weights.
#pragma once

#include <array>
#include <span>
#include <vector>

#include "calib/buffer.hpp"
#include "calib/forward.hpp"
#include "calib/weights.hpp"
#include "libquant/curvature.hpp"

namespace fireq::calib {

// For each linear the sum over tokens of g^T g, g [1, N] the gradient of its outputs; `square` alone is used.
using OutputSums = std::array<libquant::Curvature, kLinears>;
OutputSums make_output_sums(const formats::ModelConfig& config);

// For each linear the sum over tokens of g^T x [rows, cols], x its inputs.
using WeightGradients = std::array<std::vector<float>, kLinears>;
WeightGradients make_weight_gradients(const formats::ModelConfig& config);  // zeros

// gx [n] = the gradient of x where y = rms_norm(x) * weight and gy is that of y.
void rms_norm_gradient(const float* x, const float* weight, double eps, std::size_t n, const float* gy,
                       float* gx);

class LayerGradients {
 public:
  // quantised: inputs of linears are rounded to FP8 per token and outputs to bf16, as a packed model's are;
  // gradients pass as if they were not.
  enum class Activations : bool { plain, quantised };
  // weights (their row scales multiplied in) and rope outlive this. S and the centre of the keys leave the
  // layer's function as it is, and are left out.
  LayerGradients(const formats::ModelConfig& config, const LayerWeights& weights, std::uint64_t layer,
                 const RopeTable& rope, int threads, Activations activations = Activations::plain);

  // hidden [count * length, hidden]: the layer's inputs for whole sequences. gradient: of the loss behind the
  // layer; becomes that before it. sums, linears: null, or what is added to. The same bits for any number of
  // threads.
  void run(std::uint64_t count, std::uint64_t length, std::span<const float> hidden,
           std::span<float> gradient, OutputSums* sums, WeightGradients* linears = nullptr);

  // The layer itself: hidden becomes its outputs.
  void advance(std::uint64_t count, std::uint64_t length, std::span<float> hidden);

 private:
  struct Rows;  // activations of a batch
  void forward(Rows& at, const float* hidden);
  template <class Visit>
  static void in_batches(std::uint64_t count, std::uint64_t length, Visit visit);
  void activate(Rows& at);
  void round_inputs(FloatBuffer& x, std::uint64_t channels, std::uint64_t rows) const;
  void attention(Rows& at, bool backward);
  void attend(Rows& at, std::uint64_t sequence, std::uint64_t kv_head, bool backward);
  void project(LinearIndex which, const FloatBuffer& x, FloatBuffer& y, std::uint64_t rows);
  void back(LinearIndex which, const FloatBuffer& gy, FloatBuffer& gx, bool add, std::uint64_t rows);
  void mlp_gradient(Rows& at, float* gradient, OutputSums* sums, WeightGradients* linears);
  void add_gradient(LinearIndex which, const FloatBuffer& gradient, const FloatBuffer& x, std::uint64_t rows,
                    WeightGradients* linears) const;
  void heads(FloatBuffer& x, std::uint64_t count, const std::vector<float>& norm, Rows& at);
  void heads_gradient(FloatBuffer& gradient, const FloatBuffer& x, std::uint64_t count,
                      const std::vector<float>& norm, Rows& at);

  const formats::ModelConfig& config_;
  const LayerWeights& weights_;
  const std::uint64_t window_;
  const RopeTable& rope_;
  const int threads_;
  const bool quantised_;
};

}  // namespace fireq::calib
