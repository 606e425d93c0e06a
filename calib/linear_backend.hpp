// Where the quantised linears of a FireQ model run when it is not the forward pass's own loops: a GPU, or a
// stand-in in a test. The forward pass keeps norms, RoPE, cache, attention, residuals and the output head.
#pragma once

#include <cstdint>
#include <span>

#include "calib/weights.hpp"
#include "libquant/quantized_linear.hpp"

namespace fireq::calib {

// For one model. Called from one thread.
class LinearBackend {
 public:
  LinearBackend() = default;
  LinearBackend(const LinearBackend&) = delete;
  LinearBackend& operator=(const LinearBackend&) = delete;
  virtual ~LinearBackend() = default;

  // Takes a copy of a linear's weights, once, before it is multiplied. bias: empty or [rows].
  virtual void load(std::uint64_t layer, LinearIndex linear, const libquant::QuantizedLinear& weight,
                    std::span<const float> bias) = 0;

  // x [tokens, cols], finite bf16, is the input of all of `linears`; y[i] [tokens, rows of linears[i]] gets
  // bf16((a r) sum_k x8 w8 + bias), x8 and a the token's FP8 quantisation, w8 the packed operands
  // (docs/numerics.md): what the CPU computes, to the order of summation.
  virtual void multiply(std::uint64_t layer, std::span<const LinearIndex> linears,
                        std::span<const std::uint16_t> x, std::uint64_t tokens,
                        std::span<const std::span<std::uint16_t>> y) = 0;
};

}  // namespace fireq::calib
