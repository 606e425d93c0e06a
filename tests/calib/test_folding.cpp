// Folding never changes the function: the model before and after, unquantised, agree to rounding.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "calib/evaluate.hpp"
#include "calib/folding.hpp"
#include "common/error.hpp"
#include "tests/calib/random_model.hpp"

namespace fireq::calib {
namespace {

using test::TempFolder;
using testing_support::RandomModel;

std::vector<std::int32_t> random_ids(std::uint64_t n, std::uint64_t vocab, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::int32_t> ids(n);
  for (auto& id : ids) id = static_cast<std::int32_t>(random() % vocab);
  return ids;
}

// An original model whose layers come folded; keeps the report of each.
class Folded final : public ForwardingWeights {
 public:
  Folded(const WeightSource& original, const Recipe& recipe, const formats::CalibrationStatistics& statistics)
      : ForwardingWeights(original), recipe_(recipe), statistics_(statistics) {}
  LayerWeights load_layer(std::uint64_t layer, int threads) const override {
    LayerWeights w = inner().load_layer(layer, threads);
    fold_layer(config(), recipe_, &statistics_.layers.at(layer), w);
    return w;
  }

 private:
  const Recipe& recipe_;
  const formats::CalibrationStatistics& statistics_;
};

struct Case {
  const char* name;
  RandomModel model;
};

class FoldingPreserves : public testing::TestWithParam<Case> {};

TEST_P(FoldingPreserves, TheFunctionOfEveryFold) {
  const TempFolder folder;
  write_random_model(folder.path(), GetParam().model);
  const auto source = open_weights(folder.path().string());
  const auto ids = random_ids(40, GetParam().model.vocab, 7);
  Progress silent;
  const Windows windows{random_ids(4 * 32, GetParam().model.vocab, 8), 4, 32};
  formats::CalibrationStatistics statistics = calibrate(*source, windows, 2, silent);
  for (formats::LayerStatistics& layer : statistics.layers) {
    ASSERT_EQ(layer.k_centre_gain.size(), source->config().kv_heads);
    std::fill(layer.k_centre_gain.begin(), layer.k_centre_gain.end(), 1.0);  // every head is centred
  }
  const std::vector<float> before = window_logits(*source, ids, {}, 2);
  double largest = 0;
  for (const float x : before) largest = std::max(largest, static_cast<double>(std::fabs(x)));

  std::vector<std::pair<const char*, Recipe>> recipes;
  const Recipe none = preset_recipe("rtn");
  const auto add = [&](const char* name, auto edit) {
    Recipe r = none;
    edit(r);
    recipes.emplace_back(name, r);
  };
  add("lambda1 channel", [](Recipe& r) { r.lambda1 = ValueScaling::channel; });
  add("lambda1 scalar", [](Recipe& r) { r.lambda1 = ValueScaling::scalar; });
  add("lambda2", [](Recipe& r) { r.lambda2 = true; });
  add("lambda3", [](Recipe& r) { r.lambda3 = true; });
  add("n", [](Recipe& r) { r.key_n = true; });
  add("s", [](Recipe& r) { r.key_s = true; });
  add("n, s, exponents", [](Recipe& r) {
    r.key_n = r.key_s = true;
    r.key_n_exponent = 0.5;
    r.key_s_exponent = 0.7;
  });
  add("n, s by moments", [](Recipe& r) {
    r.key_n = r.key_s = true;
    r.key_factors = KeyFactors::moments;
    r.key_n_exponent = r.key_s_exponent = 0.75;
  });
  add("centre", [](Recipe& r) { r.key_centre = true; });
  add("n, s by moments, centre", [](Recipe& r) {
    r.key_n = r.key_s = r.key_centre = true;
    r.key_factors = KeyFactors::moments;
  });
  add("values rotated", [](Recipe& r) { r.value_rotation = true; });
  add("value power of two", [](Recipe& r) { r.value_power_of_two = true; });
  recipes.emplace_back("paper", preset_recipe("paper"));
  recipes.emplace_back("fast", preset_recipe("fast"));
  recipes.emplace_back("best", preset_recipe("best"));

  for (const auto& [name, recipe] : recipes) {
    const Folded folded(*source, recipe, statistics);
    const std::vector<float> after = window_logits(folded, ids, {}, 2);
    ASSERT_EQ(before.size(), after.size());
    double worst = 0;
    for (std::size_t i = 0; i < after.size(); ++i) {
      worst = std::max(worst, std::fabs(static_cast<double>(before[i]) - static_cast<double>(after[i])));
    }
    EXPECT_LT(worst, 2e-5 * largest) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Families, FoldingPreserves,
    testing::Values(Case{"gqa", {}}, Case{"mha", {.kv_heads = 4}},
                    Case{"biases", {.attention_bias = true, .mlp_bias = true, .seed = 3}},
                    Case{"qwen2", {.model_type = "qwen2", .seed = 4}},
                    Case{"qwen3", {.model_type = "qwen3", .head_dim = 16, .seed = 5}},
                    Case{"mistral", {.model_type = "mistral", .sliding_window = 9, .seed = 6}}),
    [](const auto& instance) { return std::string(instance.param.name); });

// What the folds do, not only what they keep: after N every pair's largest radius is alpha, after S every
// touched channel's is beta.
TEST(Folding, NormalisesKeysToTheConstants) {
  const TempFolder folder;
  const RandomModel model{.heads = 4, .kv_heads = 2, .head_dim = 16, .seed = 11};
  write_random_model(folder.path(), model);
  const auto source = open_weights(folder.path().string());
  Progress silent;
  const Windows windows{random_ids(4 * 32, model.vocab, 9), 4, 32};
  const auto statistics = calibrate(*source, windows, 2, silent);
  Recipe recipe = preset_recipe("rtn");
  recipe.key_n = true;
  recipe.key_alpha = 3;
  const Folded n_only(*source, recipe, statistics);
  // The same tokens through the folded layer 0 (its input does not depend on folds).
  const auto again = calibrate(n_only, windows, 2, silent);
  for (const float r : again.layers[0].k_pair_radius) EXPECT_NEAR(r, 3.0F, 1e-3F);
  recipe.key_s = true;
  recipe.key_beta = 5;
  recipe.key_top_k = 2;
  LayerWeights w = source->load_layer(0, 1);
  fold_layer(source->config(), recipe, &statistics.layers[0], w);
  ASSERT_EQ(w.k_post_rope_scale.size(), 32U);
  const auto& m = statistics.layers[0].site(formats::Site::k_post_rope).absmax;
  for (std::size_t h = 0; h < 2; ++h) {
    std::size_t touched = 0;
    for (std::size_t j = 0; j < 16; ++j) {
      const float s = w.k_post_rope_scale[h * 16 + j];
      const float partner = w.k_post_rope_scale[h * 16 + (j + 8) % 16];
      if (s == 1.0F) {
        EXPECT_EQ(partner, 1.0F);
        continue;
      }
      ++touched;
      EXPECT_NEAR(s * m[h * 16 + j], 5.0F, 1e-4F);
    }
    EXPECT_GE(touched, 2U);
    EXPECT_LE(touched, 4U);
  }
}

TEST(Folding, RefusesStatisticsOfAnotherShape) {
  const TempFolder folder;
  write_random_model(folder.path(), RandomModel{});
  const auto source = open_weights(folder.path().string());
  Progress silent;
  auto statistics = calibrate(*source, Windows{random_ids(32, 96, 1), 1, 32}, 1, silent);
  statistics.layers[0].site(formats::Site::down_in).absmax.pop_back();
  LayerWeights w = source->load_layer(0, 1);
  try {
    fold_layer(source->config(), preset_recipe("fast"), &statistics.layers[0], w);
    FAIL() << "nothing was thrown";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::input);
    EXPECT_NE(std::string(e.what()).find("down_in"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("79"), std::string::npos) << e.what();
  }
}

// After folding with every head centred, the keys that are cached have the mean 0; without, they keep it.
TEST(Folding, CentredKeysHaveNoMean) {
  const TempFolder folder;
  const RandomModel model{.heads = 4, .kv_heads = 2, .head_dim = 16, .seed = 12};
  write_random_model(folder.path(), model);
  const auto source = open_weights(folder.path().string());
  Progress silent;
  const Windows windows{random_ids(4 * 32, model.vocab, 9), 4, 32};
  auto statistics = calibrate(*source, windows, 2, silent);
  Recipe recipe = preset_recipe("rtn");
  recipe.key_n = recipe.key_s = recipe.key_centre = true;
  recipe.key_factors = KeyFactors::moments;
  recipe.key_n_exponent = recipe.key_s_exponent = 2.0 / 3.0;
  for (const double gain : {1.0, -1.0}) {
    for (auto& layer : statistics.layers) layer.k_centre_gain = {gain, 1.0};
    const Folded folded(*source, recipe, statistics);
    const auto again = calibrate(folded, windows, 2, silent);  // layer 0 sees the same tokens
    const formats::SiteStatistics& k = again.layers[0].site(formats::Site::k_post_rope);
    double largest[2] = {};
    for (std::size_t c = 0; c < 32; ++c) {
      const double deviation = std::sqrt(k.sumsq[c] / static_cast<double>(k.count));
      largest[c / 16] =
          std::max(largest[c / 16], std::fabs(k.sum1[c]) / static_cast<double>(k.count) / deviation);
    }
    EXPECT_LT(largest[1], 1e-4);
    if (gain > 0) {
      EXPECT_LT(largest[0], 1e-4);
    } else {
      EXPECT_GT(largest[0], 1e-2);
    }
  }
}

}  // namespace
}  // namespace fireq::calib
