// Learned levels against normal-float ones on weights of known distributions, and their rules.
#include "libquant/trained_levels.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>

#include "common/error.hpp"
#include "tests/libquant/curvature_problem.hpp"

namespace fireq::libquant {
namespace {

using namespace testing_support;

constexpr std::uint64_t kRows = 96;
constexpr std::uint64_t kCols = 256;

CurvatureFactor curvature(std::mt19937_64& random, Matrix& h) {
  const Inputs in = correlated_inputs(400, kCols, random);
  Curvature sums(kCols);
  sums.add(in.quantised.data(), in.original.data(), kCols, in.tokens, 1);
  CurvatureFactor factor = factor_curvature(sums, 0.01, 1);
  h = mean_products(in.quantised, in.quantised, in.tokens, kCols, kCols);
  add_to_diagonal(h, factor.damping);
  return factor;
}

std::vector<float> draw(const std::function<double(std::mt19937_64&)>& one, std::mt19937_64& random) {
  std::vector<float> w(kRows * kCols);
  for (float& x : w) x = static_cast<float>(0.1 * one(random));
  return w;
}

// The sum over rows of e H e^T in double.
double error(const std::vector<float>& w, const CurvatureFactor& factor, const Matrix& h,
             const Levels& levels) {
  QuantizedLinear q = make_quantized_linear(kRows, kCols, levels, false);
  CurvatureQuantizerOptions options;
  options.passes = 0;
  quantize_with_curvature(w, factor, options, 2, q);
  check_quantized_linear(q);
  const ProductTable table(levels);
  std::vector<float> v(kRows * kCols);
  dequantize_rows(q, table, 0, kRows, v);
  double sum = 0;
  for (std::uint64_t row = 0; row < kRows; ++row) {
    std::vector<double> e(kCols);
    for (std::uint64_t k = 0; k < kCols; ++k) {
      e[k] = static_cast<double>(w[row * kCols + k]) - static_cast<double>(v[row * kCols + k]);
    }
    sum += quadratic(h, e);
  }
  return sum;
}

void expect_rules(const Levels& levels) {
  EXPECT_NO_THROW(check_levels(levels));
  EXPECT_EQ(levels.magnitude[7], 8.0F);
}

// Evenly spread weights, as far from normal-float levels' own as weights get: learned on some, tried on
// others.
TEST(TrainedLevels, LessenTheErrorOfWeightsThatTheyHaveNotSeen) {
  std::mt19937_64 random(41);
  Matrix h;
  const CurvatureFactor factor = curvature(random, h);
  const auto even = [](std::mt19937_64& r) { return std::uniform_real_distribution<double>(-1, 1)(r); };
  const Levels levels = train_levels(draw(even, random), kRows, factor, {}, {}, Levels::normal(), {}, 2);
  expect_rules(levels);
  // Nearer to even steps, 8 / 7.5 wide, than where they began (rounding together evens out part of it).
  const auto unevenness = [](const Levels& l) {
    double sum = 0;
    for (std::size_t i = 0; i < 8; ++i) {
      sum += std::pow(static_cast<double>(l.magnitude[i]) - (static_cast<double>(i) + 0.5) * 8 / 7.5, 2);
    }
    return sum;
  };
  EXPECT_LT(unevenness(levels), 0.8 * unevenness(Levels::normal()));
  for (int trial = 0; trial < 3; ++trial) {
    const std::vector<float> other = draw(even, random);
    EXPECT_LT(error(other, factor, h, levels), 0.95 * error(other, factor, h, Levels::normal()));
  }
}

TEST(TrainedLevels, NeverLoseOnWhatTheySaw) {
  std::mt19937_64 random(42);
  Matrix h;
  const CurvatureFactor factor = curvature(random, h);
  const auto normal = [](std::mt19937_64& r) { return std::normal_distribution<double>()(r); };
  const auto heavy = [](std::mt19937_64& r) {
    const double x = std::exponential_distribution<double>()(r);
    return (r() & 1U) != 0 ? x : -x;
  };
  for (const auto& distribution :
       {std::function<double(std::mt19937_64&)>(normal), std::function<double(std::mt19937_64&)>(heavy)}) {
    const std::vector<float> w = draw(distribution, random);
    for (const Levels& start : {Levels::normal(), Levels::int4()}) {
      const Levels levels = train_levels(w, kRows, factor, {}, {}, start, {kRows, 8}, 2);
      if (levels != start) expect_rules(levels);
      EXPECT_LE(error(w, factor, h, levels), error(w, factor, h, start) * (1 + 1e-4));
    }
  }
}

TEST(TrainedLevels, RowsWithoutWeightAreNotHeard) {
  std::mt19937_64 random(43);
  Matrix h;
  const CurvatureFactor factor = curvature(random, h);
  std::vector<float> w =
      draw([](std::mt19937_64& r) { return std::normal_distribution<double>()(r); }, random);
  std::vector<float> weight(kRows, 1.0F);
  std::fill(weight.begin() + kRows / 2, weight.end(), 0.0F);
  const LevelTraining all{kRows, 6};
  const Levels first = train_levels(w, kRows, factor, weight, {}, Levels::normal(), all, 1);
  for (std::size_t i = w.size() / 2; i < w.size(); ++i) w[i] = std::round(w[i] * 20) / 20;
  EXPECT_EQ(train_levels(w, kRows, factor, weight, {}, Levels::normal(), all, 1), first);
  EXPECT_NE(train_levels(w, kRows, factor, {}, {}, Levels::normal(), all, 1), first);
}

TEST(TrainedLevels, ThreadsDoNotMatter) {
  std::mt19937_64 random(44);
  Matrix h;
  const CurvatureFactor factor = curvature(random, h);
  const std::vector<float> w =
      draw([](std::mt19937_64& r) { return std::uniform_real_distribution<double>(-1, 1)(r); }, random);
  const Levels one = train_levels(w, kRows, factor, {}, {}, Levels::normal(), {}, 1);
  EXPECT_NE(one, Levels::normal());
  EXPECT_EQ(train_levels(w, kRows, factor, {}, {}, Levels::normal(), {}, 2), one);
  EXPECT_EQ(train_levels(w, kRows, factor, {}, {}, Levels::normal(), {}, 7), one);
}

TEST(TrainedLevels, ZerosKeepTheLevelsAndOtherShapesAreRefused) {
  std::mt19937_64 random(45);
  Matrix h;
  const CurvatureFactor factor = curvature(random, h);
  const std::vector<float> zeros(kRows * kCols, 0.0F);
  EXPECT_NO_THROW(check_levels(train_levels(zeros, kRows, factor, {}, {}, Levels::normal(), {}, 1)));
  EXPECT_THROW(train_levels(zeros, kRows + 1, factor, {}, {}, Levels::normal(), {}, 1), Error);
}

}  // namespace
}  // namespace fireq::libquant
