// Quantising against the original in two streams: resumed layers leave the same streams, threads do not
// matter, and what comes out is nearer to the original than rounding each weight by itself. And codes that
// are tuned behind that.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "calib/code_tuner.hpp"
#include "calib/evaluate.hpp"
#include "calib/folding.hpp"
#include "calib/scoring.hpp"
#include "calib/two_streams.hpp"
#include "common/error.hpp"
#include "tests/calib/random_model.hpp"

namespace fireq::calib {
namespace {

using test::TempFolder;
using testing_support::RandomModel;
using testing_support::write_random_model;

Windows random_windows(std::uint64_t count, std::uint64_t length, std::uint64_t vocab, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  Windows out;
  out.count = count;
  out.length = length;
  for (std::uint64_t i = 0; i < count * length; ++i)
    out.ids.push_back(static_cast<std::int32_t>(random() % vocab));
  return out;
}

Recipe plain_best() {
  Recipe r = preset_recipe("best");
  r.key_n = r.key_s = r.lambda2 = r.lambda3 = r.weighted_search = false;  // nothing that needs statistics
  return r;
}

Recipe tuned_best(std::uint64_t passes, double rate) {
  Recipe r = plain_best();
  r.tune_passes = passes;
  r.tune_rate = rate;
  return r;
}

void expect_same(const QuantizedLayer& a, const QuantizedLayer& b) {
  for (std::size_t i = 0; i < kLinears; ++i) {
    EXPECT_EQ(a[i].codes, b[i].codes) << i;
    EXPECT_EQ(a[i].group_scales, b[i].group_scales) << i;
    EXPECT_EQ(a[i].row_scales, b[i].row_scales) << i;
  }
}

class TwoStreamsTest : public testing::TestWithParam<const char*> {
 protected:
  TwoStreamsTest() {
    RandomModel model;
    model.model_type = GetParam();
    model.hidden = 160;
    model.ffn = 300;
    model.layers = 3;
    model.heads = 5;
    model.kv_heads = 1;
    model.head_dim = 16;
    model.attention_bias = true;
    model.mlp_bias = true;
    write_random_model(folder_.path() / "model", model);
    source_ = open_weights(folder_ / "model");
    // Windows that do not fill whole batches of tokens.
    windows_ = random_windows(21, 100, source_->config().vocab, 5);
  }

  std::vector<QuantizedLayer> quantize_all(const Recipe& recipe, int threads) {
    TwoStreams streams(*source_, windows_, recipe, threads, progress_);
    std::vector<QuantizedLayer> out;
    for (std::uint64_t layer = 0; layer < source_->config().layers; ++layer) {
      StreamReport report;
      out.push_back(streams.quantize(layer, source_->load_layer(layer, threads), report));
      for (const double e : report.error) {
        EXPECT_GT(e, 0);
        EXPECT_LT(e, 0.3);
      }
      EXPECT_TRUE(report.raised.empty());
    }
    return out;
  }

  // Each weight to the nearest by itself.
  std::vector<QuantizedLayer> nearest(const Recipe& recipe) const {
    std::vector<QuantizedLayer> out;
    for (std::uint64_t layer = 0; layer < source_->config().layers; ++layer) {
      const LayerWeights w = source_->load_layer(layer, 1);
      QuantizedLayer q;
      for (std::size_t i = 0; i < kLinears; ++i) {
        q[i] =
            libquant::make_quantized_linear(w.linear[i].rows, w.linear[i].cols, recipe.weights.levels, false);
        libquant::quantize_rows(w.linear[i].weight, 0, w.linear[i].rows, recipe.weights, {}, q[i]);
      }
      out.push_back(std::move(q));
    }
    return out;
  }

  std::vector<float> run_original(const Windows& windows) const {
    const formats::ModelConfig& config = source_->config();
    std::vector<float> hidden(windows.ids.size() * config.hidden);
    source_->embed(windows.ids, hidden);
    const RopeTable rope(config, windows.length);
    for (std::uint64_t layer = 0; layer < config.layers; ++layer) {
      run_layer(config, source_->load_layer(layer, 1), layer, rope, Precision{}, hidden, windows.count,
                windows.length, 1, nullptr);
    }
    return hidden;
  }

  std::vector<QuantizedLayer> tuned(const std::vector<QuantizedLayer>& layers, const Windows& windows,
                                    const Recipe& recipe, int threads, TuningReport* report = nullptr) {
    std::vector<TunedLayer> work;
    work.reserve(layers.size());
    for (std::uint64_t layer = 0; layer < layers.size(); ++layer) {
      work.push_back({source_->load_layer(layer, 1), layers[layer]});
    }
    const TuningReport said = tune_codes(*source_, windows, recipe, Modules(recipe, source_->config(), false),
                                         work, threads, progress_);
    if (report != nullptr) *report = said;
    std::vector<QuantizedLayer> out;
    out.reserve(work.size());
    for (TunedLayer& layer : work) out.push_back(std::move(layer.quantized));
    return out;
  }

