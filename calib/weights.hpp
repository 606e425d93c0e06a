// The weights of a checkpoint as the forward pass uses them, one decoder layer at a time, in FP32.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "formats/checkpoint.hpp"
#include "formats/fireq_folder.hpp"
#include "formats/int4_scheme.hpp"
#include "formats/model_config.hpp"
#include "libquant/quantized_linear.hpp"

namespace fireq::calib {

// y[n] = row_scale[n] * sum_k x[k] * weight[n, k] + bias[n]. For weights in 4 bits or FP8 `weight` holds the
// operands' values and row_scale r; for original weights row_scale is empty (ones).
struct LinearWeights {
  std::string name;
  std::uint64_t rows = 0, cols = 0;
  std::vector<float> weight;     // [rows, cols]
  std::vector<float> row_scale;  // empty, [1] or [rows]
  std::vector<float> bias;       // empty or [rows]
  // Of a FireQ folder's linear in the source's type: its inputs stay 16 bits where others' are FP8.
  bool plain_input = false;
};

enum LinearIndex : std::size_t { kQ = 0, kK, kV, kO, kGate, kUp, kDown, kLinears };

struct LayerWeights {
  std::array<LinearWeights, kLinears> linear;
  std::vector<float> attn_norm, mlp_norm;  // [hidden]
  std::vector<float> q_norm, k_norm;       // empty or [head_dim]
  std::vector<float> k_post_rope_scale;    // S: empty or [kv_heads, head_dim]; K *S, Q /S after RoPE
  // Empty or [kv_heads, head_dim]: taken off each key after RoPE, before S. All scores of a query lose the
  // same, so that the softmax stays.
  std::vector<float> k_post_rope_shift;
  // Empty or [kv_heads, D (D + 1) / 2]: factors that the cache's codes are chosen with
  // (libquant/kv_rounding.hpp).
  std::vector<float> k_rounding, v_rounding;
};

class WeightSource {
 public:
  WeightSource() = default;
  WeightSource(const WeightSource&) = delete;
  WeightSource& operator=(const WeightSource&) = delete;
  virtual ~WeightSource() = default;

  virtual const formats::ModelConfig& config() const noexcept = 0;
  virtual const formats::CheckpointReader& reader() const noexcept = 0;
  virtual bool packed() const noexcept = 0;  // a FireQ folder
  virtual LayerWeights load_layer(std::uint64_t layer, int threads) const = 0;
  // Packed folders: the same without the quantised matrices, whose weight and row_scale stay empty.
  virtual LayerWeights load_unquantized(std::uint64_t layer, int threads) const;
  // Rows of the embedding for these ids -> [ids, hidden]. An id >= vocab is an Error(input).
  virtual void embed(std::span<const std::int32_t> ids, std::span<float> out) const = 0;
  virtual std::vector<float> final_norm() const = 0;
  // Rows [begin, begin+count) of the output head (the embedding when tied) as FP32 [count, hidden].
  virtual void head_rows(std::uint64_t begin, std::uint64_t count, std::span<float> out) const = 0;
  // Packed folders: the quantised matrix of one linear.
  virtual libquant::QuantizedLinear quantized(std::uint64_t layer, std::size_t linear) const = 0;
  // Packed folders: the folder's quantization_config.
  virtual const formats::QuantizationConfig* quantization() const noexcept = 0;
  // Folders that another program quantised to 4 bits: how; nullptr for all others.
  virtual const formats::Int4Scheme* imported() const noexcept { return nullptr; }
  // How a linear is stored; `original` unless this is a FireQ folder.
  formats::ModulePrecision precision(std::uint64_t layer, std::size_t linear) const;
};

// Passes every question on to another source, which outlives it; what differs is overridden.
class ForwardingWeights : public WeightSource {
 public:
  explicit ForwardingWeights(const WeightSource& inner) : inner_(inner) {}
  const formats::ModelConfig& config() const noexcept override { return inner_.config(); }
  const formats::CheckpointReader& reader() const noexcept override { return inner_.reader(); }
  bool packed() const noexcept override { return inner_.packed(); }
  LayerWeights load_layer(std::uint64_t layer, int threads) const override {
    return inner_.load_layer(layer, threads);
  }
  LayerWeights load_unquantized(std::uint64_t layer, int threads) const override {
    return inner_.load_unquantized(layer, threads);
  }
  void embed(std::span<const std::int32_t> ids, std::span<float> out) const override {
    inner_.embed(ids, out);
  }
  std::vector<float> final_norm() const override { return inner_.final_norm(); }
  void head_rows(std::uint64_t begin, std::uint64_t count, std::span<float> out) const override {
    inner_.head_rows(begin, count, out);
  }
  libquant::QuantizedLinear quantized(std::uint64_t layer, std::size_t linear) const override {
    return inner_.quantized(layer, linear);
  }
  const formats::QuantizationConfig* quantization() const noexcept override { return inner_.quantization(); }
  const formats::Int4Scheme* imported() const noexcept override { return inner_.imported(); }

 protected:
  const WeightSource& inner() const noexcept { return inner_; }

 private:
  const WeightSource& inner_;
};

// HF folder, FireQ folder, or a 4-bit folder of another program (docs/import.md), told apart by
// config.json; the third kind acts as an original whose weights are the dequantised ones. Checks every
// tensor's presence and shape against the config first (fused qkv_proj / gate_up_proj tensors are
// understood).
std::unique_ptr<WeightSource> open_weights(
    const std::string& folder,
    formats::CheckpointReader::Output output = formats::CheckpointReader::Output::finished);

// The type in which an original checkpoint stores a linear (its own tensor or a fused one), or its scales
// where another program quantised it.
Dtype linear_dtype(const formats::CheckpointReader& reader, std::uint64_t layer, std::size_t linear);

// FP32 values of a F32/F16/BF16 tensor; Error(input) naming tensor and index when a value is NaN or Inf and
// `check_finite`.
void tensor_to_float(const TensorView& view, std::uint64_t begin_element, std::span<float> out,
                     bool check_finite);

}  // namespace fireq::calib
