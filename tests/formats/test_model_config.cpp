// config.json: what each supported family means by it, and every refusal by name.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "formats/model_config.hpp"
#include "tests/formats/support.hpp"

namespace fireq::formats {
namespace {

using nlohmann::json;
using test::error_of;
using test::expect_parts;
using test::Parts;
using test::TempFolder;
using test::write_bytes;

// The keys that no family has a default for.
json sizes() {
  return {{"hidden_size", 64},        {"intermediate_size", 96},  {"num_hidden_layers", 3},
          {"num_attention_heads", 4}, {"num_key_value_heads", 2}, {"vocab_size", 1000}};
}
json family(const std::string& model_type) {
  json config = sizes();
  config["model_type"] = model_type;
  return config;
}
json with(json config, const json& changes) {
  config.update(changes);
  return config;
}
json without(json config, const char* key) {
  config.erase(key);
  return config;
}
ModelConfig parse(const json& config) {
  return parse_model_config(config.dump(), "m/config.json");
}

void expect_refused(const json& config, Parts parts) {
  parts.path = "m/config.json";
  expect_parts(error_of([&] { parse(config); }), parts);
}

TEST(ModelConfig, LlamaDefaults) {
  const ModelConfig c = parse(family("llama"));
  EXPECT_EQ(c.model_type, "llama");
  EXPECT_EQ(c.hidden, 64U);
  EXPECT_EQ(c.ffn, 96U);
  EXPECT_EQ(c.layers, 3U);
  EXPECT_EQ(c.heads, 4U);
  EXPECT_EQ(c.kv_heads, 2U);
  EXPECT_EQ(c.head_dim, 16U);
  EXPECT_EQ(c.vocab, 1000U);
  EXPECT_EQ(c.context, 2048U);
  EXPECT_EQ(c.rms_eps, 1e-6);
  EXPECT_EQ(c.rope.kind, RopeKind::standard);
  EXPECT_EQ(c.rope.theta, 10000);
  EXPECT_FALSE(c.qkv_bias || c.o_bias || c.mlp_bias || c.qk_norm || c.tied_embeddings);
  EXPECT_EQ(c.sliding_window, (std::vector<std::uint64_t>{0, 0, 0}));
  EXPECT_EQ(c.bos_id, 1);
  EXPECT_EQ(c.eos_ids, (std::vector<std::int64_t>{2}));
  EXPECT_EQ(c.torch_dtype, "");
  EXPECT_EQ(c.q_rows(), 64U);
  EXPECT_EQ(c.kv_rows(), 32U);
}

TEST(ModelConfig, WhatEachFamilyAssumes) {
  const json thirty_two = with(sizes(), {{"hidden_size", 512}, {"num_attention_heads", 64}});
  const auto silent = [&](const char* type) {
    return parse(with(without(thirty_two, "num_key_value_heads"), {{"model_type", type}}));
  };
  const ModelConfig llama = silent("llama"), mistral = silent("mistral"), qwen2 = silent("qwen2"),
                    qwen3 = silent("qwen3");
  // Grouped queries when the key is absent.
  EXPECT_EQ(llama.kv_heads, 64U);
  EXPECT_EQ(mistral.kv_heads, 8U);
  EXPECT_EQ(qwen2.kv_heads, 32U);
  EXPECT_EQ(qwen3.kv_heads, 32U);
  EXPECT_EQ(llama.head_dim, 8U);
  EXPECT_EQ(mistral.head_dim, 8U);
  EXPECT_EQ(qwen2.head_dim, 8U);
  EXPECT_EQ(qwen3.head_dim, 128U);  // its own default, not hidden / heads
  EXPECT_EQ(llama.context, 2048U);
  EXPECT_EQ(mistral.context, 131072U);
  EXPECT_EQ(qwen2.context, 32768U);
  EXPECT_EQ(qwen3.context, 32768U);
  EXPECT_EQ(mistral.bos_id, 1);
  EXPECT_FALSE(qwen2.bos_id || qwen3.bos_id);
  EXPECT_TRUE(qwen2.eos_ids.empty());
  // Biases and norms.
  EXPECT_TRUE(qwen2.qkv_bias);
  EXPECT_FALSE(llama.qkv_bias || mistral.qkv_bias || qwen3.qkv_bias || qwen2.o_bias || qwen2.mlp_bias);
  EXPECT_TRUE(qwen3.qk_norm);
  EXPECT_FALSE(llama.qk_norm || mistral.qk_norm || qwen2.qk_norm);
  // An explicit null: as many as heads, in every family.
  for (const char* type : {"llama", "mistral", "qwen2", "qwen3"}) {
    EXPECT_EQ(parse(with(thirty_two, {{"model_type", type}, {"num_key_value_heads", nullptr}})).kv_heads,
              64U);
  }
  EXPECT_EQ(parse(with(family("qwen3"), {{"head_dim", nullptr}})).head_dim, 16U);
}

TEST(ModelConfig, TheArchitectureMayStandForTheType) {
  for (const auto& [architecture, type] :
       std::vector<std::pair<const char*, const char*>>{{"LlamaForCausalLM", "llama"},
                                                        {"MistralForCausalLM", "mistral"},
                                                        {"Qwen2ForCausalLM", "qwen2"},
                                                        {"Qwen3ForCausalLM", "qwen3"}}) {
    EXPECT_EQ(parse(with(sizes(), {{"architectures", {architecture}}})).model_type, type);
    EXPECT_EQ(parse(with(family(type), {{"architectures", {"Other", architecture}}})).model_type, type);
  }
}

TEST(ModelConfig, BiasesWindowsAndIds) {
  const ModelConfig bias = parse(with(family("llama"), {{"attention_bias", true}, {"mlp_bias", true}}));
  EXPECT_TRUE(bias.qkv_bias && bias.o_bias && bias.mlp_bias);
  const ModelConfig qwen3 = parse(with(family("qwen3"), {{"attention_bias", true}}));
  EXPECT_TRUE(qwen3.qkv_bias && qwen3.o_bias);
  EXPECT_TRUE(parse(with(family("qwen2"), {{"attention_bias", false}})).qkv_bias);

  using Windows = std::vector<std::uint64_t>;
  EXPECT_EQ(parse(family("mistral")).sliding_window, (Windows{4096, 4096, 4096}));
  EXPECT_EQ(parse(with(family("mistral"), {{"sliding_window", nullptr}})).sliding_window, (Windows{0, 0, 0}));
  EXPECT_EQ(parse(with(family("mistral"), {{"sliding_window", 7}})).sliding_window, (Windows{7, 7, 7}));
  const json qwen = with(family("qwen2"), {{"sliding_window", 7}, {"max_window_layers", 1}});
  EXPECT_EQ(parse(qwen).sliding_window, (Windows{0, 0, 0}));  // only with use_sliding_window
  EXPECT_EQ(parse(with(qwen, {{"use_sliding_window", true}})).sliding_window, (Windows{0, 7, 7}));
  const json types{{"use_sliding_window", true},
                   {"layer_types", {"sliding_attention", "full_attention", "sliding_attention"}}};
  EXPECT_EQ(parse(with(qwen, types)).sliding_window, (Windows{7, 0, 7}));

  const auto ids = [&](const json& eos) {
    return parse(with(family("llama"), {{"eos_token_id", eos}})).eos_ids;
  };
  EXPECT_EQ(ids(5), (std::vector<std::int64_t>{5}));
  EXPECT_EQ(ids({5, 6}), (std::vector<std::int64_t>{5, 6}));
  EXPECT_TRUE(ids(nullptr).empty());
  EXPECT_FALSE(parse(with(family("llama"), {{"bos_token_id", nullptr}})).bos_id);
  EXPECT_TRUE(parse(with(family("llama"), {{"tie_word_embeddings", true}})).tied_embeddings);
  EXPECT_EQ(parse(with(family("llama"), {{"torch_dtype", "bfloat16"}})).torch_dtype, "bfloat16");
  EXPECT_EQ(parse(with(family("llama"), {{"torch_dtype", "x"}, {"dtype", "float16"}})).torch_dtype,
            "float16");
}

TEST(ModelConfig, RopeVariants) {
  const auto rope = [](const json& changes) { return parse(with(family("llama"), changes)).rope; };
  EXPECT_EQ(rope({{"rope_theta", 500000.0}}).theta, 500000);
  EXPECT_EQ(rope({{"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 5e5}}}}).theta, 500000);
  EXPECT_EQ(rope({{"rope_theta", 7e5}, {"rope_parameters", {{"rope_type", "default"}}}}).theta, 700000);
  EXPECT_EQ(rope({{"rope_scaling", nullptr}}).kind, RopeKind::standard);
  for (const char* key : {"type", "rope_type"}) {  // old and new spelling
    const RopeConfig linear = rope({{"rope_scaling", {{key, "linear"}, {"factor", 4}}}});
    EXPECT_EQ(linear.kind, RopeKind::linear);
    EXPECT_EQ(linear.factor, 4);
  }
  const json llama3{{"rope_type", "llama3"},
                    {"factor", 8.0},
                    {"low_freq_factor", 1.0},
                    {"high_freq_factor", 4.0},
                    {"original_max_position_embeddings", 4096}};
  const RopeConfig scaled = rope({{"rope_scaling", llama3}});
  EXPECT_EQ(scaled.kind, RopeKind::llama3);
  EXPECT_EQ(scaled.factor, 8);
  EXPECT_EQ(scaled.low_freq_factor, 1);
  EXPECT_EQ(scaled.high_freq_factor, 4);
  EXPECT_EQ(scaled.original_context, 4096U);
}

// In double precision from the formulas: the wavelength decides.
TEST(ModelConfig, RopeInverseFrequencies) {
  constexpr double kPi = 3.14159265358979323846;
  ModelConfig config = parse(with(family("llama"), {{"head_dim", 128}, {"rope_theta", 500000.0}}));
  for (const RopeKind kind : {RopeKind::standard, RopeKind::linear, RopeKind::llama3}) {
    config.rope.kind = kind;
    config.rope.factor = 8;
    config.rope.original_context = 8192;
    const std::vector<float> found = rope_inverse_frequencies(config);
    ASSERT_EQ(found.size(), 64U);
    std::size_t kept = 0, divided = 0, between = 0;
    for (std::size_t i = 0; i < found.size(); ++i) {
      double expected = std::pow(500000.0, -2.0 * static_cast<double>(i) / 128);
      const double turns = 8192 * expected / (2 * kPi);  // of this pair over the original context
      if (kind == RopeKind::linear || (kind == RopeKind::llama3 && turns < 1)) {
        ++divided;
        expected /= 8;
      } else if (kind == RopeKind::llama3 && turns <= 4) {
        ++between;
        const double smooth = (turns - 1) / (4 - 1);
        expected = (1 - smooth) * expected / 8 + smooth * expected;
      } else {
        ++kept;
      }
      EXPECT_NEAR(found[i] / expected, 1, 3e-6) << i;
    }
    if (kind == RopeKind::llama3) {
      EXPECT_TRUE(kept > 0 && divided > 0 && between > 0);
    }
  }
}

constexpr const char* kSupported =
    "supported are llama (Llama 2 to 3.x, SmolLM2), mistral, qwen2 (Qwen2, "
    "Qwen2.5) and qwen3, all dense";

TEST(ModelConfig, RefusesOtherArchitecturesByName) {
  for (const char* type : {"gpt2", "gemma3", "phi3", "deepseek_v3", "mamba", "LLAMA"}) {
    const auto error = error_of([&] { parse(family(type)); });
    ASSERT_TRUE(error) << type;
    EXPECT_EQ(error->kind(), ErrorKind::input);
    EXPECT_EQ(error->message(), std::string("model_type '") + type + "' is not supported");
    EXPECT_NE(error->hint().find(kSupported), std::string::npos) << error->what();
  }
  expect_refused(family("llma"), {.message = "model_type 'llma' is not supported",
                                  .hint = std::string("the nearest is 'llama'; ") + kSupported});
  for (const char* type : {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe"}) {
    const auto error = error_of([&] { parse(family(type)); });
    ASSERT_TRUE(error) << type;
    EXPECT_EQ(error->message(),
              std::string("model_type '") + type + "' is not supported: it is a mixture of experts");
  }
  expect_refused(with(sizes(), {{"architectures", {"MixtralForCausalLM"}}}),
                 {.message = "architecture 'MixtralForCausalLM' is not supported: it is a mixture of experts",
                  .hint = kSupported});
  expect_refused(with(family("llama"), {{"architectures", {"LlamaForSequenceClassification"}}}),
                 {.message = "architecture 'LlamaForSequenceClassification' is not supported",
                  .expected = "LlamaForCausalLM",
                  .hint = "only causal language models with their head are read"});
  expect_refused(sizes(), {.message = "key 'model_type' is missing, and there is no 'architectures' either",
                           .hint = kSupported});
}

TEST(ModelConfig, RefusesWhatWouldChangeTheForwardPass) {
  struct Row {
    json change;
    Parts parts;
  };
  const std::string rope = "\"default\", \"linear\" or \"llama3\"";
  const std::vector<Row> rows{
      {{{"num_local_experts", 8}},
       {.message = "key 'num_local_experts' makes this a mixture of experts, which is not supported",
        .found = "8",
        .hint = kSupported}},
      {{{"num_experts", 128}},
       {.message = "key 'num_experts' makes this a mixture of experts, which is not supported",
        .found = "128",
        .hint = kSupported}},
      {{{"n_routed_experts", 64}},
       {.message = "key 'n_routed_experts' makes this a mixture of experts, which is not supported",
        .found = "64",
        .hint = kSupported}},
      {{{"text_config", json::object()}},
       {.message = "key 'text_config' makes this a multimodal model, which is not supported",
        .found = "an object",
        .hint = kSupported}},
      {{{"hidden_act", "gelu"}},
       {.message = "key 'hidden_act' names an activation that is not supported",
        .expected = "\"silu\"",
        .found = "\"gelu\""}},
      {{{"partial_rotary_factor", 0.5}},
       {.message = "key 'partial_rotary_factor' asks for a partial RoPE, which is not supported",
        .expected = "1",
        .found = "0.5"}},
      {{{"rope_parameters", {{"rope_type", "default"}, {"partial_rotary_factor", 0.25}}}},
       {.message =
            "key 'rope_parameters.partial_rotary_factor' asks for a partial RoPE, which is not supported",
        .expected = "1",
        .found = "0.25"}},
      {{{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4}}}},
       {.message = "key 'rope_scaling.rope_type' names a RoPE variant that is not supported",
        .expected = rope,
        .found = "\"yarn\""}},
      {{{"rope_scaling", {{"type", "dynamic"}, {"factor", 4}}}},
       {.message = "key 'rope_scaling.type' names a RoPE variant that is not supported",
        .expected = rope,
        .found = "\"dynamic\""}},
      {{{"rope_scaling", {{"type", "longrope"}}}},
       {.message = "key 'rope_scaling.type' names a RoPE variant that is not supported",
        .expected = rope,
        .found = "\"longrope\""}},
      {{{"rope_parameters", {{"full_attention", json::object()}}}},
       {.message =
            "key 'rope_parameters.full_attention' gives RoPE per kind of layer, which is not supported",
        .found = "an object"}},
      {{{"rope_scaling", {{"type", "linear"}}}}, {.message = "key 'rope_scaling.factor' is missing"}},
      {{{"rope_scaling", {{"type", "linear"}, {"factor", 0}}}},
       {.message = "key 'rope_scaling.factor' is out of range",
        .expected = "a positive number",
        .found = "0"}},
      {{{"rope_scaling",
         {{"rope_type", "llama3"}, {"factor", 8}, {"low_freq_factor", 4}, {"high_freq_factor", 4}}}},
       {.message = "key 'rope_scaling.high_freq_factor' is not above low_freq_factor",
        .expected = "more than 4...",
        .found = "4"}},
      {{{"rope_scaling", "linear"}},
       {.message = "key 'rope_scaling' is not a JSON object",
        .expected = "an object",
        .found = "\"linear\""}},
      {{{"quantization_config", {{"quant_method", "bitsandbytes"}}}},
       {.message = "key 'quantization_config.quant_method' says that this checkpoint is already quantised",
        .expected = "\"fireq\", \"compressed-tensors\", \"gptq\" or \"awq\"",
        .found = "\"bitsandbytes\"",
        .hint = "start from the original model, in FP16, BF16 or FP32"}},
      {{{"layer_types", {"full_attention"}}},
       {.message = "key 'layer_types' has another length than num_hidden_layers",
        .expected = "3 entries",
        .found = "a list of 1"}},
      {{{"layer_types", {"full_attention", "chunked_attention", "full_attention"}}},
       {.message = "key 'layer_types[1]' names a layer that is not supported",
        .expected = "\"full_attention\" or \"sliding_attention\"",
        .found = "\"chunked_attention\""}},
      {{{"layer_types", {"full_attention", "sliding_attention", "full_attention"}}},
       {.message = "key 'layer_types' has sliding attention, but no sliding_window is set",
        .found = "a list of 3"}},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.change.dump());
    expect_refused(with(family("llama"), row.change), row.parts);
  }
  expect_refused(with(family("mistral"),
                      {{"layer_types", {"sliding_attention", "full_attention", "sliding_attention"}}}),
                 {.message = "key 'layer_types' differs from what mistral does in every layer",
                  .expected = "all \"sliding_attention\"",
                  .found = "a list of 3"});
  expect_refused(
      with(family("mistral"), {{"attention_bias", true}}),
      {.message = "key 'attention_bias' is not part of Mistral", .expected = "false", .found = "true"});
  for (const char* type : {"mistral", "qwen2", "qwen3"}) {
    expect_refused(with(family(type), {{"mlp_bias", true}}),
                   {.message = std::string("key 'mlp_bias' is not part of model type ") + type,
                    .expected = "false",
                    .found = "true"});
  }
}

TEST(ModelConfig, EveryCountIsChecked) {
  constexpr std::int64_t kLargest = (std::int64_t{1} << 31) - 1;
  for (const char* key : {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                          "num_key_value_heads", "vocab_size", "max_position_embeddings", "head_dim"}) {
    SCOPED_TRACE(key);
    const std::int64_t most = std::string(key) == "num_hidden_layers" ? 10'000 : kLargest;
    const std::string range = "an integer from 1 to " + std::to_string(most);
    const std::string name = std::string("key '") + key + "' ";
    const json llama = family("llama");
    expect_refused(with(llama, {{key, 0}}),
                   {.message = name + "is out of range", .expected = range, .found = "0"});
    expect_refused(
        with(llama, {{key, most + 1}}),
        {.message = name + "is out of range", .expected = range, .found = std::to_string(most + 1)});
    expect_refused(with(llama, {{key, -1}}),
                   {.message = name + "is negative", .expected = range, .found = "-1"});
    expect_refused(with(llama, {{key, 64.0}}),
                   {.message = name + "is not an integer", .expected = range, .found = "64.0"});
    expect_refused(with(llama, {{key, "64"}}),
                   {.message = name + "is not an integer", .expected = range, .found = "\"64\""});
    if (std::string(key) != "head_dim" && std::string(key) != "num_key_value_heads" &&
        std::string(key) != "max_position_embeddings") {
      const auto error = error_of([&] { parse(without(llama, key)); });
      ASSERT_TRUE(error);
      EXPECT_EQ(error->message(), name + "is missing");
      expect_refused(with(llama, {{key, nullptr}}), {.message = name + "must not be null", .found = "null"});
    }
  }
  expect_refused(with(family("llama"), {{"num_key_value_heads", 3}}),
                 {.message = "key 'num_key_value_heads' does not divide num_attention_heads",
                  .expected = "a divisor of 4",
                  .found = "3"});
  expect_refused(without(family("qwen2"), "num_key_value_heads"),
                 {.message = "key 'num_key_value_heads' does not divide num_attention_heads",
                  .expected = "a divisor of 4",
                  .hint = "the key is absent: 32 is this model type's default"});
  expect_refused(
      with(family("llama"), {{"hidden_size", 66}}),
      {.message = "key 'hidden_size' is no multiple of num_attention_heads, and head_dim is not given",
       .expected = "a multiple of 4",
       .found = "66"});
  expect_refused(
      with(family("llama"), {{"head_dim", 15}}),
      {.message = "head_dim is odd, but RoPE rotates pairs", .expected = "an even head_dim", .found = "15"});
  expect_refused(with(family("llama"), {{"head_dim", 1 << 30}}),
                 {.message = "key 'head_dim' times num_attention_heads is too large",
                  .expected = "at most " + std::to_string(kLargest),
                  .found = std::to_string(1 << 30)});
  for (const char* key : {"rms_norm_eps", "rope_theta"}) {
    for (const json& value : std::vector<json>{0, -1e-6}) {
      expect_refused(with(family("llama"), {{key, value}}),
                     {.message = std::string("key '") + key + "' is out of range",
                      .expected = "a positive number",
                      .found = value.dump()});
    }
  }
  expect_refused(with(family("llama"), {{"tie_word_embeddings", 1}}),
                 {.message = "key 'tie_word_embeddings' is not true or false",
                  .expected = "true or false",
                  .found = "1"});
  expect_refused(with(family("llama"), {{"eos_token_id", {1, -2}}}),
                 {.message = "key 'eos_token_id' holds something else than token ids",
                  .expected = "integers from 0 to " + std::to_string(kLargest),
                  .found = "a list of 2"});
}

TEST(ModelConfig, MisspeltKeysAreGuessed) {
  json config = without(family("llama"), "hidden_size");
  config["hiden_size"] = 64;
  expect_refused(config,
                 {.message = "key 'hidden_size' is missing", .hint = "did you mean its 'hiden_size'?"});
}

TEST(ModelConfig, Folder) {
  const TempFolder folder;
  const std::string path = folder / "config.json";
  const auto read = [&] { return error_of([&] { read_model_config(folder.path()); }); };
  expect_parts(read(), {.message = "file not found", .path = path});
  write_bytes(path, family("llama").dump().substr(0, 30));
  expect_parts(
      read(),
      {.message = "not valid JSON", .path = path, .hint = "the file may be damaged or only half downloaded"});
  write_bytes(path, family("llama").dump() + std::string("\0{", 2));
  expect_parts(read(), {.message = "not valid JSON: a zero byte", .path = path});
  write_bytes(path, family("llama").dump());
  EXPECT_EQ(read_model_config(folder.path()).eos_ids, (std::vector<std::int64_t>{2}));
  const std::string generation = folder / "generation_config.json";
  write_bytes(generation, R"({"eos_token_id":[7,8]})");
  EXPECT_EQ(read_model_config(folder.str() + "/").eos_ids, (std::vector<std::int64_t>{7, 8}));
  write_bytes(generation, R"({"eos_token_id":"7"})");
  expect_parts(read(), {.message = "key 'eos_token_id' is not an integer",
                        .path = generation,
                        .expected = "an integer from 0 to 2147483647",
                        .found = "\"7\""});
  std::filesystem::remove(generation);
  const TempFolder elsewhere;
  std::filesystem::rename(path, elsewhere / "x");
  std::filesystem::create_symlink(elsewhere / "x", path);
  const auto error = read();
  ASSERT_TRUE(error);
  EXPECT_EQ(error->message(), "a link leads out of the folder");
}

// Every tiny model of the test data is of a supported family; the sizes come from a plain look at its JSON.
TEST(ModelConfig, TestModels) {
  std::size_t models = 0;
  for (const auto& entry : std::filesystem::directory_iterator(FIREQ_TEST_DATA "/tiny")) {
    const std::string folder = entry.path().string();
    SCOPED_TRACE(folder);
    const json plain = json::parse(test::read_bytes(folder + "/config.json"));
    const ModelConfig config = read_model_config(folder);
    EXPECT_EQ(config.model_type, plain["model_type"].get<std::string>());
    EXPECT_EQ(config.hidden, plain["hidden_size"].get<std::uint64_t>());
    EXPECT_EQ(config.layers, plain["num_hidden_layers"].get<std::uint64_t>());
    EXPECT_EQ(config.heads, plain["num_attention_heads"].get<std::uint64_t>());
    EXPECT_EQ(config.kv_heads, plain["num_key_value_heads"].get<std::uint64_t>());
    EXPECT_EQ(config.tied_embeddings, plain.value("tie_word_embeddings", false));
    ++models;
  }
  EXPECT_GE(models, 16U);
}

}  // namespace
}  // namespace fireq::formats
