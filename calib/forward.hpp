// The forward pass on the CPU: decoder layers over a batch of sequences, FP32 accumulation, causal attention
// in blocks of keys with a running maximum (the T x T matrix of the text never exists). A token's result does
// not depend on how many threads run, nor on which other tokens are in the batch. docs/forward-pass.md
// defines the order of every operation and rounding.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "calib/gemm.hpp"
#include "calib/kv_cache.hpp"
#include "calib/linear_backend.hpp"
#include "calib/weights.hpp"
#include "formats/statistics.hpp"

namespace fireq::calib {

// What is quantised on the way (docs/numerics.md). All false: the plain FP32 model.
struct Precision {
  // Inputs of the seven linears, per token; outputs rounded to bf16. Inputs of a linear with plain_input are
  // rounded to bf16 only.
  bool fp8_activations = false;
  bool int4_k = false;
  bool int4_v = false;
  bool fp8_q = false;
  bool fp8_p = false;
};

// Sees activations of one site: `rows` tokens of `channels` values, row-major, before they are quantised.
// Called from one thread; within a layer each site's tokens come in order. q is the query as attention uses
// it: after bias, QK-norm, RoPE and 1/S.
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
  // Turns the pairs (i, i + D/2) of one head to its position, or back.
  void rotate(float* x, std::uint64_t position, bool back) const;
  std::uint64_t half = 0;           // head_dim / 2
  std::vector<float> cosine, sine;  // [positions, half]
};

// A layer's weights with its matrices in panels, ready to multiply.
struct LinearPanels {
  Panels weight;                       // empty: a backend has it
  std::vector<float> row_scale, bias;  // as in LinearWeights
  bool plain_input = false;
};
struct LayerPanels {
  std::array<LinearPanels, kLinears> linear;
  std::vector<float> attn_norm, mlp_norm, q_norm, k_norm, k_post_rope_scale, k_post_rope_shift, k_rounding,
      v_rounding;
  std::uint64_t bytes() const noexcept;
};
LayerPanels pack_layer(LayerWeights&& weights, int threads);  // frees each matrix as it is packed

// y [m, rows] (row stride ldy) = x [m, cols] * weight^T with row scales and bias; token_scale null: ones;
// round_bf16: y is rounded to bf16.
void apply_linear(const LinearPanels& linear, const float* x, std::size_t ldx, std::size_t m,
                  const float* token_scale, bool round_bf16, float* y, std::size_t ldy, int threads);

// Consecutive tokens of some sequences: rows of hidden are [sequences, length].
struct Batch {
  std::uint64_t sequences = 0;
  std::uint64_t length = 0;          // tokens of each sequence in this batch
  std::uint64_t start = 0;           // position of the first of them
  std::uint64_t first_sequence = 0;  // number of the first sequence in messages
};

// Runs layers. Keeps its work areas from one layer to the next; not for two threads at a time.
class LayerRunner {
 public:
  // backend: runs the linears whose panels are empty, each over all rows of a batch at once; needs
  // precision.fp8_activations.
  LayerRunner(const formats::ModelConfig& config, const Precision& precision, int threads,
              LinearBackend* backend = nullptr);
  ~LayerRunner();
  LayerRunner(const LayerRunner&) = delete;
  LayerRunner& operator=(const LayerRunner&) = delete;

  // hidden [sequences * length, hidden] is replaced by the layer's output; cache gets the new keys and values
  // and must hold those of positions before start. Throws Error(input) naming layer, site, sequence and token
  // when an activation is not finite. observer may be null.
  void run(const LayerPanels& weights, std::uint64_t layer, const RopeTable& rope, const Batch& batch,
           KvCache& cache, std::span<float> hidden, ActivationObserver* observer);
  // The same for whole sequences from position 0, with a cache of its own.
  void run(const LayerPanels& weights, std::uint64_t layer, const RopeTable& rope, const Batch& batch,
           std::span<float> hidden, ActivationObserver* observer);

  // Only the first half of a layer over whole sequences from position 0: out [rows, q_rows] gets the inputs
  // of o_proj, not yet quantised. Looks at the weights of q, k, v and their norms alone; hidden stays.
  void attention_outputs(const LayerPanels& weights, std::uint64_t layer, const RopeTable& rope,
                         const Batch& batch, std::span<const float> hidden, std::span<float> out);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// One layer over whole windows, packing its weights first.
void run_layer(const formats::ModelConfig& config, LayerWeights weights, std::uint64_t layer,
               const RopeTable& rope, const Precision& precision, std::span<float> hidden,
               std::uint64_t windows, std::uint64_t length, int threads, ActivationObserver* observer);

// Error(input) naming the token when a final hidden state is not finite. rows [sequences * length, hidden].
void check_final_hidden(std::span<const float> hidden, std::uint64_t width, const Batch& batch);

}  // namespace fireq::calib
