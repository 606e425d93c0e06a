// Calibration text that the model writes: the given windows stay, each written one begins like one of them
// and goes on as the model by itself, one sequence at a time, would.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "calib/generate.hpp"
#include "calib/own_text.hpp"
#include "tests/calib/random_model.hpp"
#include "tests/calib/support.hpp"

namespace fireq::calib {
namespace {

using test::Random;
using test::TempFolder;
using testing_support::RandomModel;
using testing_support::write_random_model;

TEST(OwnText, HowMuch) {
  const Windows windows{{}, 10, 4};
  formats::ModelConfig config;
  config.hidden = config.ffn = 64;
  config.layers = config.heads = config.kv_heads = 1;
  config.head_dim = 64;
  config.vocab = 100;
  EXPECT_EQ(own_text_windows(config, windows, 0), 0U);
  EXPECT_EQ(own_text_windows(config, windows, 0.04), 0U);
  EXPECT_EQ(own_text_windows(config, windows, 0.25), 3U);
  EXPECT_EQ(own_text_windows(config, windows, 1), 10U);
  EXPECT_EQ(own_text_windows(config, windows, 2.5), 25U);
  config.layers = 200'000;  // 8 matrices of 64 x 64: over 4 GiB
  EXPECT_FALSE(writes_own_text(config));
  EXPECT_EQ(own_text_windows(config, windows, 1), 0U);
  config.layers = 1;
  config.vocab = 20'000'000;
  EXPECT_EQ(own_text_windows(config, windows, 1), 0U);
}

class OwnTextOfFamily : public testing::TestWithParam<const char*> {
 protected:
  OwnTextOfFamily() : random_(11) {
    RandomModel model;
    model.model_type = GetParam();
    model.seed = test::test_seed();
    model.sliding_window = model.model_type == "mistral" ? 24 : 0;
    write_random_model(folder_.path() / "model", model);
    source_ = open_weights(folder_ / "model");
    windows_.count = 7;
    windows_.length = 50;
    for (std::uint64_t i = 0; i < windows_.count * windows_.length; ++i) {
      windows_.ids.push_back(static_cast<std::int32_t>(random_.below(source_->config().vocab)));
    }
  }

  TempFolder folder_;
  Random random_;
  std::unique_ptr<WeightSource> source_;
  Windows windows_;
};

TEST_P(OwnTextOfFamily, IsWhatTheModelWritesOneWindowAtATime) {
  constexpr double kShare = 1.5;
  constexpr std::uint64_t kPrompt = 3;  // a sixteenth of 50
  Progress progress;
  const Windows all = with_own_text(*source_, windows_, kShare, 2, progress);
  const std::uint64_t own = 11;
  ASSERT_EQ(all.count, windows_.count + own);
  ASSERT_EQ(all.length, windows_.length);
  ASSERT_EQ(all.ids.size(), all.count * all.length);
  EXPECT_TRUE(std::equal(windows_.ids.begin(), windows_.ids.end(), all.ids.begin()));
  std::uint64_t unlike = 0;
  for (std::uint64_t i = 0; i < own; ++i) {
    const std::span<const std::int32_t> row =
        std::span(all.ids).subspan((windows_.count + i) * all.length, all.length);
    const std::span<const std::int32_t> from =
        std::span(windows_.ids).subspan(i * windows_.count / own * all.length, all.length);
    EXPECT_TRUE(std::equal(from.begin(), from.begin() + kPrompt, row.begin())) << i;
    GenerationOptions options;
    options.sampling = {.temperature = 1, .top_p = 1, .seed = i};
    options.max_new_tokens = all.length - kPrompt;
    options.threads = 1;
    std::vector<std::int32_t> alone(row.begin(), row.begin() + kPrompt);
    generate(*source_, row.first(kPrompt), options, [&](std::int32_t id) { alone.push_back(id); });
    EXPECT_TRUE(std::equal(row.begin(), row.end(), alone.begin(), alone.end())) << i;
    if (!std::equal(row.begin(), row.end(), from.begin())) ++unlike;
  }
  EXPECT_EQ(unlike, own);
}

TEST_P(OwnTextOfFamily, ThreadsDoNotMatter) {
  Progress progress;
  const Windows one = with_own_text(*source_, windows_, 1, 1, progress);
  const Windows five = with_own_text(*source_, windows_, 1, 5, progress);
  EXPECT_EQ(one.ids, five.ids);
}

TEST_P(OwnTextOfFamily, NoneLeavesTheWindows) {
  Progress progress;
  const Windows same = with_own_text(*source_, windows_, 0, 2, progress);
  EXPECT_EQ(same.ids, windows_.ids);
  EXPECT_EQ(same.count, windows_.count);
  EXPECT_EQ(own_text_bytes(source_->config(), windows_, 0), 0U);
}

INSTANTIATE_TEST_SUITE_P(Families, OwnTextOfFamily, testing::Values("llama", "mistral", "qwen3"));

// All tokens, each as often as its probability says.
TEST(Sampler, WithoutACutDrawsTheWholeDistribution) {
  Random random(12);
  constexpr std::size_t kTokens = 20;
  constexpr int kDraws = 40'000;
  std::vector<float> logits = random.normals(kTokens, 1.5);
  logits[0] = logits[kTokens - 1] = -std::numeric_limits<float>::infinity();
  std::vector<double> p(kTokens);
  double total = 0;
  for (std::size_t i = 0; i < kTokens; ++i) total += p[i] = std::exp(static_cast<double>(logits[i]));
  Sampler sampler({.temperature = 1, .top_p = 1, .seed = test::test_seed()});
  std::vector<int> count(kTokens);
  for (int i = 0; i < kDraws; ++i) ++count[static_cast<std::size_t>(sampler.next(logits))];
  for (std::size_t i = 0; i < kTokens; ++i) {
    const double expected = kDraws * p[i] / total;
    EXPECT_NEAR(count[i], expected, 5 * std::sqrt(expected)) << i;
  }
}

}  // namespace
}  // namespace fireq::calib
