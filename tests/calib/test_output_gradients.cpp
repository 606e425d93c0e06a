// Gradients through a layer against differences of the reference layer in double, and what output curvature
// says of a change against the divergence that the change makes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>

#include "calib/output_gradients.hpp"
#include "tests/calib/random_model.hpp"
#include "tests/calib/reference_layer.hpp"

namespace fireq::calib {
namespace {

using formats::Site;
using test::Doubles;
using test::ReferenceLayer;
using test::TempFolder;
using testing_support::RandomModel;

struct Family {
  const char* type;
  std::uint64_t window;
};

class LayerGradientsTest : public testing::TestWithParam<Family> {
 protected:
  LayerGradientsTest() {
    RandomModel model;
    model.model_type = GetParam().type;
    model.sliding_window = GetParam().window;
    model.attention_bias = model.mlp_bias = true;
    model.layers = 1;
    model.seed = std::random_device{}();
    SCOPED_TRACE(model.seed);
    testing_support::write_random_model(folder_.path() / "model", model);
    source_ = open_weights(folder_ / "model");
    config_ = source_->config();
    config_.sliding_window.resize(1);  // the reference wants one
    weights_ = source_->load_layer(0, 1);
    random_.seed(model.seed);
  }

  std::vector<float> normal(std::size_t n) {
    std::normal_distribution<float> draw;
    std::vector<float> out(n);
    for (float& x : out) x = draw(random_);
    return out;
  }
  double loss(const std::vector<float>& hidden, std::uint64_t length) const {
    const Doubles out = ReferenceLayer(config_, weights_, 0, Precision{}).run(hidden, length).hidden;
    double sum = 0;
    for (std::size_t i = 0; i < out.size(); ++i) sum += out[i] * static_cast<double>(wanted_[i]);
    return sum;
  }
  // Of the loss, where `x` is one of its numbers.
  double slope(float& x, const std::vector<float>& hidden, std::uint64_t length) const {
    const float middle = x;
    x = middle + 0x1p-9F;
    const double high = x;
    const double up = loss(hidden, length);
    x = middle - 0x1p-9F;
    const double low = x;
    const double down = loss(hidden, length);
    x = middle;
    return (up - down) / (high - low);
  }

