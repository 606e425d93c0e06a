// quantization_config, and the names, dtypes and shapes of a FireQ folder's tensors.
#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "formats/checkpoint.hpp"
#include "formats/fireq_folder.hpp"
#include "tests/formats/support.hpp"

namespace fireq::formats {
namespace {

using nlohmann::json;
using test::error_of;
using test::expect_parts;
using test::Parts;
using test::RawTensor;
using test::TempFolder;

// Written from docs/checkpoint-format.md, not by the code under test.
json quantization() {
  return {{"quant_method", "fireq"},
          {"format_version", 1},
          {"levels", "int4"},
          {"group_size", 128},
          {"row_scale", "row"},
          {"layout", "row"},
          {"kv_cache", {{"bits", 4}, {"scale", "e4m3"}, {"granularity", "token_head"}}},
          {"activations", {{"dtype", "e4m3"}, {"granularity", "token"}, {"dynamic", true}}},
          {"ignore", {"lm_head"}},
          {"recipe", {{"preset", "rtn"}, {"x", {1, 2}}}},
          {"source", {{"fingerprint", "abc"}}},
          {"calibration", {{"fingerprint", "def"}, {"tokens", 100}, {"seed", 18446744073709551615ULL}}},
          {"tool_version", "0.1.0"}};
}
QuantizationConfig parse(const json& q) {
  return parse_quantization_config(json{{"quantization_config", q}}.dump(), "m/config.json");
}

TEST(QuantizationConfig, ReadsEveryField) {
  const QuantizationConfig q = parse(quantization());
  EXPECT_EQ(q.group_size, 128U);
  EXPECT_TRUE(q.levels_int4);
  EXPECT_EQ(q.levels, (std::array<float, 8>{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_TRUE(q.row_scale_per_row);
  EXPECT_EQ(q.layout, WeightLayout::row);
  EXPECT_TRUE(q.kv_cache);
  EXPECT_EQ(q.ignore, (std::vector<std::string>{"lm_head"}));
  EXPECT_EQ(json::parse(q.recipe_json), (json{{"preset", "rtn"}, {"x", {1, 2}}}));
  EXPECT_EQ(q.source_fingerprint, "abc");
  EXPECT_EQ(q.calibration_fingerprint, "def");
  EXPECT_EQ(q.calibration_tokens, 100U);
  EXPECT_EQ(q.calibration_seed, std::numeric_limits<std::uint64_t>::max());
  EXPECT_EQ(q.tool_version, "0.1.0");

  json other = quantization();
  other["row_scale"] = "tensor";
  other["layout"] = "sm90";
  other["kv_cache"] = nullptr;
  other["calibration"] = nullptr;
  other["ignore"] = json::array();
  other["levels"] = {0, 0.5, 1, 1.5, 2, 3, 4, 448};
  const QuantizationConfig o = parse(other);
  EXPECT_FALSE(o.row_scale_per_row || o.kv_cache || o.levels_int4);
  EXPECT_EQ(o.layout, WeightLayout::sm90);
  EXPECT_EQ(o.calibration_fingerprint, "");
  EXPECT_EQ(o.levels, (std::array<float, 8>{0, 0.5, 1, 1.5, 2, 3, 4, 448}));
  other["levels"] = {0, 1, 2, 3, 4, 5, 6, 7};
  EXPECT_TRUE(parse(other).levels_int4);
}

TEST(QuantizationConfig, KeepsWhatTheFolderWasMeasuredToCost) {
  json with = quantization();
  EXPECT_FALSE(parse(with).measured);
  with["measured"] = {{"tokens", 1020}, {"nll", 2.4},    {"delta_nll", -0.01}, {"delta_nll_stderr", 0.002},
                      {"kl", 0.04},     {"kl_stderr", 1}};
  const QuantizationConfig q = parse(with);
  ASSERT_TRUE(q.measured);
  EXPECT_EQ(q.measured->tokens, 1020U);
  EXPECT_EQ(q.measured->delta_nll, -0.01);
  EXPECT_EQ(q.measured->kl_stderr, 1);
  EXPECT_EQ(json::parse(make_config_json("{}", q))["quantization_config"], with);
  for (const auto& [key, value] : {std::pair<const char*, json>{"tokens", 0},
                                   {"tokens", 2.5},
                                   {"kl", "0.04"},
                                   {"nll", nullptr},
                                   {"top1", 1}}) {
    json bad = with;
    bad["measured"][key] = value;
    const std::optional<Error> error = error_of([&] { parse(bad); });
    ASSERT_TRUE(error) << key;
    EXPECT_EQ(error->kind(), ErrorKind::input);
    EXPECT_NE(error->message().find(std::string("'quantization_config.measured.") + key + "'"),
              std::string::npos)
        << error->what();
  }
}

TEST(QuantizationConfig, WrittenIsWhatIsRead) {
  QuantizationConfig q = parse(quantization());
  q.levels = {0, 0.1F, 1, 2, 3, 4, 5, 6};
  q.levels_int4 = false;
  const std::string source = R"({"hidden_size":64,"quantization_config":{"quant_method":"fireq","old":1}})";
  const std::string text = make_config_json(source, q);
  const json root = json::parse(text);
  EXPECT_EQ(root["hidden_size"], 64);
  json wanted = quantization();
  wanted["levels"] = root["quantization_config"]["levels"];
  EXPECT_EQ(root["quantization_config"], wanted);  // the keys of the page, and no other
  const QuantizationConfig again = parse_quantization_config(text, "x");
  EXPECT_EQ(again.levels, q.levels);  // floats survive exactly
  EXPECT_EQ(make_config_json(source, again), text);
  EXPECT_EQ(make_config_json(text, again), text);
  expect_parts(error_of([&] { make_config_json("[]", q); }), {.message = "the file is not a JSON object",
                                                              .path = "config.json of the source",
                                                              .expected = "an object",
                                                              .found = "a list of 0"});
}

TEST(QuantizationConfig, RefusesByName) {
  struct Row {
    std::function<void(json&)> change;
    Parts parts;
  };
  const std::string newer = "the folder was made by a newer version of this program";
  const std::string magnitudes = "\"int4\" or 8 magnitudes";
  const std::vector<Row> rows{
      {[](json& q) { q["format_version"] = 2; },
       {.message = "key 'quantization_config.format_version' is unknown",
        .expected = "1",
        .found = "2",
        .hint = "the folder was made by another version of this program"}},
      {[](json& q) { q["format_version"] = "1"; },
       {.message = "key 'quantization_config.format_version' is not an integer",
        .expected = "an integer...",
        .found = "\"1\""}},
      {[](json& q) { q["layout"] = "sm100"; },
       {.message = "key 'quantization_config.layout' is unknown",
        .expected = "\"row\" or \"sm90\"",
        .found = "\"sm100\""}},
      {[](json& q) { q["levels"] = "nf4"; },
       {.message = "key 'quantization_config.levels' names unknown levels",
        .expected = magnitudes,
        .found = "\"nf4\""}},
      {[](json& q) { q["levels"] = {0, 1, 2, 3, 4, 5, 6}; },
       {.message = "key 'quantization_config.levels' is malformed",
        .expected = magnitudes,
        .found = "a list of 7"}},
      {[](json& q) { q["levels"] = {0, 1, 2, 3, 4, 5, 6, "7"}; },
       {.message = "key 'quantization_config.levels' is malformed",
        .expected = magnitudes,
        .found = "a list of 8"}},
      {[](json& q) { q["levels"] = {0, 1, 2, 3, 4, 5, 6, 448.5}; },
       {.message = "key 'quantization_config.levels' holds a magnitude out of range",
        .expected = "0 to 448",
        .found = "a list of 8"}},
      {[](json& q) { q["levels"] = {-1, 1, 2, 3, 4, 5, 6, 7}; },
       {.message = "key 'quantization_config.levels' holds a magnitude out of range",
        .expected = "0 to 448",
        .found = "a list of 8"}},
      {[](json& q) { q["levels"] = {0, 1, 1, 3, 4, 5, 6, 7}; },
       {.message = "key 'quantization_config.levels' holds magnitudes that do not increase",
        .expected = "strictly increasing magnitudes",
        .found = "a list of 8"}},
      {[](json& q) { q["levels"] = {0, 1, 1.00000000001, 3, 4, 5, 6, 7}; },  // one number in FP32
       {.message = "key 'quantization_config.levels' holds magnitudes that do not increase",
        .expected = "strictly increasing magnitudes",
        .found = "a list of 8"}},
      {[](json& q) { q["group_size"] = 64; },
       {.message = "key 'quantization_config.group_size' has an unknown value",
        .expected = "128",
        .found = "64"}},
      {[](json& q) { q["row_scale"] = "block"; },
       {.message = "key 'quantization_config.row_scale' has an unknown value",
        .expected = "\"row\" or \"tensor\"",
        .found = "\"block\""}},
      {[](json& q) { q["kv_cache"]["bits"] = 8; },
       {.message = "key 'quantization_config.kv_cache.bits' has an unknown value",
        .expected = "4",
        .found = "8"}},
      {[](json& q) { q["kv_cache"]["sink_tokens"] = 4; },
       {.message = "key 'quantization_config.kv_cache.sink_tokens' is unknown", .found = "4", .hint = newer}},
      {[](json& q) { q["activations"]["dtype"] = "e5m2"; },
       {.message = "key 'quantization_config.activations.dtype' has an unknown value",
        .expected = "'e4m3'",
        .found = "\"e5m2\""}},
      {[](json& q) { q["activations"]["dynamic"] = false; },
       {.message = "key 'quantization_config.activations.dynamic' has an unknown value",
        .expected = "true",
        .found = "false"}},
      {[](json& q) { q["future"] = true; },
       {.message = "key 'quantization_config.future' is unknown", .found = "true", .hint = newer}},
      {[](json& q) { q["ignore"] = {1}; },
       {.message = "key 'quantization_config.ignore' holds something else than module names",
        .found = "a list of 1"}},
      {[](json& q) { q["fp8"] = "lm_head"; },
       {.message = "key 'quantization_config.fp8' is not a list",
        .expected = "a list",
        .found = "\"lm_head\""}},
      {[](json& q) {
         q["fp8"] = {"model.embed_tokens", "lm_head"};
       },
       {.message = "key 'quantization_config.fp8' names a module that ignore names too",
        .expected = "each module once, not lm_head",
        .found = "a list of 2"}},
      {[](json& q) { q["recipe"] = "rtn"; },
       {.message = "key 'quantization_config.recipe' is not a JSON object",
        .expected = "an object",
        .found = "\"rtn\""}},
      {[](json& q) { q["calibration"]["seed"] = -1; },
       {.message = "key 'quantization_config.calibration.seed' is no number",
        .expected = "0 or more",
        .found = "-1"}},
      {[](json& q) { q.erase("tool_version"); },
       {.message = "key 'quantization_config.tool_version' is missing"}},
      {[](json& q) { q.erase("levels"); }, {.message = "key 'quantization_config.levels' is missing"}},
      {[](json& q) { q["quant_method"] = "awq"; },
       {.message = "key 'quantization_config.quant_method' has an unknown value",
        .expected = "'fireq'",
        .found = "\"awq\""}},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.parts.message);
    json q = quantization();
    row.change(q);
    Parts parts = row.parts;
    parts.path = "m/config.json";
    expect_parts(error_of([&] { parse(q); }), parts);
  }
  expect_parts(error_of([] { parse_quantization_config("{}", "p"); }),
               {.message = "key 'quantization_config' is missing", .path = "p"});
  expect_parts(error_of([] { parse_quantization_config(std::string("{}\0", 3), "p"); }),
               {.message = "not valid JSON: a zero byte", .path = "p"});
}

TEST(QuantizationConfig, WhichFoldersAreFireqs) {
  const TempFolder folder;
  EXPECT_FALSE(is_fireq_folder(folder.path()));
  const auto with = [&](const std::string& text) {
    test::write_bytes(folder / "config.json", text);
    return is_fireq_folder(folder.path());
  };
  EXPECT_FALSE(with("{}"));
  EXPECT_FALSE(with(R"({"quantization_config":{"quant_method":"gptq"}})"));
  EXPECT_TRUE(with(R"({"quantization_config":{"quant_method":"fireq","format_version":99}})"));
  EXPECT_EQ(error_of([&] { with("{"); })->path(), folder / "config.json");
  with(json{{"quantization_config", quantization()}}.dump());
  EXPECT_EQ(read_quantization_config(folder.path()).tool_version, "0.1.0");
}

// A folder of one layer, its tensors listed by hand: hidden 64, 2 heads and 1 KV head of 32, FFN 200 (no
// multiple of 128), 10 words.
class FireqTensors : public ::testing::Test {
 protected:
  FireqTensors() {
    model.model_type = "llama";
    model.hidden = 64;
    model.ffn = 200;
    model.layers = 1;
    model.heads = 2;
    model.kv_heads = 1;
    model.head_dim = 32;
    model.vocab = 10;
    plain("model.embed_tokens.weight", "BF16", "[10,64]", 1280);
    plain("model.norm.weight", "F32", "[64]", 256);
    plain("lm_head.weight", "F16", "[10,64]", 1280);
    plain(layer + "input_layernorm.weight", "F32", "[64]", 256);
    plain(layer + "post_attention_layernorm.weight", "BF16", "[64]", 128);
    linear("self_attn.q_proj", 64, 64, 1);
    linear("self_attn.k_proj", 32, 64, 1);
    linear("self_attn.v_proj", 32, 64, 1);
    linear("self_attn.o_proj", 64, 64, 1);
    linear("mlp.gate_proj", 200, 64, 1);
    linear("mlp.up_proj", 200, 64, 1);
    linear("mlp.down_proj", 64, 200, 2);
  }

  void plain(const std::string& name, const char* dtype, const std::string& shape, std::size_t bytes) {
    tensors[name] = {name, dtype, shape, std::string(bytes, '\1')};
  }
  void linear(const std::string& name, std::uint64_t n, std::uint64_t k, std::uint64_t groups) {
    const std::string p = layer + name + ".", rows = std::to_string(n);
    plain(p + "weight_codes", "U8", "[" + rows + "," + std::to_string(groups * 64) + "]", n * groups * 64);
    plain(p + "weight_group_scale", "F8_E4M3", "[" + rows + "," + std::to_string(groups) + "]", n * groups);
    plain(p + "weight_row_scale", "F32", "[" + rows + "]", 4 * n);
    plain(p + "weight_shape", "I64", "[2]", 16);
    tensors[p + "weight_shape"].data = test::length_word(n) + test::length_word(k);
  }
  static std::string floats(std::vector<float> values) {
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
  }
  // One head's rounding factor of 32 channels, in BF16: `weight` leads each row, `rest` follows.
  static std::string triangle(float weight, float rest) {
    std::string bytes;
    for (int left = 32; left > 0; --left) {
      for (int i = 0; i < left; ++i) {
        const auto bits = std::bit_cast<std::uint32_t>(i == 0 ? weight : rest);
        bytes += {static_cast<char>(bits >> 16U & 0xffU), static_cast<char>(bits >> 24U)};
      }
    }
    return bytes;
  }
  std::optional<Error> check() const {
    std::vector<RawTensor> list;
    for (const auto& entry : tensors) list.push_back(entry.second);
    test::write_bytes(path, test::safetensors_of(list));
    return error_of([&] { check_fireq_tensors(CheckpointReader(folder.path()), model, quantization); });
  }
  void expect_refused(Parts parts) const {
    if (parts.path.empty()) parts.path = path;
    expect_parts(check(), parts);
  }

  const TempFolder folder;
  const std::string path = folder / "model.safetensors", layer = "model.layers.0.";
  const std::string down = layer + "mlp.down_proj.";
  std::map<std::string, RawTensor> tensors;
  ModelConfig model;
  QuantizationConfig quantization;
};

TEST_F(FireqTensors, AcceptsWhatThePageSays) {
  ASSERT_FALSE(check());
  model.tied_embeddings = true;  // lm_head may be there or not
  EXPECT_FALSE(check());
  tensors.erase("lm_head.weight");
  EXPECT_FALSE(check());
  plain(layer + "self_attn.k_post_rope_scale", "F32", "[1,32]", 128);
  tensors[layer + "self_attn.k_post_rope_scale"].data = floats(std::vector<float>(32, 0.5F));
  plain(layer + "self_attn.k_post_rope_shift", "F32", "[1,32]", 128);
  tensors[layer + "self_attn.k_post_rope_shift"].data = floats(std::vector<float>(32, -0.5F));
  for (const char* name : {"self_attn.k_rounding", "self_attn.v_rounding"}) {
    plain(layer + name, "BF16", "[1,528]", 1056);
    tensors[layer + name].data = triangle(1, -1);
  }
  plain(down + "weight_levels", "F32", "[8]", 32);
  tensors[down + "weight_levels"].data = floats({0, 1, 2, 3, 4, 5, 6, 448});
  EXPECT_FALSE(check());
  // A linear that is left alone.
  for (const char* part :
       {"weight_codes", "weight_group_scale", "weight_row_scale", "weight_shape", "weight_levels"}) {
    tensors.erase(down + part);
  }
  plain(down + "weight", "BF16", "[64,200]", 25600);
  quantization.ignore = {layer + "mlp.down_proj", "lm_head", "model.embed_tokens"};
  EXPECT_FALSE(check());
  model.qkv_bias = model.qk_norm = true;
  plain(layer + "self_attn.q_proj.bias", "F32", "[64]", 256);
  plain(layer + "self_attn.k_proj.bias", "BF16", "[32]", 64);
  plain(layer + "self_attn.v_proj.bias", "F16", "[32]", 64);
  plain(layer + "self_attn.q_norm.weight", "F32", "[32]", 128);
  plain(layer + "self_attn.k_norm.weight", "F32", "[32]", 128);
  EXPECT_FALSE(check());
}

TEST_F(FireqTensors, ModulesInFp8) {
  for (const char* part :
       {"weight_codes", "weight_group_scale", "weight_row_scale", "weight_shape", "weight_levels"}) {
    tensors.erase(down + part);
  }
  const std::string module = layer + "mlp.down_proj";
  plain(down + "weight", "F8_E4M3", "[64,200]", 12800);
  plain(down + "weight_scale", "F32", "[64]", 256);
  quantization.fp8 = {module};
  EXPECT_FALSE(check());
  EXPECT_EQ(module_precision(quantization, module), ModulePrecision::fp8);
  EXPECT_EQ(module_precision(quantization, layer + "mlp.up_proj"), ModulePrecision::int4);
  EXPECT_EQ(module_precision(quantization, "lm_head"), ModulePrecision::original);
  plain(down + "weight", "BF16", "[64,200]", 25600);
  expect_refused(
      {.message = "wrong dtype", .tensor = down + "weight", .expected = "F8_E4M3", .found = "BF16"});
  plain(down + "weight", "F8_E4M3", "[64,200]", 12800);
  plain(down + "weight_scale", "F32", "[1]", 4);
  expect_refused(
      {.message = "wrong shape", .tensor = down + "weight_scale", .expected = "[64]", .found = "[1]"});
  tensors.erase(down + "weight_scale");
  expect_refused({.message = "the tensor is missing",
                  .path = folder.path(),
                  .tensor = down + "weight_scale",
                  .expected = "F32 [64]"});
  // A scale that nothing speaks of is no tensor of this folder.
  plain(down + "weight_scale", "F32", "[64]", 256);
  plain("model.embed_tokens.weight_scale", "F32", "[64]", 256);
  expect_refused({.message = "a FireQ folder of this config.json has no such tensor",
                  .tensor = "model.embed_tokens.weight_scale"});
  quantization.fp8 = {module, "model.layers.1.mlp.down_proj"};
  expect_refused({.message = "quantization_config.fp8 names a module that the model does not have",
                  .path = folder / "config.json",
                  .found = "model.layers.1.mlp.down_proj"});
}

TEST_F(FireqTensors, Sm90LayoutAndTensorScales) {
  quantization.layout = WeightLayout::sm90;
  quantization.row_scale_per_row = false;
  const std::vector<std::pair<const char*, std::array<std::uint64_t, 2>>> tiles{
      {"self_attn.q_proj", {1, 1}}, {"self_attn.k_proj", {1, 1}}, {"self_attn.v_proj", {1, 1}},
      {"self_attn.o_proj", {1, 1}}, {"mlp.gate_proj", {2, 1}},    {"mlp.up_proj", {2, 1}},
      {"mlp.down_proj", {1, 2}}};
  for (const auto& [name, count] : tiles) {
    const std::string p = layer + name + ".";
    tensors.erase(p + "weight_codes");
    tensors.erase(p + "weight_group_scale");
    plain(p + "weight_row_scale", "F32", "[1]", 4);
    plain(p + "weight_tiles", "U8",
          "[" + std::to_string(count[0]) + "," + std::to_string(count[1]) + ",8320]",
          count[0] * count[1] * 8320);
  }
  EXPECT_FALSE(check());
  plain(down + "weight_tiles", "U8", "[2,1,8320]", 2 * 8320);
  expect_refused({.message = "wrong shape",
                  .tensor = down + "weight_tiles",
                  .expected = "[1, 2, 8320]",
                  .found = "[2, 1, 8320]"});
}

TEST_F(FireqTensors, EveryTensorIsNeededAndNoOther) {
  const auto all = tensors;
  for (const auto& [name, tensor] : all) {
    SCOPED_TRACE(name);
    tensors = all;
    tensors.erase(name);
    const auto error = check();
    ASSERT_TRUE(error);
    EXPECT_EQ(error->message(), "the tensor is missing");
    EXPECT_EQ(error->tensor(), name);
    EXPECT_EQ(error->path(), folder.path());
    EXPECT_FALSE(error->expected().empty());
    tensors = all;
    tensors[name].dtype = "I8";  // of the wrong type, with as many bytes
    tensors[name].shape = "[" + std::to_string(tensor.data.size()) + "]";
    const auto dtype = check();
    ASSERT_TRUE(dtype);
    EXPECT_EQ(dtype->message(), "wrong dtype");
    EXPECT_EQ(dtype->tensor(), name);
    EXPECT_EQ(dtype->path(), path);
    EXPECT_EQ(dtype->found(), "I8");
  }
  tensors = all;
  for (const std::string& name :
       {layer + "mlp.down_proj.weight", std::string("model.layers.1.input_layernorm.weight"),
        layer + "self_attn.q_norm.weight", std::string("extra")}) {
    tensors = all;
    plain(name, "F32", "[1]", 4);
    expect_refused({.message = "a FireQ folder of this config.json has no such tensor", .tensor = name});
  }
}

TEST_F(FireqTensors, SmallContents) {
  const auto all = tensors;
  tensors[down + "weight_shape"].data = test::length_word(64) + test::length_word(201);
  expect_refused({.message = "the shape it states is not the one of config.json",
                  .tensor = down + "weight_shape",
                  .expected = "[64, 200]",
                  .found = "[64, 201]"});
  tensors[down + "weight_shape"].data = test::length_word(~std::uint64_t{0}) + test::length_word(200);
  expect_refused({.message = "the shape it states is not the one of config.json",
                  .tensor = down + "weight_shape",
                  .expected = "[64, 200]",
                  .found = "[-1, 200]"});
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const auto& [levels, found] : std::vector<std::pair<std::vector<float>, std::string>>{
           {{-1, 1, 2, 3, 4, 5, 6, 7}, "-1.000000 at [0]"},
           {{0, 1, 2, 2, 4, 5, 6, 7}, "2.000000 at [3]"},
           {{0, 1, 2, 3, 4, 5, 6, 449}, "449.000000 at [7]"},
           {{0, 1, 2, 3, nan, 5, 6, 7}, "nan at [4]"}}) {
    tensors = all;
    plain(down + "weight_levels", "F32", "[8]", 32);
    tensors[down + "weight_levels"].data = floats(levels);
    expect_refused({.message = "bad magnitudes",
                    .tensor = down + "weight_levels",
                    .expected = "strictly increasing values from 0 to 448",
                    .found = found});
  }
  for (const auto& [bad, text] :
       std::vector<std::pair<float, std::string>>{{0.0F, "0.000000"},
                                                  {-1.0F, "-1.000000"},
                                                  {nan, "nan"},
                                                  {std::numeric_limits<float>::infinity(), "inf"}}) {
    tensors = all;
    const std::string name = layer + "self_attn.k_post_rope_scale";
    plain(name, "F32", "[1,32]", 128);
    std::vector<float> scales(32, 1);
    scales[31] = bad;
    tensors[name].data = floats(scales);
    expect_refused({.message = "bad scale",
                    .tensor = name,
                    .expected = "finite values above 0",
                    .found = text + " at element 31"});
  }
  for (const float bad : {nan, -std::numeric_limits<float>::infinity()}) {
    tensors = all;
    const std::string name = layer + "self_attn.k_post_rope_shift";
    plain(name, "F32", "[1,32]", 128);
    std::vector<float> shifts(32, -1);
    shifts[7] = bad;
    tensors[name].data = floats(shifts);
    expect_refused({.message = "bad shift",
                    .tensor = name,
                    .expected = "finite values",
                    .found = std::string(std::isnan(bad) ? "nan" : "-inf") + " at element 7"});
  }
  const auto expect_bad_rounding = [&](float weight, float rest, const char* expected, std::string found) {
    tensors = all;
    const std::string name = layer + "self_attn.v_rounding";
    plain(name, "BF16", "[1,528]", 1056);
    tensors[name].data = triangle(weight, rest);
    expect_refused(
        {.message = "bad rounding factor", .tensor = name, .expected = expected, .found = std::move(found)});
  };
  expect_bad_rounding(0, 1, "a finite weight above 0", std::to_string(0.0F) + " at element 0");
  expect_bad_rounding(nan, 1, "a finite weight above 0", "nan at element 0");
  expect_bad_rounding(1, nan, "finite values", "nan at element 1");
  tensors = all;
  plain(layer + "self_attn.k_rounding", "F32", "[1,528]", 2112);
  expect_refused({.message = "wrong dtype",
                  .tensor = layer + "self_attn.k_rounding",
                  .expected = "BF16",
                  .found = "F32"});
  tensors = all;
  quantization.ignore = {"model.layers.1.mlp.down_proj"};
  expect_refused({.message = "quantization_config.ignore names a module that the model does not have",
                  .path = folder / "config.json",
                  .found = "model.layers.1.mlp.down_proj"});
}

TEST(FireqTensorNames, LinearsOfALayer) {
  const auto names = linear_names(12);
  EXPECT_EQ(names[0], "model.layers.12.self_attn.q_proj");
  EXPECT_EQ(names[6], "model.layers.12.mlp.down_proj");
  EXPECT_EQ(error_of([] { linear_shape(ModelConfig{}, 7); })->kind(), ErrorKind::internal);
  ModelConfig model;
  model.o_bias = true;
  EXPECT_TRUE(linear_has_bias(model, 3));
  EXPECT_FALSE(linear_has_bias(model, 2) || linear_has_bias(model, 4));
}

}  // namespace
}  // namespace fireq::formats
