// config.json of the Llama family, understood: what the forward pass and the quantiser need to know.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace fireq::formats {

enum class RopeKind : std::uint8_t { standard, linear, llama3, yarn };

struct RopeConfig {
  RopeKind kind = RopeKind::standard;
  double theta = 10000;
  double factor = 1;                      // linear, llama3
  double low_freq_factor = 1;             // llama3
  double high_freq_factor = 4;            // llama3
  std::uint64_t original_context = 8192;  // llama3
};

struct ModelConfig {
  std::string model_type;  // "llama", "mistral", "qwen2", "qwen3"
  std::uint64_t hidden = 0, ffn = 0, layers = 0, heads = 0, kv_heads = 0, head_dim = 0, vocab = 0,
                context = 0;
  double rms_eps = 1e-6;
  RopeConfig rope;
  bool qkv_bias = false;  // q, k, v (Qwen2; Llama's attention_bias)
  bool o_bias = false;    // Llama's attention_bias adds one to o_proj too
  bool mlp_bias = false;
  bool qk_norm = false;  // Qwen3: RMSNorm per head on q and k before RoPE
  bool tied_embeddings = false;
  // 0: full attention. Else each query sees the last `window` keys including its own; per layer.
  std::vector<std::uint64_t> sliding_window;  // [layers]
  std::optional<std::int64_t> bos_id;
  std::vector<std::int64_t> eos_ids;
  std::string torch_dtype;

  std::uint64_t q_rows() const noexcept { return heads * head_dim; }
  std::uint64_t kv_rows() const noexcept { return kv_heads * head_dim; }
};

// Reads FOLDER/config.json (and generation_config.json for EOS ids when there). Unknown architectures,
// activations, RoPE variants and MoE are refused by name (Error(input) with path and key). Every count is
// checked: positive, below 2^31, heads % kv_heads == 0, even head_dim.
ModelConfig read_model_config(const std::string& folder);
ModelConfig parse_model_config(const std::string& json_text, const std::string& path_for_errors);

// Inverse frequencies [head_dim/2] of RoPE in FP32, operation by operation as transformers computes them
// (modeling_rope_utils.py: default, linear, llama3).
std::vector<float> rope_inverse_frequencies(const ModelConfig& config);

}  // namespace fireq::formats
