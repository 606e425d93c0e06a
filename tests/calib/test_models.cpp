// Whole models against Hugging Face transformers: the golden files, and a tiny random model of every family
// and feature.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <set>

#include "tests/calib/golden.hpp"

namespace fireq::calib {
namespace {

namespace fs = std::filesystem;

class GoldenModel : public testing::TestWithParam<const char*> {};

TEST_P(GoldenModel, LogitsOfTheFirstTokens) {
  const nlohmann::json golden = test::golden_of(GetParam());
  const fs::path folder = test::data_folder() / "models" / golden.at("model").get<std::string>();
  test::expect_golden_logits(golden, folder.string(), 2);
}

INSTANTIATE_TEST_SUITE_P(Stories, GoldenModel,
                         testing::Values("stories15M_tinystories", "stories15M_grimm",
                                         "stories260K_tinystories", "stories260K-bf16_tinystories"),
                         [](const auto& instance) {
                           std::string name = instance.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(GoldenPerplexity, Stories260K) {
  test::expect_golden_perplexity(test::golden_of("stories260K_tinystories"),
                                 (test::data_folder() / "models/stories260K").string(), 2);
}

TEST(GoldenPerplexity, Stories260KInBf16) {
  test::expect_golden_perplexity(test::golden_of("stories260K-bf16_tinystories"),
                                 (test::data_folder() / "models/stories260K-bf16").string(), 2);
}

// Every golden model is tested here or in test_golden_large.cpp.
TEST(Golden, NoEntryIsLeftOut) {
  std::ifstream file(test::data_folder() / "golden/golden.json");
  std::vector<std::string> names;
  for (const nlohmann::json& entry : nlohmann::json::parse(file)) names.push_back(entry.at("name"));
  EXPECT_THAT(names, testing::UnorderedElementsAre("stories15M_tinystories", "stories15M_grimm",
                                                   "stories260K_tinystories", "stories260K-bf16_tinystories",
                                                   "smollm2_wiki"));
}

std::vector<std::string> tiny_models() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(test::data_folder() / "tiny")) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

struct Tiny {
  explicit Tiny(const std::string& name)
      : folder(test::data_folder() / "tiny" / name),
        ids(test::read_array<std::int32_t>(folder / "ids.u32")),
        logits(test::read_array<float>(folder / "logits.f32")),
        expected(nlohmann::json::parse(std::ifstream(folder / "tiny.json"))),
        model(open_weights(folder.string())) {}
  fs::path folder;
  std::vector<std::int32_t> ids;
  std::vector<float> logits;
  nlohmann::json expected;
  std::unique_ptr<WeightSource> model;
};

class TinyModel : public testing::TestWithParam<std::string> {};

TEST_P(TinyModel, LogitsAndPerplexityAreTransformers) {
  const Tiny tiny(GetParam());
  ASSERT_GE(tiny.ids.size(), 130U);  // more than one block of keys
  ASSERT_EQ(tiny.logits.size(), tiny.ids.size() * tiny.model->config().vocab);
  for (const int threads : {1, 3}) {
    const std::vector<float> logits = window_logits(*tiny.model, tiny.ids, {}, threads);
    ASSERT_EQ(logits.size(), tiny.logits.size());
    const double difference = test::largest_difference(tiny.logits, logits);
    std::cout << "logits differ by at most " << difference << "\n";
    EXPECT_LE(difference, test::kLogitBound);
  }
  Progress silent;
  EvaluationOptions options;
  options.threads = 2;
  const EvaluationResult result = evaluate(*tiny.model, {tiny.ids, 1, tiny.ids.size()}, options, silent);
  const double ppl = tiny.expected.at("ppl").get<double>();
  EXPECT_LE(std::fabs(result.ppl - ppl), test::kPerplexityBound * ppl);
}

INSTANTIATE_TEST_SUITE_P(All, TinyModel, testing::ValuesIn(tiny_models()), [](const auto& instance) {
  std::string name = instance.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

// The tiny models cover what the documentation promises.
TEST(TinyModels, CoverEveryFamilyAndFeature) {
  std::set<std::string> seen;
  for (const std::string& name : tiny_models()) {
    const Tiny tiny(name);
    const formats::ModelConfig& c = tiny.model->config();
    seen.insert(c.model_type);
    if (c.qkv_bias && !c.o_bias) seen.insert("qkv bias");
    if (c.o_bias && c.mlp_bias) seen.insert("bias everywhere");
    if (c.qk_norm) seen.insert("qk norm");
    if (c.rope.kind == formats::RopeKind::linear) seen.insert("linear rope");
    if (c.rope.kind == formats::RopeKind::llama3 && tiny.ids.size() > c.rope.original_context)
      seen.insert("llama3 rope past the original context");
    const auto& windows = c.sliding_window;
    if (std::all_of(windows.begin(), windows.end(), [](auto w) { return w > 0; })) seen.insert("window");
    if (windows.front() != windows.back()) seen.insert("window in some layers");
    if (c.head_dim * c.heads != c.hidden) seen.insert("head_dim of its own");
    seen.insert(c.kv_heads == c.heads ? "mha" : c.kv_heads == 1 ? "mqa" : "gqa");
    seen.insert(c.tied_embeddings ? "tied" : "untied");
    seen.insert(c.torch_dtype);
    if (tiny.model->reader().contains("model.layers.0.self_attn.qkv_proj.weight")) seen.insert("fused");
  }
  for (const char* feature : {"llama",
                              "mistral",
                              "qwen2",
                              "qwen3",
                              "qkv bias",
                              "bias everywhere",
                              "qk norm",
                              "linear rope",
                              "llama3 rope past the original context",
                              "window",
                              "window in some layers",
                              "head_dim of its own",
                              "mha",
                              "mqa",
                              "gqa",
                              "tied",
                              "untied",
                              "float32",
                              "float16",
                              "bfloat16",
                              "fused"}) {
    EXPECT_TRUE(seen.contains(feature)) << feature;
  }
}

// A model read wrongly on purpose: what a forgotten feature would compute.
class Altered final : public ForwardingWeights {
 public:
  using Change = std::function<void(formats::ModelConfig&)>;
  using ChangeLayer = std::function<void(LayerWeights&)>;
  Altered(const WeightSource& original, const Change& change, ChangeLayer change_layer)
      : ForwardingWeights(original), config_(original.config()), change_layer_(std::move(change_layer)) {
    if (change) change(config_);
  }
  const formats::ModelConfig& config() const noexcept override { return config_; }
  LayerWeights load_layer(std::uint64_t layer, int threads) const override {
    LayerWeights weights = inner().load_layer(layer, threads);
    if (change_layer_) change_layer_(weights);
    return weights;
  }

 private:
  formats::ModelConfig config_;
  ChangeLayer change_layer_;
};

// The bound on logits notices every feature that is forgotten, at the tokens where it matters.
TEST(TinyModels, AForgottenFeatureIsFarOutsideTheBound) {
  const auto without_bias = [](LayerWeights& w) {
    for (LinearWeights& linear : w.linear) linear.bias.clear();
  };
  const auto without_qk_norm = [](LayerWeights& w) {
    w.q_norm.clear();
    w.k_norm.clear();
  };
  const auto full_attention = [](formats::ModelConfig& c) {
    std::fill(c.sliding_window.begin(), c.sliding_window.end(), 0);
  };
  const auto one_key_more = [](formats::ModelConfig& c) {
    for (auto& window : c.sliding_window) window += window > 0 ? 1 : 0;
  };
  const auto standard_rope = [](formats::ModelConfig& c) { c.rope.kind = formats::RopeKind::standard; };
  const auto other_eps = [](formats::ModelConfig& c) { c.rms_eps = 1e-2; };
  const struct {
    const char* model;
    Altered::Change config;
    Altered::ChangeLayer layer;
  } cases[] = {{"llama-bias-bf16", {}, without_bias},         {"qwen2-tied-bf16", {}, without_bias},
               {"qwen3-bf16", {}, without_qk_norm},           {"mistral-window-bf16", full_attention, {}},
               {"mistral-window-bf16", one_key_more, {}},     {"qwen2-window-f16", full_attention, {}},
               {"llama-rope-llama3-bf16", standard_rope, {}}, {"llama-rope-linear-f16", standard_rope, {}},
               {"llama-gqa-untied-f16", other_eps, {}}};
  for (const auto& c : cases) {
    const Tiny tiny(c.model);
    const Altered wrong(*tiny.model, c.config, c.layer);
    EXPECT_GT(test::largest_difference(tiny.logits, window_logits(wrong, tiny.ids, {}, 2)),
              10 * test::kLogitBound)
        << c.model;
  }
}

}  // namespace
}  // namespace fireq::calib
