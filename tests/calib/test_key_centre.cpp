// The gain of centring keys against attention worked out in FP64, key by key.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "calib/collectors.hpp"
#include "calib/key_centre.hpp"
#include "calib/key_folds.hpp"
#include "libquant/kv_rounding.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::calib {
namespace {

using formats::Site;

constexpr std::uint64_t kHeads = 4, kKvHeads = 2, kDim = 8, kLength = 40, kTokens = 2 * kLength;

struct Tokens {
  std::vector<float> q = std::vector<float>(kTokens * kHeads * kDim);
  std::vector<float> k = std::vector<float>(kTokens * kKvHeads * kDim);
  std::vector<float> v = std::vector<float>(kTokens * kKvHeads * kDim);
};

Tokens random_tokens(std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  Tokens t;
  for (std::vector<float>* values : {&t.q, &t.k, &t.v}) {
    for (float& x : *values) x = normal(random);
  }
  return t;
}

formats::ModelConfig config_with(std::uint64_t window) {
  formats::ModelConfig config;
  config.layers = 1;
  config.heads = kHeads;
  config.kv_heads = kKvHeads;
  config.head_dim = kDim;
  config.hidden = kHeads * kDim;
  if (window != 0) config.sliding_window = {window};
  return config;
}

// Cached key of one token and head in FP64: [(k n - shift) s] in INT4, over n s.
std::vector<double> cached(const float* k, const KeyFolds& folds, std::uint64_t g) {
  std::vector<double> out(kDim), smooth(kDim);
  double largest = 0;
  for (std::uint64_t c = 0; c < kDim; ++c) {
    const std::uint64_t at = g * kDim + c;
    smooth[c] = static_cast<double>(folds.n[at]) * static_cast<double>(folds.s[at]);
    out[c] = static_cast<double>(k[c]) * smooth[c] -
             static_cast<double>(folds.shift[at]) * static_cast<double>(folds.s[at]);
    largest = std::max(largest, std::fabs(out[c]));
  }
  if (!folds.rounding.empty()) {
    std::vector<float> x(out.begin(), out.end());
    const std::uint64_t size = libquant::kv_rounding_size(kDim);
    const auto sigma = static_cast<double>(libquant::quantize_kv_together(
        x, std::span(folds.rounding).subspan(g * size, size), libquant::KvPart::key));
    for (std::uint64_t c = 0; c < kDim; ++c) out[c] = static_cast<double>(x[c]) * sigma / smooth[c];
    return out;
  }
  std::uint8_t code = 0;
  const auto wanted = static_cast<float>(largest / 7);
  libquant::encode_e4m3({&wanted, 1}, {&code, 1});
  float sigma = 0;
  libquant::decode_e4m3({&code, 1}, {&sigma, 1});
  for (std::uint64_t c = 0; c < kDim; ++c) {
    const double level = std::clamp(std::nearbyint(out[c] / static_cast<double>(sigma)), -7.0, 7.0);
    out[c] = level * static_cast<double>(sigma) / smooth[c];
  }
  return out;
}

// Outputs of all queries of KV head g; folds null: keys as they are.
std::vector<double> attention(const Tokens& t, const KeyFolds* folds, std::uint64_t g, std::uint64_t window) {
  std::vector<double> out;
  for (std::uint64_t h = g * kHeads / kKvHeads; h < (g + 1) * kHeads / kKvHeads; ++h) {
    for (std::uint64_t token = 0; token < kTokens; ++token) {
      const std::uint64_t start = token / kLength * kLength;
      const std::uint64_t first =
          window == 0 ? start : std::max(start, token + 1 - std::min(window, token + 1));
      std::vector<double> sum(kDim);
      double total = 0;
      for (std::uint64_t key = first; key <= token; ++key) {
        const float* k = t.k.data() + (key * kKvHeads + g) * kDim;
        const std::vector<double> row =
            folds == nullptr ? std::vector<double>(k, k + kDim) : cached(k, *folds, g);
        double score = 0;
        for (std::uint64_t c = 0; c < kDim; ++c)
          score += row[c] * static_cast<double>(t.q[(token * kHeads + h) * kDim + c]);
        const double p = std::exp(score / std::sqrt(static_cast<double>(kDim)));
        total += p;
        for (std::uint64_t c = 0; c < kDim; ++c)
          sum[c] += p * static_cast<double>(t.v[(key * kKvHeads + g) * kDim + c]);
      }
      for (const double x : sum) out.push_back(x / total);
    }
  }
  return out;
}

double distance(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return sum;
}

struct Measured {
  std::vector<double> gain;
  formats::LayerStatistics statistics;
};

Measured measure(const Tokens& t, const formats::ModelConfig& config, int threads) {
  Measured m;
  StatisticsCollector collector(m.statistics, kKvHeads, kDim, 1);
  KeySample sample(collector, kLength);
  sample.observe(Site::q, t.q, kTokens, kHeads * kDim);
  sample.observe(Site::k_pre_rope, t.k, kTokens, kKvHeads * kDim);
  sample.observe(Site::k_post_rope, t.k, kTokens, kKvHeads * kDim);
  sample.observe(Site::v, t.v, kTokens, kKvHeads * kDim);
  m.gain = sample.centre_gain(config, 0, m.statistics, threads);
  return m;
}

TEST(KeyCentre, GainIsTheDifferenceOfErrors) {
  std::mt19937_64 random(std::random_device{}());
  for (const std::uint64_t window : {0U, 9U}) {
    const formats::ModelConfig config = config_with(window);
    Tokens t = random_tokens(random);
    for (std::size_t i = 0; i < t.k.size(); ++i) {
      if (i % kDim == 3) t.k[i] += 4;
    }
    Measured m = measure(t, config, 2);
    EXPECT_EQ(m.gain, measure(t, config, 1).gain);
    EXPECT_EQ(m.statistics.site(Site::q).count, kTokens);  // passed on
    ASSERT_EQ(m.gain.size(), kKvHeads);
    const Recipe recipe = preset_recipe("best");
    m.statistics.k_centre_gain.assign(kKvHeads, -1);
    const KeyFolds plain = key_folds(recipe, m.statistics, kKvHeads, kDim, false);
    m.statistics.k_centre_gain.assign(kKvHeads, 1);
    const KeyFolds centred = key_folds(recipe, m.statistics, kKvHeads, kDim, false);
    for (std::uint64_t g = 0; g < kKvHeads; ++g) {
      const std::vector<double> exact = attention(t, nullptr, g, window);
      const double without = distance(attention(t, &plain, g, window), exact);
      const double with = distance(attention(t, &centred, g, window), exact);
      // A key that lies on the border of two codes may go the other way in FP32.
      EXPECT_NEAR(m.gain[g], without - with, 0.02 * (without + with)) << window;
    }
  }
}

TEST(KeyCentre, PaysForAMeanAndNotForOneFarKey) {
  std::mt19937_64 random(std::random_device{}());
  Tokens t = random_tokens(random);
  for (std::uint64_t token = 0; token < kTokens; ++token) {
    for (std::uint64_t c = 0; c < kDim; ++c) {
      t.k[(token * kKvHeads + 0) * kDim + c] += c == 2 ? 6.0F : 0.0F;
      // Head 1: the first key of each window alone is at 0, and every query attends to it.
      float& k = t.k[(token * kKvHeads + 1) * kDim + c];
      k *= 0.3F;
      if (token % kLength == 0) k = 0;
      k += token % kLength == 0 || c != 2 ? 0.0F : -12.0F;
      for (std::uint64_t h = 2; h < 4; ++h) t.q[(token * kHeads + h) * kDim + 2] = 1.0F;
    }
  }
  const Measured m = measure(t, config_with(0), 1);
  EXPECT_GT(m.gain[0], 0);
  EXPECT_LT(m.gain[1], 0);
}

}  // namespace
}  // namespace fireq::calib