  TempFolder folder_;
  std::unique_ptr<WeightSource> source_;
  formats::ModelConfig config_;
  LayerWeights weights_;
  std::vector<float> wanted_;  // the loss is the products of these with the layer's outputs
  std::mt19937_64 random_;
};

TEST_P(LayerGradientsTest, InputsAreTheDifferencesOfTheReference) {
  const std::uint64_t length = 9;
  std::vector<float> hidden = normal(2 * length * config_.hidden);
  const std::vector<float> behind = normal(hidden.size());
  const RopeTable rope(config_, length);
  std::vector<float> one = behind;
  LayerGradients(config_, weights_, 0, rope, 1).run(2, length, hidden, one, nullptr);
  std::vector<float> four = behind;
  LayerGradients(config_, weights_, 0, rope, 4).run(2, length, hidden, four, nullptr);
  EXPECT_EQ(one, four);
  const std::size_t size = length * config_.hidden;
  for (std::size_t sequence = 0; sequence < 2; ++sequence) {
    std::vector<float> part(hidden.begin() + static_cast<std::ptrdiff_t>(sequence * size),
                            hidden.begin() + static_cast<std::ptrdiff_t>((sequence + 1) * size));
    wanted_.assign(behind.begin() + static_cast<std::ptrdiff_t>(sequence * size),
                   behind.begin() + static_cast<std::ptrdiff_t>((sequence + 1) * size));
    for (std::size_t i = sequence; i < size; i += 23) {
      const double expected = slope(part[i], part, length);
      EXPECT_NEAR(one[sequence * size + i], expected, 2e-3 * (1 + std::fabs(expected))) << i;
    }
  }
}

// With two tokens the gradients of a linear's outputs follow from the slopes at two of its weights: that of
// weight [n, c] is g1[n] x1[c] + g2[n] x2[c].
TEST_P(LayerGradientsTest, MomentsAreThoseOfTheOutputs) {
  const std::uint64_t length = 2;
  const std::vector<float> hidden = normal(length * config_.hidden);
  wanted_ = normal(hidden.size());
  const RopeTable rope(config_, length);
  OutputSums sums = make_output_sums(config_);
  std::vector<float> gradient = wanted_;
  LayerGradients(config_, weights_, 0, rope, 2).run(1, length, hidden, gradient, &sums);
  test::ReferenceResult reference = ReferenceLayer(config_, weights_, 0, Precision{}).run(hidden, length);
  constexpr std::array<Site, kLinears> kInput{Site::attn_in, Site::attn_in, Site::attn_in, Site::o_in,
                                              Site::mlp_in,  Site::mlp_in,  Site::down_in};
  for (std::size_t linear = 0; linear < kLinears; ++linear) {
    LinearWeights& w = weights_.linear[linear];
    const Doubles& x = reference.at(kInput[linear]);
    // The two columns that tell the tokens apart best.
    std::size_t a = 0;
    std::size_t b = 1;
    const auto area = [&](std::size_t i, std::size_t j) {
      return x[i] * x[w.cols + j] - x[j] * x[w.cols + i];
    };
    for (std::size_t i = 0; i < w.cols; ++i) {
      for (std::size_t j = 0; j < i; ++j) {
        if (std::fabs(area(i, j)) > std::fabs(area(a, b))) {
          a = i;
          b = j;
        }
      }
    }
    const std::array<std::size_t, 3> rows{0, w.rows / 2, w.rows - 1};
    std::array<std::array<double, 2>, 3> g{};
    for (std::size_t n = 0; n < rows.size(); ++n) {
      const double at_a = slope(w.weight[rows[n] * w.cols + a], hidden, length);
      const double at_b = slope(w.weight[rows[n] * w.cols + b], hidden, length);
      g[n] = {(at_a * x[w.cols + b] - at_b * x[w.cols + a]) / area(a, b),
              (at_b * x[a] - at_a * x[b]) / area(a, b)};
    }
    double size = 0;
    for (const auto& row : g) size = std::max(size, row[0] * row[0] + row[1] * row[1]);
    EXPECT_GT(size, 0) << linear;
    EXPECT_EQ(sums[linear].tokens, length);
    for (std::size_t m = 0; m < rows.size(); ++m) {
      for (std::size_t n = m; n < rows.size(); ++n) {
        EXPECT_NEAR(sums[linear].square[rows[m] * w.rows + rows[n]], g[m][0] * g[n][0] + g[m][1] * g[n][1],
                    1e-2 * size)
            << linear << " " << m << " " << n;
      }
    }
  }
}

TEST_P(LayerGradientsTest, WeightGradientsAreTheDifferencesOfTheReference) {
  const std::uint64_t length = 7;
  const std::vector<float> hidden = normal(length * config_.hidden);
  wanted_ = normal(hidden.size());
  const RopeTable rope(config_, length);
  WeightGradients sums = make_weight_gradients(config_);
  for (std::vector<float>& sum : sums) std::fill(sum.begin(), sum.end(), 1.0F);  // added to
  std::vector<float> gradient = wanted_;
  LayerGradients(config_, weights_, 0, rope, 3).run(1, length, hidden, gradient, nullptr, &sums);
  for (std::size_t linear = 0; linear < kLinears; ++linear) {
    LinearWeights& w = weights_.linear[linear];
    ASSERT_EQ(sums[linear].size(), w.weight.size());
    double size = 0;
    for (const float g : sums[linear]) size = std::max(size, std::fabs(static_cast<double>(g) - 1));
    for (std::size_t at = linear; at < w.weight.size(); at += w.weight.size() / 9) {
      EXPECT_NEAR(static_cast<double>(sums[linear][at]) - 1, slope(w.weight[at], hidden, length),
                  5e-3 * (1 + size))
          << linear << " " << at;
    }
  }
}

TEST_P(LayerGradientsTest, AdvanceIsTheLayer) {
  using Activations = LayerGradients::Activations;
  const std::uint64_t length = 9;
  const std::vector<float> hidden = normal(2 * length * config_.hidden);
  const RopeTable rope(config_, length);
  const auto advanced = [&](Activations activations, int threads) {
    std::vector<float> out = hidden;
    LayerGradients(config_, weights_, 0, rope, threads, activations).advance(2, length, out);
    return out;
  };
  const auto reference = [&](bool fp8) {
    Precision precision;
    precision.fp8_activations = fp8;
    Doubles out;
    for (std::size_t s = 0; s < 2; ++s) {
      const auto begin = hidden.begin() + static_cast<std::ptrdiff_t>(s * hidden.size() / 2);
      const std::vector<float> one(begin, begin + static_cast<std::ptrdiff_t>(hidden.size() / 2));
      const Doubles part = ReferenceLayer(config_, weights_, 0, precision).run(one, length).hidden;
      out.insert(out.end(), part.begin(), part.end());
    }
    return out;
  };
  const auto distance = [](const auto& a, const auto& b) {
    double sum = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      sum += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    }
    return std::sqrt(sum);
  };
  const std::vector<float> plain = advanced(Activations::plain, 1);
  const Doubles exact = reference(false);
  for (std::size_t i = 0; i < plain.size(); ++i) EXPECT_NEAR(plain[i], exact[i], 1e-3) << i;
  const std::vector<float> rounded = advanced(Activations::quantised, 1);
  EXPECT_EQ(rounded, advanced(Activations::quantised, 4));
  const Doubles fp8 = reference(true);
  EXPECT_LT(distance(rounded, fp8), 0.2 * distance(fp8, exact));
}

INSTANTIATE_TEST_SUITE_P(Families, LayerGradientsTest,
                         testing::Values(Family{"llama", 0}, Family{"mistral", 4}, Family{"qwen2", 0},
                                         Family{"qwen3", 0}),
                         [](const auto& family) { return std::string(family.param.type); });

// Windows of one token: a bias reaches each prediction by itself, so that half of d G d^T is the divergence
// that a small d added to it makes.
TEST(OutputGradients, CurvatureIsThatOfTheDivergence) {
  TempFolder folder;
  RandomModel model;
  model.attention_bias = model.mlp_bias = true;
  model.layers = 3;
  model.seed = std::random_device{}();
  SCOPED_TRACE(model.seed);
  testing_support::write_random_model(folder.path() / "model", model);
  const std::unique_ptr<WeightSource> source = open_weights(folder / "model");
  const formats::ModelConfig& config = source->config();
  std::mt19937_64 random(model.seed);
  Windows windows{{}, 6000, 1};
  for (std::uint64_t i = 0; i < windows.count; ++i) {
    windows.ids.push_back(static_cast<std::int32_t>(random() % config.vocab));
  }
  const RopeTable rope(config, 1);
  std::vector<float> head(config.vocab * config.hidden);
  source->head_rows(0, config.vocab, head);
  const std::vector<float> norm = source->final_norm();
  // Runs from before layer `first`; log-probabilities [tokens, vocab].
  const auto predict = [&](std::uint64_t first, std::vector<float> hidden, const LayerWeights& changed) {
    for (std::uint64_t layer = first; layer < config.layers; ++layer) {
      run_layer(config, layer == first ? changed : source->load_layer(layer, 2), layer, rope, Precision{},
                hidden, windows.count, 1, 2, nullptr);
    }
    Doubles out(windows.count * config.vocab);
    for (std::uint64_t t = 0; t < windows.count; ++t) {
      const float* h = hidden.data() + t * config.hidden;
      double square = 0;
      for (std::uint64_t c = 0; c < config.hidden; ++c) square += static_cast<double>(h[c]) * h[c];
      const double inverse = 1 / std::sqrt(square / static_cast<double>(config.hidden) + config.rms_eps);
      double sum = 0;
      for (std::uint64_t v = 0; v < config.vocab; ++v) {
        double logit = 0;
        for (std::uint64_t c = 0; c < config.hidden; ++c) {
          logit += inverse * h[c] * norm[c] * head[v * config.hidden + c];
        }
        out[t * config.vocab + v] = logit;
        sum += std::exp(logit);
      }
      for (std::uint64_t v = 0; v < config.vocab; ++v) out[t * config.vocab + v] -= std::log(sum);
    }
    return out;
  };
  std::normal_distribution<double> normal;
  Progress progress;
  OutputGradients gradients(*source, windows, 2, progress);
  std::vector<float> hidden(windows.count * config.hidden);
  source->embed(windows.ids, hidden);
  for (std::uint64_t layer = 0; layer < config.layers; ++layer) {
    const LayerWeights weights = source->load_layer(layer, 2);
    const OutputSums sums = gradients.sums(layer, weights, hidden);
    const Doubles before = predict(layer, hidden, weights);
    for (const LinearIndex linear : {kV, kO, kGate, kUp, kDown}) {
      LayerWeights changed = weights;
      const std::uint64_t n = changed.linear[linear].rows;
      std::vector<double> d(n);
      double size = 0;  // d G d^T
      for (double& x : d) x = normal(random);
      const auto moment = [&](std::uint64_t i, std::uint64_t j) {
        return static_cast<double>(sums[linear].square[std::min(i, j) * n + std::max(i, j)]) /
               static_cast<double>(sums[linear].tokens);
      };
      for (std::uint64_t i = 0; i < n; ++i) {
        for (std::uint64_t j = 0; j < n; ++j) size += d[i] * moment(i, j) * d[j];
      }
      const double scale = std::sqrt(2e-3 / size);  // a divergence of about 0.001
      for (std::uint64_t i = 0; i < n; ++i)
        changed.linear[linear].bias[i] += static_cast<float>(scale * d[i]);
      const Doubles after = predict(layer, hidden, changed);
      double divergence = 0;
      for (std::size_t i = 0; i < before.size(); ++i)
        divergence += std::exp(before[i]) * (before[i] - after[i]);
      divergence /= static_cast<double>(windows.count);
      EXPECT_NEAR(divergence / 1e-3, 1, 0.25) << "layer " << layer << ", linear " << linear;
    }
    run_layer(config, weights, layer, rope, Precision{}, hidden, windows.count, 1, 2, nullptr);
  }
}

}  // namespace
}  // namespace fireq::calib
