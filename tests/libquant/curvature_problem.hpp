// Random inputs of a linear with strong correlations, and dense algebra in double that knows no blocks.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <span>
#include <utility>
#include <vector>

namespace fireq::testing_support {

using Matrix = std::vector<std::vector<double>>;

struct Inputs {
  std::uint64_t tokens = 0, cols = 0;
  std::vector<float> quantised, original;  // [tokens, cols]
};

// Channels mix a few common directions with noise of their own; every 7th is ten times larger. The original's
// inputs are the quantised model's with a little added.
inline Inputs correlated_inputs(std::uint64_t tokens, std::uint64_t cols, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  constexpr std::uint64_t kDirections = 6;
  Matrix mix(kDirections, std::vector<double>(cols));
  for (auto& row : mix) {
    for (double& x : row) x = normal(random);
  }
  Inputs in{tokens, cols, std::vector<float>(tokens * cols), std::vector<float>(tokens * cols)};
  for (std::uint64_t t = 0; t < tokens; ++t) {
    std::vector<double> common(kDirections);
    for (double& x : common) x = normal(random);
    for (std::uint64_t c = 0; c < cols; ++c) {
      double x = 0.4 * normal(random);
      for (std::uint64_t d = 0; d < kDirections; ++d) x += common[d] * mix[d][c] * 0.5;
      if (c % 7 == 3) x *= 10;
      in.quantised[t * cols + c] = static_cast<float>(x);
      in.original[t * cols + c] = static_cast<float>(x + 0.1 * normal(random));
    }
  }
  return in;
}

inline std::vector<float> random_weights(std::uint64_t rows, std::uint64_t cols, std::mt19937_64& random) {
  std::normal_distribution<float> normal(0.0F, 0.05F);
  std::vector<float> w(rows * cols);
  for (float& x : w) x = normal(random);
  return w;
}

// a^T b / tokens.
inline Matrix mean_products(const std::vector<float>& a, const std::vector<float>& b, std::uint64_t tokens,
                            std::uint64_t na, std::uint64_t nb) {
  Matrix out(na, std::vector<double>(nb));
  for (std::uint64_t t = 0; t < tokens; ++t) {
    for (std::uint64_t i = 0; i < na; ++i) {
      for (std::uint64_t j = 0; j < nb; ++j) {
        out[i][j] += static_cast<double>(a[t * na + i]) * static_cast<double>(b[t * nb + j]) /
                     static_cast<double>(tokens);
      }
    }
  }
  return out;
}

inline double mean_diagonal(const Matrix& h) {
  double sum = 0;
  for (std::size_t i = 0; i < h.size(); ++i) sum += h[i][i];
  return sum / static_cast<double>(h.size());
}

inline void add_to_diagonal(Matrix& h, double lambda) {
  for (std::size_t i = 0; i < h.size(); ++i) h[i][i] += lambda;
}

// x a = b by elimination with pivots; a is symmetric.
inline std::vector<double> solve(Matrix a, std::vector<double> b) {
  const std::size_t n = a.size();
  for (std::size_t k = 0; k < n; ++k) {
    std::size_t pivot = k;
    for (std::size_t i = k + 1; i < n; ++i) {
      if (std::fabs(a[i][k]) > std::fabs(a[pivot][k])) pivot = i;
    }
    std::swap(a[k], a[pivot]);
    std::swap(b[k], b[pivot]);
    for (std::size_t i = k + 1; i < n; ++i) {
      const double f = a[i][k] / a[k][k];
      for (std::size_t j = k; j < n; ++j) a[i][j] -= f * a[k][j];
      b[i] -= f * b[k];
    }
  }
  for (std::size_t k = n; k-- > 0;) {
    for (std::size_t j = k + 1; j < n; ++j) b[k] -= a[k][j] * b[j];
    b[k] /= a[k][k];
  }
  return b;
}

// e h e^T for one row.
inline double quadratic(const Matrix& h, std::span<const double> e) {
  double sum = 0;
  for (std::size_t i = 0; i < h.size(); ++i) {
    for (std::size_t j = 0; j < h.size(); ++j) sum += e[i] * h[i][j] * e[j];
  }
  return sum;
}

}  // namespace fireq::testing_support
