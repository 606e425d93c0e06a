// Curvature sums, their factor and compensated targets against dense algebra in double.
#include "libquant/curvature.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "common/error.hpp"
#include "tests/libquant/curvature_problem.hpp"

namespace fireq::libquant {
namespace {

using namespace testing_support;

Curvature sums_of(const Inputs& in, int threads) {
  Curvature sums(in.cols);
  sums.add(in.quantised.data(), in.original.data(), in.cols, in.tokens, threads);
  return sums;
}

// The kept half: tiles on and over the diagonal hold every upper element.
void expect_sums(const Curvature& sums, const Inputs& in) {
  const Matrix square = mean_products(in.quantised, in.quantised, in.tokens, in.cols, in.cols);
  const Matrix cross = mean_products(in.original, in.quantised, in.tokens, in.cols, in.cols);
  ASSERT_EQ(sums.tokens, in.tokens);
  const auto n = static_cast<double>(in.tokens);
  for (std::uint64_t i = 0; i < in.cols; ++i) {
    for (std::uint64_t j = 0; j < in.cols; ++j) {
      const double scale = std::sqrt(square[i][i] * square[j][j]) + 1e-6;
      if (j >= i) {
        ASSERT_NEAR(static_cast<double>(sums.square[i * in.cols + j]) / n, square[i][j], 1e-5 * scale);
      }
      ASSERT_NEAR(static_cast<double>(sums.cross[i * in.cols + j]) / n, cross[i][j], 1e-5 * scale);
    }
  }
}

TEST(Curvature, SumsAreThoseOfTheDefinition) {
  std::mt19937_64 random(1);
  for (const std::uint64_t cols : {1U, 5U, 256U, 300U}) {
    const Inputs in = correlated_inputs(70, cols, random);
    expect_sums(sums_of(in, 2), in);
  }
}

TEST(Curvature, PartsMergeToTheWholeAndThreadsDoNotMatter) {
  std::mt19937_64 random(2);
  const Inputs in = correlated_inputs(90, 300, random);
  const Curvature whole = sums_of(in, 1);
  const Curvature threaded = sums_of(in, 5);
  EXPECT_EQ(whole.square, threaded.square);
  EXPECT_EQ(whole.cross, threaded.cross);
  Curvature parts(in.cols);
  Curvature second(in.cols);
  parts.add(in.quantised.data(), in.original.data(), in.cols, 37, 1);
  second.add(in.quantised.data() + 37 * in.cols, in.original.data() + 37 * in.cols, in.cols, 53, 1);
  parts.merge(second);
  expect_sums(parts, in);
  Curvature other(3);
  EXPECT_THROW(parts.merge(other), Error);
}

void expect_factor(const CurvatureFactor& f, Matrix h) {
  add_to_diagonal(h, f.damping);
  const std::size_t n = h.size();
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < n; ++j) {
      const double scale = std::sqrt(h[i][i] * h[j][j]);
      ASSERT_NEAR(static_cast<double>(f.matrix[i * n + j]), h[i][j], 1e-5 * scale);
      if (j < i) {
        ASSERT_EQ(f.upper[i * n + j], 0.0F);
      }
      double product = 0;
      for (std::size_t k = std::max(i, j); k < n; ++k) {
        product += static_cast<double>(f.upper[i * n + k]) * static_cast<double>(f.upper[j * n + k]);
      }
      ASSERT_NEAR(product, h[i][j], 1e-5 * scale) << i << ", " << j;
    }
  }
}

TEST(Curvature, FactorTimesItsTransposeIsTheDampedMatrix) {
  std::mt19937_64 random(3);
  for (const std::uint64_t cols : {1U, 2U, 255U, 257U, 530U}) {
    const Inputs in = correlated_inputs(40, cols, random);  // fewer tokens than channels: singular
    const Curvature sums = sums_of(in, 2);
    const CurvatureFactor f = factor_curvature(sums, 0.01, 2);
    const Matrix h = mean_products(in.quantised, in.quantised, in.tokens, cols, cols);
    EXPECT_NEAR(f.damping / mean_diagonal(h), 0.01, 1e-6);
    EXPECT_FALSE(f.raised);
    EXPECT_EQ(f.dead, 0U);
    expect_factor(f, h);
    EXPECT_EQ(factor_curvature(sums, 0.01, 1).upper, factor_curvature(sums, 0.01, 7).upper);
  }
}