  TempFolder folder_;
  std::unique_ptr<WeightSource> source_;
  Windows windows_;
  Progress progress_;
};

TEST_P(TwoStreamsTest, ThreadsDoNotMatter) {
  const std::vector<QuantizedLayer> one = quantize_all(plain_best(), 1);
  const std::vector<QuantizedLayer> five = quantize_all(plain_best(), 5);
  for (std::size_t layer = 0; layer < one.size(); ++layer) expect_same(one[layer], five[layer]);
}

TEST_P(TwoStreamsTest, ReplayedLayersLeaveTheSameStreams) {
  const Recipe recipe = plain_best();
  const std::vector<QuantizedLayer> whole = quantize_all(recipe, 2);
  for (std::uint64_t done = 1; done < whole.size(); ++done) {
    TwoStreams streams(*source_, windows_, recipe, 2, progress_);
    for (std::uint64_t layer = 0; layer < done; ++layer) {
      streams.replay(layer, source_->load_layer(layer, 2), whole[layer]);
    }
    StreamReport report;
    expect_same(streams.quantize(done, source_->load_layer(done, 2), report), whole[done]);
  }
  // And the streams matter: other weights before give other codes after.
  TwoStreams streams(*source_, windows_, recipe, 2, progress_);
  QuantizedLayer other = whole[0];
  for (std::uint8_t& s : other[kDown].group_scales) s = static_cast<std::uint8_t>(s - 8);
  streams.replay(0, source_->load_layer(0, 2), other);
  StreamReport report;
  const QuantizedLayer after = streams.quantize(1, source_->load_layer(1, 2), report);
  EXPECT_NE(after[kQ].codes, whole[1][kQ].codes);
}

// The last hidden states of a model whose layers are these, in the precision of FP8 activations.
std::vector<float> run_packed(const WeightSource& source, const std::vector<QuantizedLayer>& layers,
                              const Windows& windows) {
  const formats::ModelConfig& config = source.config();
  std::vector<float> hidden(windows.ids.size() * config.hidden);
  source.embed(windows.ids, hidden);
  const RopeTable rope(config, windows.length);
  Precision precision;
  precision.fp8_activations = true;
  for (std::uint64_t layer = 0; layer < config.layers; ++layer) {
    LayerWeights w = source.load_layer(layer, 1);
    for (std::size_t i = 0; i < kLinears; ++i) {
      const libquant::QuantizedLinear& q = layers[layer][i];
      libquant::operand_rows(q, libquant::ProductTable(q.levels), 0, q.rows, w.linear[i].weight);
      w.linear[i].row_scale = q.row_scales;
    }
    run_layer(config, std::move(w), layer, rope, precision, hidden, windows.count, windows.length, 1,
              nullptr);
  }
  return hidden;
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  double reference = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    sum += d * d;
    reference += static_cast<double>(a[i]) * static_cast<double>(a[i]);
  }
  return std::sqrt(sum / reference);
}

TEST_P(TwoStreamsTest, EachPartOfTheRecipeBringsTheModelNearer) {
  const std::vector<float> original = run_original(windows_);
  const auto error = [&](const std::vector<QuantizedLayer>& layers) {
    return distance(original, run_packed(*source_, layers, windows_));
  };

  Recipe recipe = plain_best();
  const double best = error(quantize_all(recipe, 2));
  recipe.residual = false;
  const double no_residual = error(quantize_all(recipe, 2));
  recipe.compensate = false;
  const double no_target = error(quantize_all(recipe, 2));
  const double plain = error(nearest(recipe));
  EXPECT_LT(best, no_residual);
  EXPECT_LT(no_residual, no_target);
  EXPECT_LT(no_target, 0.97 * plain);
}

TEST_P(TwoStreamsTest, TuningMovesCodesAloneAndPredictionsNearer) {
  const Recipe recipe = tuned_best(6, 0.01);
  const Windows text = random_windows(64, 24, source_->config().vocab, 8);
  const TuningWork work = tuning_work(text, recipe);
  EXPECT_EQ(work.judged, 8U);
  EXPECT_EQ(work.windows_per_step, 3U);  // a sixteenth of the 56 others
  EXPECT_EQ(work.steps, 108U);
  const std::vector<QuantizedLayer> before = nearest(recipe);
  TuningReport report;
  const std::vector<QuantizedLayer> after = tuned(before, text, recipe, 2, &report);
  EXPECT_TRUE(report.kept());
  for (std::size_t layer = 0; layer < before.size(); ++layer) {
    for (std::size_t i = 0; i < kLinears; ++i) {
      EXPECT_NE(after[layer][i].codes, before[layer][i].codes) << i;
      EXPECT_EQ(after[layer][i].group_scales, before[layer][i].group_scales) << i;
      EXPECT_EQ(after[layer][i].row_scales, before[layer][i].row_scales) << i;
      EXPECT_NO_THROW(libquant::check_quantized_linear(after[layer][i])) << i;
    }
  }
  // What it says of the windows held back, by the forward pass of evaluation.
  Windows judged{{}, 0, text.length};
  for (std::uint64_t i = 7; i < text.count; i += 8, ++judged.count) {
    const auto from = text.ids.begin() + static_cast<std::ptrdiff_t>(i * text.length);
    judged.ids.insert(judged.ids.end(), from, from + static_cast<std::ptrdiff_t>(text.length));
  }
  OutputHead head(*source_, true, OutputHead::part_rows_for(source_->config().hidden), 1);
  const std::vector<double> divergence = mean_divergences(
      head, std::vector{run_packed(*source_, before, judged), run_packed(*source_, after, judged)},
      run_original(judged), 1);
  EXPECT_NEAR(report.before, divergence[0], 0.02 * divergence[0]);
  EXPECT_NEAR(report.after, divergence[1], 0.02 * divergence[1]);
}

// So high a rate spoils everything: what the windows held back notice.
TEST_P(TwoStreamsTest, TuningThatDoesHarmIsUndone) {
  const Recipe recipe = tuned_best(1, 1);
  const Windows text = random_windows(16, 12, source_->config().vocab, 8);
  const std::vector<QuantizedLayer> before = nearest(recipe);
  TuningReport report;
  const std::vector<QuantizedLayer> after = tuned(before, text, recipe, 2, &report);
  EXPECT_FALSE(report.kept());
  EXPECT_GT(report.after, report.before);
  for (std::size_t layer = 0; layer < before.size(); ++layer) expect_same(after[layer], before[layer]);
}

TEST_P(TwoStreamsTest, TuningDoesNotDependOnThreads) {
  const Recipe recipe = tuned_best(1, 0.1);
  const Windows text = random_windows(16, 12, source_->config().vocab, 8);
  const std::vector<QuantizedLayer> before = nearest(recipe);
  TuningReport one;
  TuningReport five;
  const std::vector<QuantizedLayer> a = tuned(before, text, recipe, 1, &one);
  const std::vector<QuantizedLayer> b = tuned(before, text, recipe, 5, &five);
  EXPECT_NE(one.before, one.after);
  EXPECT_EQ(one.before, five.before);
  EXPECT_EQ(one.after, five.after);  // of codes that moved, even where they are put back
  for (std::size_t layer = 0; layer < a.size(); ++layer) expect_same(a[layer], b[layer]);
}

// Linears in FP8 and in their own type take part as they are stored, and stay.
TEST_P(TwoStreamsTest, TuningLeavesWhatHasNoCodes) {
  Recipe recipe = parse_recipe(
      R"({"preset": "best", "ignore": ["*.up_proj"], "overrides": [{"match": "*.v_proj", "precision": "fp8"}],
          "curvature": {"tune_passes": 1}})",
      "");
  std::vector<QuantizedLayer> before = nearest(recipe);
  for (std::uint64_t layer = 0; layer < before.size(); ++layer) {
    const LinearWeights v = source_->load_layer(layer, 1).linear[kV];
    before[layer].fp8[kV] = libquant::make_fp8_linear(v.rows, v.cols);
    libquant::quantize_fp8_rows(v.weight, 0, v.rows, before[layer].fp8[kV]);
    before[layer][kV] = before[layer][kUp] = {};
  }
  const std::vector<QuantizedLayer> after = tuned(before, windows_, recipe, 2);
  for (std::size_t layer = 0; layer < before.size(); ++layer) {
    EXPECT_EQ(after[layer].fp8[kV].codes, before[layer].fp8[kV].codes);
    EXPECT_TRUE(after[layer][kV].codes.empty());
    EXPECT_TRUE(after[layer][kUp].codes.empty());
  }
}

