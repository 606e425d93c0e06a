#include "tests/calib/random_model.hpp"

#include <unistd.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <stdexcept>
#include <vector>

#include "formats/file_system.hpp"
#include "formats/safetensors.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::testing_support {
namespace {

// How a tensor's values are drawn.
enum class Draw : std::uint8_t { matrix, norm, bias };
struct Plan {
  std::string name;
  std::vector<std::uint64_t> shape;
  Draw draw;
  double scale = 1;
};

std::vector<std::byte> encode(const std::vector<float>& values, Dtype dtype) {
  std::vector<std::byte> bytes(values.size() * dtype_size(dtype));
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (dtype == Dtype::f32) {
      std::memcpy(bytes.data() + 4 * i, &values[i], 4);
    } else {
      const std::uint16_t bits =
          dtype == Dtype::f16 ? libquant::encode_f16(values[i]) : libquant::encode_bf16(values[i]);
      std::memcpy(bytes.data() + 2 * i, &bits, 2);
    }
  }
  return bytes;
}

// Tensors are drawn one at a time, in order: a large model never lies in memory whole.
class Maker {
 public:
  explicit Maker(const RandomModel& m) : m_(m), random_(m.seed) {}

  std::vector<Plan> plan() {
    const double head = 2.0 / std::sqrt(static_cast<double>(m_.hidden));
    list_.push_back({"model.embed_tokens.weight", {m_.vocab, m_.hidden}, Draw::matrix, 1.0});
    add_norm("model.norm.weight", m_.hidden);
    if (!m_.tied) list_.push_back({"lm_head.weight", {m_.vocab, m_.hidden}, Draw::matrix, head});
    for (std::uint64_t i = 0; i < m_.layers; ++i) add_layer("model.layers." + std::to_string(i) + ".");
    return std::move(list_);
  }

  std::vector<float> values(const Plan& p) {
    std::uint64_t n = 1;
    for (const std::uint64_t d : p.shape) n *= d;
    const std::uint64_t cols = p.shape.back();
    std::vector<float> out(n);
    for (std::uint64_t i = 0; i < n; ++i) {
      const double x = normal_(random_);
      if (p.draw == Draw::norm) {
        out[i] = static_cast<float>(1 + 0.2 * x);
      } else if (p.draw == Draw::bias) {
        out[i] = static_cast<float>(0.3 * x);
      } else {  // every 17th input channel is an outlier
        out[i] = static_cast<float>(x * p.scale * (i % cols % 17 == 0 ? 4.0 : 1.0));
      }
    }
    return out;
  }

 private:
  void add_norm(const std::string& name, std::uint64_t n) { list_.push_back({name, {n}, Draw::norm}); }
  void add_linear(const std::string& name, std::uint64_t rows, std::uint64_t cols, bool bias) {
    const double scale = 0.7 / std::sqrt(static_cast<double>(cols));
    list_.push_back({name + ".weight", {rows, cols}, Draw::matrix, scale});
    if (bias) list_.push_back({name + ".bias", {rows}, Draw::bias});
  }
  void add_layer(const std::string& p) {
    const bool qkv = m_.attention_bias || m_.model_type == "qwen2";
    add_norm(p + "input_layernorm.weight", m_.hidden);
    add_norm(p + "post_attention_layernorm.weight", m_.hidden);
    add_linear(p + "self_attn.q_proj", m_.heads * m_.head_dim, m_.hidden, qkv);
    add_linear(p + "self_attn.k_proj", m_.kv_heads * m_.head_dim, m_.hidden, qkv);
    add_linear(p + "self_attn.v_proj", m_.kv_heads * m_.head_dim, m_.hidden, qkv);
    add_linear(p + "self_attn.o_proj", m_.hidden, m_.heads * m_.head_dim, m_.attention_bias);
    if (m_.model_type == "qwen3") {
      add_norm(p + "self_attn.q_norm.weight", m_.head_dim);
      add_norm(p + "self_attn.k_norm.weight", m_.head_dim);
    }
    add_linear(p + "mlp.gate_proj", m_.ffn, m_.hidden, m_.mlp_bias);
    add_linear(p + "mlp.up_proj", m_.ffn, m_.hidden, m_.mlp_bias);
    add_linear(p + "mlp.down_proj", m_.hidden, m_.ffn, m_.mlp_bias);
  }

  const RandomModel& m_;
  std::mt19937_64 random_;
  std::normal_distribution<double> normal_;
  std::vector<Plan> list_;
};

}  // namespace

void write_random_model(const std::filesystem::path& folder, const RandomModel& m) {
  std::filesystem::create_directories(folder);
  nlohmann::json config = {{"model_type", m.model_type},
                           {"hidden_size", m.hidden},
                           {"intermediate_size", m.ffn},
                           {"num_hidden_layers", m.layers},
                           {"num_attention_heads", m.heads},
                           {"num_key_value_heads", m.kv_heads},
                           {"head_dim", m.head_dim},
                           {"vocab_size", m.vocab},
                           {"max_position_embeddings", m.context},
                           {"rms_norm_eps", 1e-5},
                           {"rope_theta", 10000.0},
                           {"hidden_act", "silu"},
                           {"tie_word_embeddings", m.tied},
                           {"bos_token_id", 1},
                           {"eos_token_id", 2}};
  if (m.model_type == "llama") {
    config["architectures"] = {"LlamaForCausalLM"};
    config["attention_bias"] = m.attention_bias;
    config["mlp_bias"] = m.mlp_bias;
  } else if (m.model_type == "mistral") {
    config["architectures"] = {"MistralForCausalLM"};
    config["sliding_window"] = m.sliding_window == 0 ? nlohmann::json() : nlohmann::json(m.sliding_window);
  } else if (m.model_type == "qwen2") {
    config["architectures"] = {"Qwen2ForCausalLM"};
  } else {
    config["architectures"] = {"Qwen3ForCausalLM"};
    config["attention_bias"] = false;
  }
  std::ofstream(folder / "config.json") << config.dump(2) << "\n";

  const Dtype dtype = parse_dtype(m.dtype).value();
  Maker maker(m);
  const std::vector<Plan> tensors = maker.plan();
  std::vector<formats::TensorPlan> plan;
  plan.reserve(tensors.size());
  for (const Plan& p : tensors) plan.push_back({p.name, dtype, p.shape});
  formats::SafetensorsWriter writer(formats::real_file_system(), (folder / "model.safetensors").string(),
                                    plan, {{"format", "pt"}});
  for (const Plan& p : tensors) writer.append(encode(maker.values(p), dtype));
  writer.finish();
}

}  // namespace fireq::testing_support
