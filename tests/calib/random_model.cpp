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

struct Values {
  std::string name;
  std::vector<std::uint64_t> shape;
  std::vector<float> data;
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

class Maker {
 public:
  explicit Maker(const RandomModel& m) : m_(m), random_(m.seed) {}

  std::vector<Values> tensors() {
    add_matrix("model.embed_tokens.weight", m_.vocab, m_.hidden, 1.0);
    add_norm("model.norm.weight", m_.hidden);
    if (!m_.tied)
      add_matrix("lm_head.weight", m_.vocab, m_.hidden, 2.0 / std::sqrt(static_cast<double>(m_.hidden)));
    for (std::uint64_t i = 0; i < m_.layers; ++i) add_layer("model.layers." + std::to_string(i) + ".");
    return std::move(list_);
  }

 private:
  double normal() { return normal_(random_); }

  void add_matrix(const std::string& name, std::uint64_t rows, std::uint64_t cols, double scale) {
    Values v{name, {rows, cols}, std::vector<float>(rows * cols)};
    std::vector<double> column(cols, 1.0);
    for (std::uint64_t c = 0; c < cols; c += 17) column[c] = 4;  // outlier channels
    for (std::size_t i = 0; i < v.data.size(); ++i)
      v.data[i] = static_cast<float>(normal() * scale * column[i % cols]);
    list_.push_back(std::move(v));
  }
  void add_norm(const std::string& name, std::uint64_t n) {
    Values v{name, {n}, std::vector<float>(n)};
    for (float& x : v.data) x = static_cast<float>(1 + 0.2 * normal());
    list_.push_back(std::move(v));
  }
  void add_linear(const std::string& name, std::uint64_t rows, std::uint64_t cols, bool bias) {
    add_matrix(name + ".weight", rows, cols, 0.7 / std::sqrt(static_cast<double>(cols)));
    if (!bias) return;
    Values v{name + ".bias", {rows}, std::vector<float>(rows)};
    for (float& x : v.data) x = static_cast<float>(0.3 * normal());
    list_.push_back(std::move(v));
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
  std::vector<Values> list_;
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
  const std::vector<Values> tensors = Maker(m).tensors();
  std::vector<formats::TensorPlan> plan;
  for (const Values& v : tensors) plan.push_back({v.name, dtype, v.shape});
  formats::SafetensorsWriter writer(formats::real_file_system(), (folder / "model.safetensors").string(),
                                    plan, {{"format", "pt"}});
  for (const Values& v : tensors) writer.append(encode(v.data, dtype));
  writer.finish();
}

TemporaryFolder::TemporaryFolder(const std::string& name) {
  static int counter = 0;
  path_ = std::filesystem::temp_directory_path() /
          ("fireq-" + name + "-" + std::to_string(::getpid()) + "-" + std::to_string(counter++));
  std::filesystem::create_directories(path_);
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace fireq::testing_support
