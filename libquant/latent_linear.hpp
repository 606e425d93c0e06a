// Codes that move under gradients. Each weight of a quantised linear has a number behind it that starts at
// the weight's value and is moved a little at each step (Adam, arXiv:1412.6980); the code is that of the
// operand nearest to it, under scales that stay. So a code changes when many steps agree that it should.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "libquant/quantized_linear.hpp"

namespace fireq::libquant {

class LatentLinear {
 public:
  // linear outlives this. Holds 12 bytes a weight.
  explicit LatentLinear(QuantizedLinear& linear);

  // gradient [rows, K] of the loss in the weights. rate: about how far a number moves where gradients agree,
  // in units of its group's scale (sigma times r). values [rows, K]: the weights that the codes then stand
  // for. The same bits for any number of threads.
  void step(std::span<const float> gradient, double rate, std::span<float> values, int threads);

 private:
  QuantizedLinear& linear_;
  std::uint64_t steps_ = 0;
  std::vector<float> latent_, mean_, square_;  // [rows, K]; mean and square of gradients, decaying
};

}  // namespace fireq::libquant
