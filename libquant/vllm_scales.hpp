// Group scales as a compressed-tensors W4AFP8 checkpoint stores them, and what vLLM makes of them when it
// loads one (docs/checkpoint-format.md, "Export"; the arithmetic is that of vLLM's CutlassW4A8LinearKernel
// with dynamic FP8 quantisation per row).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "libquant/quantized_linear.hpp"

namespace fireq::libquant {

// weight_scale: the real product sigma * r rounded once to bfloat16.
std::uint16_t bf16_group_scale(float sigma, float r) noexcept;

// One row's scales [groups] as vLLM holds them: c = max(largest scale / 448, 1 / (448 * 512)),
// code = RN8(RN8(scale / c) / 8) and channel = 8 c. It multiplies RN8(q * code) and then channel.
struct VllmRow {
  std::vector<std::uint8_t> codes;  // E4M3 bytes
  float channel = 0;
};
void load_vllm_row(std::span<const std::uint16_t> weight_scale, VllmRow& out);

// How far the values that vLLM multiplies are from the linear's own, r * RN8(q * sigma).
struct VllmLoss {
  std::uint64_t rows = 0;       // with any difference
  std::uint64_t first_row = 0;  // of them
  double error_sq = 0, reference_sq = 0;
  double relative() const;  // Frobenius
};
// Levels "int4" only (Error(internal) otherwise). The same result for any number of threads.
VllmLoss vllm_loss(const QuantizedLinear& q, int threads);

}  // namespace fireq::libquant
