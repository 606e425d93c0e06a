// Codes that follow gradients: towards weights that are asked for, as far as the format goes, under scales
// that stay.
#include "libquant/latent_linear.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace fireq::libquant {
namespace {

constexpr std::uint64_t kRows = 21;
constexpr std::uint64_t kCols = 200;  // a group and a part of one

class LatentLinearTest : public testing::TestWithParam<bool> {
 protected:
  LatentLinearTest() : random_(std::random_device{}()) {
    q_ = quantized(GetParam() ? Levels::int4() : Levels::normal());
    values_.assign(kRows * kCols, std::nanf(""));
  }

  QuantizedLinear quantized(const Levels& levels) {
    std::normal_distribution<float> normal(0, 0.1F);
    std::vector<float> w(kRows * kCols);
    for (float& x : w) x = normal(random_);
    QuantizedLinear q = make_quantized_linear(kRows, kCols, levels, false);
    WeightQuantizerOptions options;
    options.levels = levels;
    options.rounding = Rounding::product;
    quantize_rows(w, 0, kRows, options, {}, q);
    return q;
  }
  static std::vector<float> weights(const QuantizedLinear& q) {
    std::vector<float> w(kRows * kCols);
    dequantize_rows(q, ProductTable(q.levels), 0, kRows, w);
    return w;
  }

  std::mt19937_64 random_;
  QuantizedLinear q_;
  std::vector<float> values_;
};

TEST_P(LatentLinearTest, WithoutGradientsNothingMoves) {
  const QuantizedLinear before = q_;
  LatentLinear latent(q_);
  latent.step(std::vector<float>(kRows * kCols, 0.0F), 1, values_, 2);
  EXPECT_EQ(q_.codes, before.codes);
  EXPECT_EQ(values_, weights(before));
}

// Pulled towards what another linear with the same scales holds.
TEST_P(LatentLinearTest, CodesGoWhereTheyArePulled) {
  QuantizedLinear other = quantized(q_.levels);
  other.group_scales = q_.group_scales;
  other.row_scales = q_.row_scales;
  const std::vector<float> goal = weights(other);
  const QuantizedLinear before = q_;
  LatentLinear latent(q_);
  values_ = weights(q_);
  std::vector<float> gradient(kRows * kCols);
  constexpr int kSteps = 400;
  for (int s = 0; s < kSteps; ++s) {
    for (std::size_t i = 0; i < gradient.size(); ++i) gradient[i] = values_[i] - goal[i];
    latent.step(gradient, 0.2 * (kSteps - s) / kSteps, values_, 2);
    EXPECT_EQ(values_, weights(q_));
  }
  EXPECT_NO_THROW(check_quantized_linear(q_));
  EXPECT_EQ(q_.group_scales, before.group_scales);
  EXPECT_EQ(q_.row_scales, before.row_scales);
  std::size_t there = 0;
  for (std::size_t i = 0; i < goal.size(); ++i) there += values_[i] == goal[i] ? 1U : 0U;
  EXPECT_GT(there, goal.size() * 95 / 100);
}

TEST_P(LatentLinearTest, ThreadsDoNotMatter) {
  QuantizedLinear same = q_;
  LatentLinear one(q_);
  LatentLinear six(same);
  std::vector<float> others(values_);
  std::normal_distribution<float> normal;
  std::vector<float> gradient(kRows * kCols);
  for (int s = 0; s < 20; ++s) {
    for (float& g : gradient) g = normal(random_);
    one.step(gradient, 0.3, values_, 1);
    six.step(gradient, 0.3, others, 6);
  }
  EXPECT_EQ(q_.codes, same.codes);
  EXPECT_EQ(values_, others);
}

INSTANTIATE_TEST_SUITE_P(Levels, LatentLinearTest, testing::Bool(),
                         [](const auto& integers) { return integers.param ? "Integers" : "NormalFloat"; });

}  // namespace
}  // namespace fireq::libquant
