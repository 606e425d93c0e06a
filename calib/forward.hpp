// The forward pass on the CPU: decoder layers over a batch of windows, FP32 accumulation, causal attention in
// blocks of keys with a running maximum (the T x T matrix of the text never exists). Deterministic for any
// thread count.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "calib/weights.hpp"
#include "formats/statistics.hpp"

namespace fireq::calib {

// What is quantised on the way (docs/numerics.md). All false: the plain FP32 model.
struct Precision {
  bool fp8_activations = false;  // inputs of the seven linears, per token; outputs rounded to bf16
  bool int4_k = false;
  bool int4_v = false;
  bool fp8_q = false;
  bool fp8_p = false;
};

// Sees activations of one site: `rows` tokens of `channels` values, row-major. Called from one thread, in
// token order within a layer.
class ActivationObserver {
 public:
  ActivationObserver() = default;
  ActivationObserver(const ActivationObserver&) = delete;
  ActivationObserver& operator=(const ActivationObserver&) = delete;
  virtual ~ActivationObserver() = default;
  virtual void observe(formats::Site site, std::span<const float> values, std::uint64_t rows,
                       std::uint64_t channels) = 0;
};

struct RopeTable {
  RopeTable(const formats::ModelConfig& config, std::uint64_t positions);
  std::uint64_t half = 0;           // head_dim / 2
  std::vector<float> cosine, sine;  // [positions, half]
};

// hidden [windows * length, hidden] is replaced by the layer's output. `layer` numbers errors and picks the
// sliding window. observer may be null.
void run_layer(const formats::ModelConfig& config, const LayerWeights& weights, std::uint64_t layer,
               const RopeTable& rope, const Precision& precision, std::span<float> hidden,
               std::uint64_t windows, std::uint64_t length, int threads, ActivationObserver* observer);

// Attention outputs, scores and so on share this: out[m, n] = scale[m?] ... see gemm.hpp.

// Logits of `rows` final hidden states (before the final norm), [rows, vocab].
void run_head(const WeightSource& source, std::span<const float> final_norm, std::span<const float> hidden,
              std::uint64_t rows, std::span<float> logits, int threads);

// KV cache of one sequence for generation: keys and values after RoPE and smoothing, per layer, quantised
// when asked.
class KvCache;

}  // namespace fireq::calib
