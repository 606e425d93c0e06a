// Quantising against the original in two streams: resumed layers leave the same streams, threads do not
// matter, and what comes out is nearer to the original than rounding each weight by itself.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "calib/evaluate.hpp"
#include "calib/folding.hpp"
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
  const formats::ModelConfig& config = source_->config();
  std::vector<float> original(windows_.ids.size() * config.hidden);
  source_->embed(windows_.ids, original);
  const RopeTable rope(config, windows_.length);
  for (std::uint64_t layer = 0; layer < config.layers; ++layer) {
    run_layer(config, source_->load_layer(layer, 1), layer, rope, Precision{}, original, windows_.count,
              windows_.length, 1, nullptr);
  }
  const auto error = [&](const std::vector<QuantizedLayer>& layers) {
    return distance(original, run_packed(*source_, layers, windows_));
  };

  Recipe recipe = plain_best();
  const double best = error(quantize_all(recipe, 2));
  recipe.residual = false;
  const double no_residual = error(quantize_all(recipe, 2));
  recipe.compensate = false;
  const double no_target = error(quantize_all(recipe, 2));
  std::vector<QuantizedLayer> nearest;
  for (std::uint64_t layer = 0; layer < config.layers; ++layer) {
    const LayerWeights w = source_->load_layer(layer, 1);
    QuantizedLayer q;
    for (std::size_t i = 0; i < kLinears; ++i) {
      q[i] =
          libquant::make_quantized_linear(w.linear[i].rows, w.linear[i].cols, recipe.weights.levels, false);
      libquant::quantize_rows(w.linear[i].weight, 0, w.linear[i].rows, recipe.weights, {}, q[i]);
    }
    nearest.push_back(std::move(q));
  }
  const double plain = error(nearest);
  EXPECT_LT(best, no_residual);
  EXPECT_LT(no_residual, no_target);
  EXPECT_LT(no_target, 0.97 * plain);
}

INSTANTIATE_TEST_SUITE_P(Families, TwoStreamsTest, testing::Values("llama", "qwen3"),
                         [](const auto& family) { return std::string(family.param); });

}  // namespace
}  // namespace fireq::calib