TEST(Curvature, DeadChannelsAndRoundedAwayDampingAreReported) {
  std::mt19937_64 random(4);
  Inputs in = correlated_inputs(50, 40, random);
  for (std::uint64_t t = 0; t < in.tokens; ++t) {
    in.quantised[t * in.cols + 7] = in.quantised[t * in.cols + 39] = 0;
    in.quantised[t * in.cols + 12] = in.quantised[t * in.cols + 11];  // two channels that are one
  }
  const CurvatureFactor f = factor_curvature(sums_of(in, 1), 0.01, 1);
  EXPECT_EQ(f.dead, 2U);
  expect_factor(f, mean_products(in.quantised, in.quantised, in.tokens, in.cols, in.cols));
  // Fewer tokens than channels and so little damping that the sums' rounding outweighs it: lambda is raised.
  const CurvatureFactor raised = factor_curvature(sums_of(correlated_inputs(20, 60, random), 1), 1e-12, 1);
  EXPECT_TRUE(raised.raised);
  for (const float u : raised.upper) ASSERT_TRUE(std::isfinite(u));

  const Curvature nothing(6);
  const CurvatureFactor identity = factor_curvature(nothing, 0.01, 1);
  EXPECT_EQ(identity.dead, 6U);
  for (std::size_t i = 0; i < 36; ++i) EXPECT_EQ(identity.upper[i], i % 7 == 0 ? 1.0F : 0.0F);

  Curvature overflowing = sums_of(in, 1);
  overflowing.square[0] = std::numeric_limits<float>::infinity();
  EXPECT_THROW(factor_curvature(overflowing, 0.01, 1), Error);
  EXPECT_THROW(TargetSolver(overflowing, 0.1, 1), Error);
}

TEST(Curvature, TargetSolvesTheNormalEquations) {
  std::mt19937_64 random(5);
  constexpr std::uint64_t kCols = 300;
  constexpr std::uint64_t kRows = 67;
  const Inputs in = correlated_inputs(120, kCols, random);
  const Curvature sums = sums_of(in, 2);
  const std::vector<float> w = random_weights(kRows, kCols, random);
  // What the residual stream lacks, as rows of the linear's outputs.
  const std::vector<float> lack = random_weights(in.tokens, kRows, random);
  std::vector<float> residual(kRows * kCols, 0.0F);
  add_outer_products(lack.data(), kRows, kRows, in.quantised.data(), kCols, kCols, in.tokens, false, residual,
                     2);

  std::vector<float> target = w;
  TargetSolver(sums, 0.1, 2).compensate(target, kRows, residual, 2);
  std::vector<float> serial = w;
  TargetSolver(sums, 0.1, 1).compensate(serial, kRows, residual, 1);
  EXPECT_EQ(target, serial);

  Matrix h = mean_products(in.quantised, in.quantised, in.tokens, kCols, kCols);
  const Matrix cross = mean_products(in.original, in.quantised, in.tokens, kCols, kCols);
  const Matrix lacking = mean_products(lack, in.quantised, in.tokens, kRows, kCols);
  const double lambda = 0.1 * mean_diagonal(h);
  add_to_diagonal(h, lambda);
  for (const std::uint64_t row : {0U, 1U, 63U, 64U, 66U}) {
    std::vector<double> right(kCols);
    for (std::uint64_t j = 0; j < kCols; ++j) {
      right[j] = lambda * static_cast<double>(w[row * kCols + j]) + lacking[row][j];
      for (std::uint64_t k = 0; k < kCols; ++k) {
        right[j] += static_cast<double>(w[row * kCols + k]) * cross[k][j];
      }
    }
    const std::vector<double> expected = solve(h, right);
    for (std::uint64_t j = 0; j < kCols; ++j) {
      ASSERT_NEAR(static_cast<double>(target[row * kCols + j]), expected[j], 2e-4) << row << ", " << j;
    }
  }
  EXPECT_NE(target, w);
}

TEST(Curvature, TargetOfEqualInputsIsTheWeightItself) {
  std::mt19937_64 random(6);
  Inputs in = correlated_inputs(60, 90, random);
  in.original = in.quantised;
  const std::vector<float> w = random_weights(5, 90, random);
  std::vector<float> target = w;
  TargetSolver(sums_of(in, 1), 0.1, 1).compensate(target, 5, {}, 1);
  for (std::size_t i = 0; i < w.size(); ++i) ASSERT_NEAR(target[i], w[i], 1e-5F);
}

}  // namespace
}  // namespace fireq::libquant
