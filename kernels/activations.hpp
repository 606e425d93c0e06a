// FP8 activations, per token, dynamic (docs/numerics.md, "Activations"), alone and fused with what precedes a
// linear layer. a = max(max|x|, 2^-20) * (1/448) in FP32, x8 = RN8(x / a) by IEEE division, RN8(NaN) = 0x7f.
// Inputs and outputs are device memory, row-major, pitches in elements. x8's pitch is a multiple of 16; its
// columns K .. pitch stay as they are.
#pragma once

#include <cstdint>

#include "kernels/types.hpp"

namespace fireq::kernels {

struct Bf16Ref {
  const std::uint16_t* data = nullptr;
  std::uint64_t pitch = 0;
};
struct QuantizedTokens {
  std::uint8_t* x8 = nullptr;  // [M, pitch]
  std::uint64_t pitch = 0;
  float* scale = nullptr;  // a [M]
};
struct ActivationOptions {
  Stream stream = nullptr;
  bool programmatic = false;  // programmatic dependent launch; everything waits for the kernel before
};

// x [M, K] -> x8.
void quantize_activations(const Bf16Ref& x, std::uint64_t tokens, std::uint64_t cols,
                          const QuantizedTokens& out, const ActivationOptions& options);

// h = bf16(x + addend) where there is an addend, else x; v = bf16(h * rsqrt(mean(h^2) + epsilon) * weight); v
// -> x8.
struct NormInput {
  Bf16Ref x;
  Bf16Ref addend;                 // data null: none
  std::uint16_t* sum = nullptr;   // h [M, x.pitch], may be x itself; null: not written
  const float* weight = nullptr;  // [K]
  float epsilon = 1e-5F;
};
void rmsnorm_quantize(const NormInput& in, std::uint64_t tokens, std::uint64_t cols,
                      const QuantizedTokens& out, const ActivationOptions& options);

// gate_up [M, 2F], gate in the first F columns: v = bf16(silu(gate) * up), silu(g) = g / (1 + exp(-g)) in
// FP32; v [M, F] -> x8.
void silu_mul_quantize(const Bf16Ref& gate_up, std::uint64_t tokens, std::uint64_t cols,
                       const QuantizedTokens& out, const ActivationOptions& options);

}  // namespace fireq::kernels
