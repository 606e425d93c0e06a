// Gradients through one decoder layer in FP32: from that of some loss behind the layer to that before it, and
// on the way the second moments of the gradients of its seven linears' outputs.
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

// gx [n] = the gradient of x where y = rms_norm(x) * weight and gy is that of y.
void rms_norm_gradient(const float* x, const float* weight, double eps, std::size_t n, const float* gy,
                       float* gx);

class LayerGradients {
 public:
  // weights and rope outlive this. S and the centre of the keys leave the layer's function as it is, and are
  // left out.
  LayerGradients(const formats::ModelConfig& config, const LayerWeights& weights, std::uint64_t layer,
                 const RopeTable& rope, int threads);

  // hidden [count * length, hidden]: the layer's inputs for whole sequences. gradient: of the loss behind the
  // layer; becomes that before it. sums: null, or what is added to. The same bits for any number of threads.
  void run(std::uint64_t count, std::uint64_t length, std::span<const float> hidden,
           std::span<float> gradient, OutputSums* sums);

 private:
  struct Rows;  // activations of a batch
  void forward(Rows& at, const float* hidden);
  void attention(Rows& at, bool backward);
  void attend(Rows& at, std::uint64_t sequence, std::uint64_t kv_head, bool backward);
  void project(LinearIndex which, const FloatBuffer& x, FloatBuffer& y, std::uint64_t rows);
  void back(LinearIndex which, const FloatBuffer& gy, FloatBuffer& gx, bool add, std::uint64_t rows);
  void mlp_gradient(Rows& at, float* gradient, OutputSums* sums);
  void heads(FloatBuffer& x, std::uint64_t count, const std::vector<float>& norm, Rows& at);
  void heads_gradient(FloatBuffer& gradient, const FloatBuffer& x, std::uint64_t count,
                      const std::vector<float>& norm, Rows& at);

  const formats::ModelConfig& config_;
  const LayerWeights& weights_;
  const std::uint64_t window_;
  const RopeTable& rope_;
  const int threads_;
};

}  // namespace fireq::calib
