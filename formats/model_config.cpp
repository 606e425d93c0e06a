// The rules follow transformers' configuration classes (defaults when a key is absent, what a null means) so
// that a folder means here what it means there. What would change the forward pass and is not implemented is
// refused by name instead of ignored.
#include "formats/model_config.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <filesystem>
#include <string_view>

#include "common/checked.hpp"
#include "common/error.hpp"
#include "formats/folder_rules.hpp"
#include "formats/model_config_json.hpp"

namespace fireq::formats {
namespace {

using nlohmann::json;

constexpr std::uint64_t kLargestSize = (std::uint64_t{1} << 31U) - 1;
constexpr std::uint64_t kMostLayers = 10'000;

// What transformers' configuration class of a model type assumes when config.json is silent.
struct Family {
  std::string_view model_type;
  std::string_view architecture;
  std::uint64_t kv_heads;  // 0: as many as heads
  std::uint64_t head_dim;  // 0: hidden / heads
  std::uint64_t context;
  std::int64_t bos, eos;  // -1: none
};
constexpr std::array<Family, 4> kFamilies{{
    {"llama", "LlamaForCausalLM", 0, 0, 2048, 1, 2},
    {"mistral", "MistralForCausalLM", 8, 0, 131072, 1, 2},
    {"qwen2", "Qwen2ForCausalLM", 32, 0, 32768, -1, -1},
    {"qwen3", "Qwen3ForCausalLM", 32, 128, 32768, -1, -1},
}};
constexpr std::string_view kSupported =
    "supported are llama (Llama 2 to 3.x, SmolLM2), mistral, qwen2 (Qwen2, Qwen2.5) and qwen3, all dense";

const Family& find_family(const JsonFields& fields) {
  const std::string type = fields.text_or("model_type", "");
  std::vector<std::string> architectures;
  if (const json* list = fields.find("architectures")) {
    if (!list->is_array()) fields.fail("architectures", "is not a list", "a list of strings");
    for (const json& item : *list) {
      if (!item.is_string()) fields.fail("architectures", "holds something else than strings");
      architectures.push_back(item.get<std::string>());
    }
  }
  if (type.empty() && architectures.empty()) {
    fields.fail("model_type", "is missing, and there is no 'architectures' either", {},
                std::string(kSupported));
  }

  std::vector<std::string> known;
  for (const Family& family : kFamilies) {
    known.emplace_back(family.model_type);
    const bool by_type = type == family.model_type;
    const bool by_architecture =
        std::find(architectures.begin(), architectures.end(), family.architecture) != architectures.end();
    if (by_type && !architectures.empty() && !by_architecture) {
      throw Error(ErrorKind::input, "architecture '" + architectures.front() + "' is not supported")
          .path(fields.path())
          .expected(std::string(family.architecture))
          .hint("only causal language models with their head are read");
    }
    if (by_type || (type.empty() && by_architecture)) return family;
  }
  const std::string name = type.empty() ? architectures.front() : type;
  const bool experts = name.find("moe") != std::string::npos || name.find("Moe") != std::string::npos ||
                       name.find("ixtral") != std::string::npos;
  std::string hint(kSupported);
  if (const std::string near = nearest_name(name, known); !near.empty()) {
    hint = "the nearest is '" + near + "'; " + hint;
  }
  throw Error(ErrorKind::input, (type.empty() ? "architecture '" : "model_type '") + name +
                                    "' is not supported" + (experts ? ": it is a mixture of experts" : ""))
      .path(fields.path())
      .hint(hint);
}

void refuse_unsupported(const JsonFields& fields) {
  for (const char* key : {"num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok",
                          "moe_intermediate_size", "moe_num_experts"}) {
    const json* value = fields.find(key);
    if (value != nullptr && !(value->is_number() && value->get<double>() == 0)) {
      fields.fail(key, "makes this a mixture of experts, which is not supported", {},
                  std::string(kSupported));
    }
  }
  if (fields.find("text_config") != nullptr) {
    fields.fail("text_config", "makes this a multimodal model, which is not supported", {},
                std::string(kSupported));
  }
  const std::string activation = fields.text_or("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {  // two names of one function
    fields.fail("hidden_act", "names an activation that is not supported", R"("silu")");
  }
  if (const json* value = fields.find("partial_rotary_factor");
      value != nullptr && !(value->is_number() && value->get<double>() == 1)) {
    fields.fail("partial_rotary_factor", "asks for a partial RoPE, which is not supported", "1");
  }
  if (fields.find("quantization_config") != nullptr) {
    const JsonFields quantization = fields.object("quantization_config");
    const std::string method = quantization.text_or("quant_method", "");
    // Those of int4_scheme.hpp are dequantised as they are read.
    if (method != "fireq" && method != "gptq" && method != "awq" && method != "compressed-tensors") {
      quantization.fail("quant_method", "says that this checkpoint is already quantised",
                        R"("fireq", "compressed-tensors", "gptq" or "awq")",
                        "start from the original model, in FP16, BF16 or FP32");
    }
  }
}

RopeConfig read_rope(const JsonFields& fields, std::uint64_t context) {
  RopeConfig rope;
  // rope_scaling (transformers 4) goes before rope_parameters (transformers 5) unless it is null or empty.
  const char* key = "rope_parameters";
  if (const json* old = fields.find("rope_scaling"); old != nullptr && !(old->is_object() && old->empty())) {
    key = "rope_scaling";
  }
  if (fields.find(key) == nullptr) {
    rope.theta = fields.positive_or("rope_theta", 10000);
    return rope;
  }
  const JsonFields rules = fields.object(key);
  for (const char* nested : {"full_attention", "sliding_attention"}) {
    if (rules.present(nested)) rules.fail(nested, "gives RoPE per kind of layer, which is not supported");
  }
  rope.theta = rules.find("rope_theta") != nullptr ? rules.positive("rope_theta")
                                                   : fields.positive_or("rope_theta", 10000);
  if (const json* part = rules.find("partial_rotary_factor");
      part != nullptr && !(part->is_number() && part->get<double>() == 1)) {
    rules.fail("partial_rotary_factor", "asks for a partial RoPE, which is not supported", "1");
  }
  const char* type_key = rules.find("rope_type") != nullptr ? "rope_type" : "type";
  const std::string type = rules.text_or(type_key, "default");
  if (type == "default") return rope;
  if (type != "linear" && type != "llama3") {
    rules.fail(type_key, "names a RoPE variant that is not supported", R"("default", "linear" or "llama3")");
  }
  rope.factor = rules.positive("factor");
  if (type == "linear") {
    rope.kind = RopeKind::linear;
    return rope;
  }
  rope.kind = RopeKind::llama3;
  rope.low_freq_factor = rules.positive("low_freq_factor");
  rope.high_freq_factor = rules.positive("high_freq_factor");
  if (rope.high_freq_factor <= rope.low_freq_factor) {
    rules.fail("high_freq_factor", "is not above low_freq_factor",
               "more than " + std::to_string(rope.low_freq_factor));
  }
  const char* original = "original_max_position_embeddings";
  rope.original_context = fields.find(original) != nullptr
                              ? fields.count(original, 1, kLargestSize)
                              : rules.count_or(original, context, 1, kLargestSize);
  return rope;
}

std::vector<std::uint64_t> read_windows(const JsonFields& fields, const ModelConfig& config) {
  const auto layers = static_cast<std::size_t>(config.layers);
  const bool qwen = config.model_type == "qwen2" || config.model_type == "qwen3";
  std::uint64_t window = 0;
  if (config.model_type == "mistral" || (qwen && fields.boolean_or("use_sliding_window", false))) {
    window = fields.present("sliding_window") ? fields.count_or("sliding_window", 0, 1, kLargestSize) : 4096;
  }
  std::vector<std::uint64_t> windows(layers, window);
  if (qwen) {
    const std::uint64_t first = fields.count_or("max_window_layers", 28, 0, kLargestSize);
    std::fill_n(windows.begin(), std::min<std::uint64_t>(first, layers), 0U);
  }
  if (fields.find("layer_types") == nullptr) return windows;

  const json& types = fields.array("layer_types");
  if (types.size() != layers) {
    fields.fail("layer_types", "has another length than num_hidden_layers",
                std::to_string(layers) + " entries");
  }
  for (std::size_t i = 0; i < layers; ++i) {
    const bool sliding = types[i] == "sliding_attention";
    if (!sliding && types[i] != "full_attention") {
      throw Error(ErrorKind::input,
                  "key 'layer_types[" + std::to_string(i) + "]' names a layer that is not supported")
          .path(fields.path())
          .expected(R"("full_attention" or "sliding_attention")")
          .found(json_excerpt(types[i]));
    }
    if (sliding && window == 0)
      fields.fail("layer_types", "has sliding attention, but no sliding_window is set");
    // Llama and Mistral treat all layers alike in transformers; a list that says otherwise is another model.
    if (!qwen && sliding != (window != 0)) {
      fields.fail("layer_types", "differs from what " + config.model_type + " does in every layer",
                  window != 0 ? R"(all "sliding_attention")" : R"(all "full_attention")");
    }
    windows[i] = sliding ? window : 0;
  }
  return windows;
}

std::vector<std::int64_t> read_ids(const JsonFields& fields, const std::string& key) {
  std::vector<std::int64_t> ids;
  const json* value = fields.find(key);
  if (value == nullptr) return ids;
  if (!value->is_array()) {
    ids.push_back(static_cast<std::int64_t>(fields.count(key, 0, kLargestSize)));
    return ids;
  }
  for (const json& item : *value) {
    if (!item.is_number_unsigned() || item.get<std::uint64_t>() > kLargestSize) {
      fields.fail(key, "holds something else than token ids",
                  "integers from 0 to " + std::to_string(kLargestSize));
    }
    ids.push_back(item.get<std::int64_t>());
  }
  return ids;
}

}  // namespace

ModelConfig parse_model_config(const std::string& json_text, const std::string& path_for_errors) {
  const json root = parse_json(json_text, path_for_errors);
  const JsonFields fields(root, path_for_errors);
  const Family& family = find_family(fields);
  refuse_unsupported(fields);

  ModelConfig config;
  config.model_type = family.model_type;
  config.hidden = fields.count("hidden_size", 1, kLargestSize);
  config.ffn = fields.count("intermediate_size", 1, kLargestSize);
  config.layers = fields.count("num_hidden_layers", 1, kMostLayers);
  config.heads = fields.count("num_attention_heads", 1, kLargestSize);
  config.vocab = fields.count("vocab_size", 1, kLargestSize);
  config.context = fields.count_or("max_position_embeddings", family.context, 1, kLargestSize);

  // An absent num_key_value_heads means the class's default, an explicit null means as many as heads.
  const bool silent = !fields.present("num_key_value_heads");
  const std::uint64_t assumed = silent && family.kv_heads != 0 ? family.kv_heads : config.heads;
  config.kv_heads = fields.count_or("num_key_value_heads", assumed, 1, kLargestSize);
  if (config.heads % config.kv_heads != 0) {
    fields.fail(
        "num_key_value_heads", "does not divide num_attention_heads",
        "a divisor of " + std::to_string(config.heads),
        silent ? "the key is absent: " + std::to_string(assumed) + " is this model type's default" : "");
  }
  if (fields.find("head_dim") == nullptr && (family.head_dim == 0 || fields.present("head_dim"))) {
    if (config.hidden % config.heads != 0) {
      fields.fail("hidden_size", "is no multiple of num_attention_heads, and head_dim is not given",
                  "a multiple of " + std::to_string(config.heads));
    }
    config.head_dim = config.hidden / config.heads;
  } else {
    config.head_dim = fields.count_or("head_dim", family.head_dim, 1, kLargestSize);
  }
  if (config.head_dim % 2 != 0) {
    throw Error(ErrorKind::input, "head_dim is odd, but RoPE rotates pairs")
        .path(path_for_errors)
        .expected("an even head_dim")
        .found(std::to_string(config.head_dim));
  }
  if (checked_mul(config.heads, config.head_dim, "num_attention_heads * head_dim") > kLargestSize) {
    fields.fail("head_dim", "times num_attention_heads is too large",
                "at most " + std::to_string(kLargestSize));
  }

  config.rms_eps = fields.positive_or("rms_norm_eps", 1e-6);
  config.rope = read_rope(fields, config.context);
  config.sliding_window = read_windows(fields, config);
  config.tied_embeddings = fields.boolean_or("tie_word_embeddings", false);

  const bool attention_bias = fields.boolean_or("attention_bias", false);
  const bool mlp_bias = fields.boolean_or("mlp_bias", false);
  if (family.model_type == "qwen2") {
    config.qkv_bias = true;  // always, whatever attention_bias says
  } else if (family.model_type == "mistral") {
    if (attention_bias) fields.fail("attention_bias", "is not part of Mistral", "false");
  } else {
    config.qkv_bias = config.o_bias = attention_bias;
  }
  if (family.model_type == "llama") {
    config.mlp_bias = mlp_bias;
  } else if (mlp_bias) {
    fields.fail("mlp_bias", "is not part of model type " + config.model_type, "false");
  }
  config.qk_norm = family.model_type == "qwen3";

  if (const std::vector<std::int64_t> bos = read_ids(fields, "bos_token_id"); !bos.empty()) {
    config.bos_id = bos.front();
  } else if (!fields.present("bos_token_id") && family.bos >= 0) {
    config.bos_id = family.bos;
  }
  config.eos_ids = read_ids(fields, "eos_token_id");
  if (!fields.present("eos_token_id") && family.eos >= 0) config.eos_ids = {family.eos};
  config.torch_dtype = fields.text_or(fields.find("dtype") != nullptr ? "dtype" : "torch_dtype", "");
  return config;
}

ModelConfig read_model_config(const std::string& folder) {
  constexpr std::uint64_t kLargestFile = std::uint64_t{1} << 24U;
  const std::filesystem::path at(folder);
  const std::string path = (at / "config.json").string();
  ModelConfig config = parse_model_config(read_text_inside_folder(folder, "config.json", kLargestFile), path);
  const std::string generation = (at / "generation_config.json").string();
  if (path_exists(generation)) {
    const json root =
        parse_json(read_text_inside_folder(folder, "generation_config.json", kLargestFile), generation);
    const JsonFields fields(root, generation);
    if (fields.find("eos_token_id") != nullptr) config.eos_ids = read_ids(fields, "eos_token_id");
  }
  return config;
}

std::vector<float> rope_inverse_frequencies(const ModelConfig& config) {
  const auto pairs = static_cast<std::size_t>(config.head_dim / 2);
  std::vector<float> frequencies(pairs);
  const RopeConfig& rope = config.rope;
  // The order of FP32 operations is that of transformers' modeling_rope_utils; Python's floats that meet a
  // tensor there are rounded to FP32 first.
  const auto theta = static_cast<float>(rope.theta);
  const auto factor = static_cast<float>(rope.factor);
  const auto low = static_cast<float>(rope.low_freq_factor);
  const auto context = static_cast<float>(rope.original_context);
  const double low_wavelength = static_cast<double>(rope.original_context) / rope.low_freq_factor;
  const double high_wavelength = static_cast<double>(rope.original_context) / rope.high_freq_factor;
  const auto band = static_cast<float>(rope.high_freq_factor - rope.low_freq_factor);
  for (std::size_t i = 0; i < pairs; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(config.head_dim);
    float frequency = 1.0F / std::pow(theta, exponent);
    if (rope.kind == RopeKind::linear) frequency /= factor;
    if (rope.kind == RopeKind::llama3) {
      constexpr double kTwoPi = 6.283185307179586476925286766559;
      const float wavelength = static_cast<float>(kTwoPi) / frequency;
      if (wavelength > static_cast<float>(low_wavelength)) {
        frequency /= factor;
      } else if (!(wavelength < static_cast<float>(high_wavelength))) {
        const float smooth = (context / wavelength - low) / band;
        frequency = (1.0F - smooth) * frequency / factor + smooth * frequency;
      }
    }
    frequencies[i] = frequency;
  }
  return frequencies;
}

}  // namespace fireq::formats
