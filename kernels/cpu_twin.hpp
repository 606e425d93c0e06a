// The same operations on the CPU, on host memory: what the GPU kernels are checked against, and what runs
// where there is none. Shapes and formulas: types.hpp, activations.hpp, weights.hpp. Results do not depend on
// the thread count (0: all).
#pragma once

#include <span>

#include "kernels/activations.hpp"
#include "kernels/types.hpp"

namespace fireq::kernels::cpu {

// FP32 accumulation in order of k, y rounded to bf16.
void gemm_w4a8(const TokensRef& x, const WeightRef& w, const OutputRef& y, const Epilogue& epilogue,
               int threads);

// The definition in double, not rounded: out [M, N].
void gemm_w4a8_reference(const TokensRef& x, const WeightRef& w, const Epilogue& epilogue,
                         std::span<double> out, int threads);

// w8 [N, Kp] as FP8 bytes.
void dequantize_to_fp8(const WeightRef& w, std::span<std::uint8_t> out8, int threads);

void quantize_activations(const Bf16Ref& x, std::uint64_t tokens, std::uint64_t cols,
                          const QuantizedTokens& out);
void rmsnorm_quantize(const NormInput& in, std::uint64_t tokens, std::uint64_t cols,
                      const QuantizedTokens& out);
void silu_mul_quantize(const Bf16Ref& gate_up, std::uint64_t tokens, std::uint64_t cols,
                       const QuantizedTokens& out);

}  // namespace fireq::kernels::cpu
