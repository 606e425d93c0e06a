// The curvature quantiser against the plain one, against trying everything, and against its own promises
// recomputed in double.
#include "libquant/curvature_quantizer.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "common/error.hpp"
#include "libquant/number_formats.hpp"
#include "tests/libquant/curvature_problem.hpp"

namespace fireq::libquant {
namespace {

using namespace testing_support;

struct Problem {
  std::uint64_t rows = 0, cols = 0;
  std::vector<float> w;
  CurvatureFactor curvature;
  Matrix h;  // damped, double
};

Problem make_problem(std::uint64_t rows, std::uint64_t cols, std::uint64_t tokens, std::mt19937_64& random) {
  const Inputs in = correlated_inputs(tokens, cols, random);
  Curvature sums(cols);
  sums.add(in.quantised.data(), in.original.data(), cols, tokens, 1);
  Problem p{rows, cols, random_weights(rows, cols, random), factor_curvature(sums, 0.01, 1),
            mean_products(in.quantised, in.quantised, tokens, cols, cols)};
  add_to_diagonal(p.h, p.curvature.damping);
  return p;
}

QuantizedLinear quantise(const Problem& p, const CurvatureQuantizerOptions& options, const Levels& levels,
                         CurvatureError* error = nullptr, int threads = 1) {
  QuantizedLinear q = make_quantized_linear(p.rows, p.cols, levels, false);
  std::fill(q.codes.begin(), q.codes.end(), std::uint8_t{0x77});
  std::fill(q.row_scales.begin(), q.row_scales.end(), std::numeric_limits<float>::quiet_NaN());
  const CurvatureError e = quantize_with_curvature(p.w, p.curvature, options, threads, q);
  if (error != nullptr) *error = e;
  check_quantized_linear(q);
  return q;
}

std::vector<double> row_error(const Problem& p, const QuantizedLinear& q, std::uint64_t row) {
  const ProductTable table(q.levels);
  std::vector<float> v(p.cols);
  dequantize_rows(q, table, row, 1, v);
  std::vector<double> e(p.cols);
  for (std::uint64_t k = 0; k < p.cols; ++k)
    e[k] = static_cast<double>(p.w[row * p.cols + k]) - static_cast<double>(v[k]);
  return e;
}

double total_error(const Problem& p, const QuantizedLinear& q) {
  double sum = 0;
  for (std::uint64_t row = 0; row < p.rows; ++row) sum += quadratic(p.h, row_error(p, q, row));
  return sum;
}

TEST(CurvatureQuantizer, DiagonalCurvatureRoundsEachWeightToItsNearestOperand) {
  std::mt19937_64 random(11);
  std::uniform_real_distribution<float> size(0.1F, 9.0F);
  for (const std::uint64_t cols : {1U, 127U, 128U, 129U, 400U}) {
    for (const bool per_tensor : {false, true}) {
      const std::uint64_t rows = 70;
      const std::vector<float> w = random_weights(rows, cols, random);
      CurvatureFactor diagonal{
          cols, 0, 0.0, false, std::vector<float>(cols * cols), std::vector<float>(cols * cols)};
      std::vector<float> importance(cols);
      for (std::uint64_t k = 0; k < cols; ++k) {
        const float u = size(random);
        diagonal.upper[k * cols + k] = u;
        diagonal.matrix[k * cols + k] = importance[k] = u * u;
      }
      WeightQuantizerOptions plain;
      plain.levels = Levels::normal();
      plain.rounding = Rounding::product;
      plain.row_scale = per_tensor ? RowScale::tensor : RowScale::row;
      plain.search_low = -7;
      plain.search_high = 2;
      QuantizedLinear expected = make_quantized_linear(rows, cols, plain.levels, per_tensor);
      QuantizedLinear got = expected;
      if (per_tensor) expected.row_scales[0] = got.row_scales[0] = 0.125F;
      quantize_rows(w, 0, rows, plain, importance, expected);
      CurvatureQuantizerOptions options;
      options.row_scale = plain.row_scale;
      options.passes = 0;
      quantize_with_curvature(w, diagonal, options, 1, got);
      EXPECT_EQ(got.row_scales, expected.row_scales);
      EXPECT_EQ(got.group_scales, expected.group_scales);
      EXPECT_EQ(got.codes, expected.codes);
    }
  }
}

TEST(CurvatureQuantizer, ErrorsAreWhatTheyAreSaidToBeAndFallAtEachStep) {
  std::mt19937_64 random(12);
  for (const Levels& levels : {Levels::int4(), Levels::normal()}) {
    for (const std::uint64_t cols : {60U, 128U, 300U}) {
      const Problem p = make_problem(66, cols, 80, random);
      WeightQuantizerOptions plain;
      plain.levels = levels;
      plain.rounding = Rounding::product;
      plain.search_low = -7;
      plain.search_high = 2;
      QuantizedLinear nearest = make_quantized_linear(p.rows, cols, levels, false);
      quantize_rows(p.w, 0, p.rows, plain, {}, nearest);

      double before = total_error(p, nearest);
      for (const unsigned passes : {0U, 1U, 2U, 3U, 6U}) {
        CurvatureQuantizerOptions options;
        options.passes = passes;
        CurvatureError error;
        const QuantizedLinear q = quantise(p, options, levels, &error);
        const double now = total_error(p, q);
        EXPECT_NEAR(error.final / now, 1, 1e-3) << passes;
        EXPECT_LE(error.final, error.greedy * (1 + 1e-6));
        EXPECT_LE(now, before * (1 + 1e-5)) << passes;
        if (passes == 0) {
          EXPECT_LT(now, 0.6 * before);  // what rounding together is for
        }
        before = now;
      }
    }
  }
}

TEST(CurvatureQuantizer, ConvergesWhereNoSingleChangeHelps) {
  std::mt19937_64 random(13);
  const Problem p = make_problem(8, 150, 60, random);
  CurvatureQuantizerOptions options;
  options.passes = 60;
  const QuantizedLinear q = quantise(p, options, Levels::normal());
  const ProductTable table(q.levels);
  for (std::uint64_t row = 0; row < p.rows; ++row) {
    const std::vector<double> e = row_error(p, q, row);
    const double now = quadratic(p.h, e);
    const double r = q.row_scales[row];
    const auto value = [&](unsigned sigma, unsigned code) {
      const double m = r * static_cast<double>(table.value[sigma][code & 7U]);
      return code > 7 ? -m : m;
    };
    for (std::uint64_t g = 0; g < q.groups(); ++g) {
      const unsigned sigma = q.group_scales[row * q.groups() + g];
      const std::uint64_t end = std::min(p.cols, (g + 1) * kGroupSize);
      for (std::uint64_t k = g * kGroupSize; k < end; ++k) {
        for (unsigned code = 0; code < 16; ++code) {
          std::vector<double> other = e;
          other[k] += value(sigma, q.code(row, k)) - value(sigma, code);
          ASSERT_GE(quadratic(p.h, other), now * (1 - 1e-4)) << row << ", " << k << ": " << code;
        }
      }
      for (int offset = -2; offset <= 2; ++offset) {
        const int moved = static_cast<int>(sigma) + offset;
        if (moved < 1 || moved > 0x66) continue;
        std::vector<double> other = e;
        for (std::uint64_t k = g * kGroupSize; k < end; ++k) {
          other[k] += value(sigma, q.code(row, k)) - value(static_cast<unsigned>(moved), q.code(row, k));
        }
        ASSERT_GE(quadratic(p.h, other), now * (1 - 1e-4)) << row << ", group " << g << ": " << offset;
      }
    }
  }
}

// Every scale and every code of rows with four weights: the least error there is.
TEST(CurvatureQuantizer, ComesNearTheBestOfAll) {
  std::mt19937_64 random(14);
  double found = 0;
  double least = 0;
  for (int round = 0; round < 12; ++round) {
    const Problem p = make_problem(1, 4, 9, random);
    CurvatureQuantizerOptions options;
    options.row_low = options.row_high = 1;
    const QuantizedLinear q = quantise(p, options, Levels::normal());
    const ProductTable table(q.levels);
    double best = HUGE_VAL;
    for (unsigned sigma = 0x50; sigma <= 0x66; ++sigma) {
      for (unsigned codes = 0; codes < 65536; ++codes) {
        std::vector<double> e(4);
        for (std::size_t k = 0; k < 4; ++k) {
          const unsigned code = codes >> (4 * k) & 15U;
          const double m =
              static_cast<double>(q.row_scales[0]) * static_cast<double>(table.value[sigma][code & 7U]);
          e[k] = static_cast<double>(p.w[k]) - (code > 7 ? -m : m);
        }
        best = std::min(best, quadratic(p.h, e));
      }
    }
    const double mine = total_error(p, q);
    EXPECT_GE(mine, best * (1 - 1e-5));
    found += mine;
    least += best;
  }
  EXPECT_LT(found, 4 * least);
}

TEST(CurvatureQuantizer, StaysWithinTheFormatAndThreadsDoNotMatter) {
  std::mt19937_64 random(15);
  Problem p = make_problem(200, 260, 100, random);
  for (std::uint64_t k = 0; k < p.cols; ++k) p.w[5 * p.cols + k] = 0;  // a row of zeros
  const CurvatureQuantizerOptions options;
  const QuantizedLinear q = quantise(p, options, Levels::normal(), nullptr, 1);
  const QuantizedLinear threaded = quantise(p, options, Levels::normal(), nullptr, 7);
  EXPECT_EQ(q.codes, threaded.codes);
  EXPECT_EQ(q.group_scales, threaded.group_scales);
  EXPECT_EQ(q.row_scales, threaded.row_scales);
  bool moved = false;
  for (std::uint64_t row = 0; row < p.rows; ++row) {
    float largest = 0;
    for (std::uint64_t k = 0; k < p.cols; ++k) largest = std::max(largest, std::fabs(p.w[row * p.cols + k]));
    const float first = std::max(largest / 8 / 56, 0x1p-9F / 56);
    const float r = q.row_scales[row];
    EXPECT_EQ(round_bf16(56 * r) / 56.0F, r);
    EXPECT_GE(r, 0.79F * first);
    EXPECT_LE(r, 1.27F * first);
    moved = moved || r < 0.99F * first;  // without a refit it is rounded up
    for (std::uint64_t g = 0; g < q.groups(); ++g) EXPECT_LE(q.group_scales[row * q.groups() + g], 0x66);
  }
  EXPECT_TRUE(moved);
}

TEST(CurvatureQuantizer, RefusesWhatCannotBe) {
  std::mt19937_64 random(16);
  Problem p = make_problem(3, 30, 40, random);
  p.w[2 * p.cols + 17] = std::numeric_limits<float>::quiet_NaN();
  QuantizedLinear q = make_quantized_linear(p.rows, p.cols, Levels::normal(), false);
  try {
    quantize_with_curvature(p.w, p.curvature, {}, 1, q);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::input);
    EXPECT_EQ(e.found(), "NaN at [2, 17]");
  }
  CurvatureQuantizerOptions impossible;
  impossible.search_low = 1;
  EXPECT_THROW(quantize_with_curvature(p.w, p.curvature, impossible, 1, q), Error);
  QuantizedLinear small = make_quantized_linear(2, p.cols, Levels::normal(), false);
  EXPECT_THROW(quantize_with_curvature(p.w, p.curvature, {}, 1, small), Error);
}

TEST(CurvatureQuantizer, RowScalesStayAtOrOverTheLeast) {
  std::mt19937_64 random(29);
  Problem p = make_problem(40, 130, 60, random);
  for (std::uint64_t i = 0; i < p.w.size(); ++i) {  // r would be under the least, about it, and over it
    p.w[i] *= 0.05F + 0.005F * static_cast<float>(i / p.cols);
  }
  const float least = 0x1p-9F / 56.0F;
  std::uint64_t at_least = 0;
  const QuantizedLinear q = quantise(p, {}, Levels::normal());
  for (const float r : q.row_scales) {
    EXPECT_GE(r, least);
    at_least += r == least ? 1U : 0U;
  }
  EXPECT_GT(at_least, 0U);
}

// Curvature of `rows` outputs from random gradients with strong correlations.
CurvatureFactor output_curvature(std::uint64_t rows, std::uint64_t tokens, Matrix& g,
                                 std::mt19937_64& random) {
  const Inputs in = correlated_inputs(tokens, rows, random);
  Curvature sums(rows, Curvature::Cross::without);
  add_outer_products(in.quantised.data(), rows, rows, in.quantised.data(), rows, rows, tokens, true,
                     sums.square, 1);
  sums.tokens = tokens;
  CurvatureFactor factor = factor_curvature(sums, 0.05, 1);
  g = mean_products(in.quantised, in.quantised, tokens, rows, rows);
  add_to_diagonal(g, factor.damping);
  return factor;
}

// trace of G E H E^T.
double whole_error(const Problem& p, const Matrix& g, const QuantizedLinear& q) {
  Matrix e;
  Matrix eh;
  for (std::uint64_t row = 0; row < p.rows; ++row) {
    e.push_back(row_error(p, q, row));
    std::vector<double> product(p.cols, 0);
    for (std::uint64_t k = 0; k < p.cols; ++k) {
      for (std::uint64_t j = 0; j < p.cols; ++j) product[j] += e[row][k] * p.h[k][j];
    }
    eh.push_back(product);
  }
  double sum = 0;
  for (std::uint64_t i = 0; i < p.rows; ++i) {
    for (std::uint64_t j = 0; j < p.rows; ++j) {
      double product = 0;
      for (std::uint64_t k = 0; k < p.cols; ++k) product += eh[i][k] * e[j][k];
      sum += g[i][j] * product;
    }
  }
  return sum;
}

TEST(RowsTogether, ErrorsAreWhatTheyAreSaidToBeAndLessThanThoseOfRowsAlone) {
  std::mt19937_64 random(31);
  for (const auto& [rows, cols] : {std::pair{66U, 300U}, std::pair{130U, 60U}, std::pair{1U, 128U}}) {
    const Problem p = make_problem(rows, cols, 80, random);
    Matrix g;
    const CurvatureFactor outputs = output_curvature(rows, 90, g, random);
    CurvatureQuantizerOptions options;
    options.passes = 0;
    double before = whole_error(p, g, quantise(p, options, Levels::normal()));
    for (const unsigned passes : {0U, 1U, 3U, 8U}) {
      options.passes = passes;
      QuantizedLinear q = make_quantized_linear(rows, cols, Levels::normal(), false);
      std::fill(q.codes.begin(), q.codes.end(), std::uint8_t{0x77});
      const CurvatureError error = quantize_with_curvature(p.w, p.curvature, options, 2, q, &outputs);
      check_quantized_linear(q);
      const double now = whole_error(p, g, q);
      EXPECT_NEAR(error.final / now, 1, 1e-3) << passes;
      EXPECT_LE(error.final, error.greedy * (1 + 1e-6));
      EXPECT_LE(now, before * (1 + 1e-5)) << rows << " " << passes;
      if (rows > 1 && passes == 3) {
        EXPECT_LT(now, 0.9 * whole_error(p, g, quantise(p, {}, Levels::normal())));
      }
      before = now;
    }
  }
}

TEST(RowsTogether, UnrelatedOutputsAreRoundedAlone) {
  std::mt19937_64 random(32);
  const Problem p = make_problem(70, 200, 90, random);
  CurvatureFactor identity{70, 0, 0.0, false, std::vector<float>(70 * 70), std::vector<float>(70 * 70)};
  for (std::size_t i = 0; i < 70; ++i) identity.matrix[i * 71] = identity.upper[i * 71] = 1;
  CurvatureQuantizerOptions options;
  options.passes = 0;
  QuantizedLinear q = make_quantized_linear(70, 200, Levels::normal(), false);
  quantize_with_curvature(p.w, p.curvature, options, 1, q, &identity);
  const QuantizedLinear alone = quantise(p, options, Levels::normal());
  EXPECT_EQ(q.codes, alone.codes);
  EXPECT_EQ(q.group_scales, alone.group_scales);
}

// Where one direction owns both curvatures every cell of the grid depends on every other.
TEST(RowsTogether, DescendsWhereEverythingIsCoupled) {
  std::mt19937_64 random(33);
  const Problem p = make_problem(200, 400, 4, random);
  Matrix g;
  const CurvatureFactor outputs = output_curvature(200, 3, g, random);
  CurvatureQuantizerOptions options;
  options.passes = 5;
  QuantizedLinear q = make_quantized_linear(200, 400, Levels::normal(), false);
  const CurvatureError error = quantize_with_curvature(p.w, p.curvature, options, 4, q, &outputs);
  EXPECT_LT(error.final, error.greedy);
  EXPECT_LT(error.final, 0.01 * error.reference);
}

TEST(RowsTogether, ThreadsDoNotMatter) {
  std::mt19937_64 random(34);
  const Problem p = make_problem(200, 700, 300, random);
  Matrix g;
  const CurvatureFactor outputs = output_curvature(200, 210, g, random);
  std::vector<QuantizedLinear> list;
  for (const int threads : {1, 2, 5}) {
    list.push_back(make_quantized_linear(200, 700, Levels::normal(), false));
    quantize_with_curvature(p.w, p.curvature, {}, threads, list.back(), &outputs);
  }
  for (const QuantizedLinear& q : list) {
    EXPECT_EQ(q.codes, list[0].codes);
    EXPECT_EQ(q.group_scales, list[0].group_scales);
    EXPECT_EQ(q.row_scales, list[0].row_scales);
  }
}

TEST(RowsTogether, CurvatureOfOtherOutputsIsRefused) {
  std::mt19937_64 random(35);
  const Problem p = make_problem(10, 20, 30, random);
  Matrix g;
  const CurvatureFactor outputs = output_curvature(11, 30, g, random);
  QuantizedLinear q = make_quantized_linear(10, 20, Levels::normal(), false);
  EXPECT_THROW(quantize_with_curvature(p.w, p.curvature, {}, 1, q, &outputs), Error);
}

}  // namespace
}  // namespace fireq::libquant