TEST(TuneCodes, WhichModels) {
  formats::ModelConfig config;
  config.hidden = config.ffn = config.head_dim = 64;
  config.layers = config.heads = config.kv_heads = 1;
  config.vocab = 100;
  Recipe recipe = preset_recipe("best");
  recipe.tune_weights_per_token = 28;  // 7 matrices of 64 x 64, so 1024 tokens will do
  const Windows enough{{}, 64, 16};
  EXPECT_TRUE(tunes_codes(config, recipe, enough));
  EXPECT_FALSE(wants_tuned_codes(config, recipe, {{}, 63, 16}));
  config.layers = 2;
  EXPECT_FALSE(tunes_codes(config, recipe, enough));
  recipe.tune_weights_per_token = 1e9;
  config.layers = 9000;  // 16 bytes a weight: 4.1e9 bytes
  EXPECT_TRUE(tunes_codes(config, recipe, enough));
  config.layers = 9500;  // 4.36e9: over 4 GiB
  EXPECT_TRUE(wants_tuned_codes(config, recipe, enough));
  EXPECT_FALSE(tunes_codes(config, recipe, enough));
  config.layers = 1;
  recipe.tune_passes = 0;
  EXPECT_FALSE(tunes_codes(config, recipe, enough));
}

INSTANTIATE_TEST_SUITE_P(Families, TwoStreamsTest, testing::Values("llama", "qwen3"),
                         [](const auto& family) { return std::string(family.param); });

}  // namespace
}  // namespace fireq::calib
