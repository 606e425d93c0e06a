#include "libquant/curvature.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "common/checked.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/blas.hpp"

namespace fireq::libquant {
namespace {

using blas::Op;
using blas::View;

// Fixed tiles, whatever the number of threads. 256 columns of FP64 fill a first-level cache's worth of
// panels.
constexpr std::uint64_t kTile = 256;
constexpr std::uint64_t kRowTile = 64;

std::uint64_t tiles_of(std::uint64_t n) {
  return (n + kTile - 1) / kTile;
}

struct Range {
  std::uint64_t begin, size;
};
Range tile(std::uint64_t index, std::uint64_t n) {
  return {index * kTile, std::min(kTile, n - index * kTile)};
}

struct TilePair {
  std::uint64_t row, col;
};
std::vector<TilePair> upper_tiles(std::uint64_t count) {
  std::vector<TilePair> list;
  for (std::uint64_t i = 0; i < count; ++i) {
    for (std::uint64_t j = i; j < count; ++j) list.push_back({i, j});
  }
  return list;
}

double mean_diagonal(const Curvature& sums) {
  double trace = 0;
  for (std::uint64_t i = 0; i < sums.cols; ++i) trace += static_cast<double>(sums.square[i * sums.cols + i]);
  if (!std::isfinite(trace)) {
    throw Error(ErrorKind::input, "the sums of squared activations overflow")
        .found(std::to_string(trace))
        .hint("the model's activations are too large for FP32 sums");
  }
  return sums.tokens == 0 ? 0 : trace / static_cast<double>(sums.tokens) / static_cast<double>(sums.cols);
}

// U U^T = a for one diagonal tile, in place, from the last column to the first. False when a pivot is not
// positive.
bool factor_tile(View<double> a, std::uint64_t n) {
  for (std::uint64_t j = n; j-- > 0;) {
    const double* row_j = a.at(j, 0);
    double pivot = row_j[j];
    for (std::uint64_t k = j + 1; k < n; ++k) pivot -= row_j[k] * row_j[k];
    if (!(pivot > 0) || !std::isfinite(pivot)) return false;
    const double root = std::sqrt(pivot);
    *a.at(j, j) = root;
    for (std::uint64_t i = 0; i < j; ++i) {
      double* row_i = a.at(i, 0);
      double value = row_i[j];
      for (std::uint64_t k = j + 1; k < n; ++k) value -= row_i[k] * row_j[k];
      row_i[j] = value / root;
    }
  }
  return true;
}

// H + lambda I in the upper tiles of `a` becomes its upper factor, tile by tile from the last.
bool factor_upper(std::vector<double>& a, std::uint64_t n, int threads) {
  const View<double> m{a.data(), n};
  for (std::uint64_t k = tiles_of(n); k-- > 0;) {
    const Range last = tile(k, n);
    const View<double> pivot{m.at(last.begin, last.begin), n};
    if (!factor_tile(pivot, last.size)) return false;
    for (std::uint64_t i = 1; i < last.size; ++i) std::fill_n(pivot.at(i, 0), i, 0.0);
    parallel_for(k, threads, [&](std::size_t i) {
      const Range rows = tile(i, n);
      blas::solve_right_upper(Op::transpose, rows.size, last.size, {pivot.data, n},
                              {m.at(rows.begin, last.begin), n});
    });
    const std::vector<TilePair> rest = upper_tiles(k);
    parallel_for(rest.size(), threads, [&](std::size_t t) {
      const Range rows = tile(rest[t].row, n);
      const Range cols = tile(rest[t].col, n);
      blas::gemm(Op::none, Op::transpose, rows.size, cols.size, last.size, -1.0,
                 {m.at(rows.begin, last.begin), n}, {m.at(cols.begin, last.begin), n}, 1.0,
                 {m.at(rows.begin, cols.begin), n});
    });
  }
  return true;
}

// The upper factor of H + lambda I; lambda grows until there is one.
std::vector<double> factor_damped(const Curvature& sums, double& lambda, bool& raised, int threads) {
  const std::uint64_t n = sums.cols;
  const double scale = sums.tokens == 0 ? 0 : 1 / static_cast<double>(sums.tokens);
  std::vector<double> a(checked_mul(n, n, "curvature"));
  constexpr int kTries = 8;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    parallel_for(n, threads, [&](std::size_t i) {
      for (std::uint64_t j = 0; j < n; ++j) {
        a[i * n + j] = j < i ? 0.0 : static_cast<double>(sums.square[i * n + j]) * scale;
      }
      a[i * n + i] += lambda;
    });
    if (factor_upper(a, n, threads)) return a;
    lambda *= 10;
    raised = true;
  }
  throw Error(ErrorKind::input, "the curvature of the calibration activations has no triangular factor")
      .hint("calibrate on more or other text");
}

}  // namespace

void add_outer_products(const float* a, std::size_t lda, std::uint64_t na, const float* b, std::size_t ldb,
                        std::uint64_t nb, std::uint64_t tokens, bool upper_only, std::span<float> out,
                        int threads) {
  if (out.size() != na * nb) throw Error(ErrorKind::internal, "sums of another size than their channels");
  if (tokens == 0) return;
  const std::uint64_t columns = tiles_of(nb);
  parallel_for(tiles_of(na) * columns, threads, [&](std::size_t t) {
    const std::uint64_t row = t / columns;
    const std::uint64_t col = t % columns;
    if (upper_only && col < row) return;
    const Range rows = tile(row, na);
    const Range cols = tile(col, nb);
    blas::gemm(Op::transpose, Op::none, rows.size, cols.size, tokens, 1.0F, {a + rows.begin, lda},
               {b + cols.begin, ldb}, 1.0F, {out.data() + rows.begin * nb + cols.begin, nb});
  });
}

Curvature::Curvature(std::uint64_t channels, Cross cross_sums)
    : cols(channels),
      square(checked_mul(channels, channels, "curvature"), 0.0F),
      cross(cross_sums == Cross::with ? square.size() : 0, 0.0F) {}

void Curvature::add(const float* x_q, const float* x_f, std::size_t ld, std::uint64_t count, int threads) {
  add_outer_products(x_q, ld, cols, x_q, ld, cols, count, true, square, threads);
  add_outer_products(x_f, ld, cols, x_q, ld, cols, count, false, cross, threads);
  tokens += count;
}

void Curvature::merge(const Curvature& other) {
  if (other.cols != cols || other.cross.size() != cross.size())
    throw Error(ErrorKind::internal, "curvatures of different inputs");
  for (std::size_t i = 0; i < square.size(); ++i) {
    square[i] += other.square[i];
    if (!cross.empty()) cross[i] += other.cross[i];
  }
  tokens += other.tokens;
}

CurvatureFactor factor_curvature(const Curvature& sums, double damping, int threads) {
  if (!(damping > 0)) throw Error(ErrorKind::internal, "a curvature needs damping");
  const std::uint64_t n = sums.cols;
  CurvatureFactor out;
  out.cols = n;
  const double mean = mean_diagonal(sums);
  out.damping = mean > 0 ? damping * mean : 1.0;
  const std::vector<double> upper = factor_damped(sums, out.damping, out.raised, threads);
  out.matrix.resize(n * n);
  out.upper.resize(n * n);
  const double scale = sums.tokens == 0 ? 0 : 1 / static_cast<double>(sums.tokens);
  parallel_for(n, threads, [&](std::size_t i) {
    for (std::uint64_t j = 0; j < n; ++j) {
      const auto h =
          static_cast<double>(sums.square[std::min<std::uint64_t>(i, j) * n + std::max<std::uint64_t>(i, j)]);
      out.matrix[i * n + j] = static_cast<float>(h * scale + (i == j ? out.damping : 0.0));
      out.upper[i * n + j] = static_cast<float>(upper[i * n + j]);
    }
  });
  for (std::uint64_t i = 0; i < n; ++i) out.dead += sums.square[i * n + i] == 0.0F ? 1U : 0U;
  return out;
}

TargetSolver::TargetSolver(const Curvature& sums, double ridge, int threads) : sums_(sums) {
  const double mean = mean_diagonal(sums);
  lambda_ = mean > 0 ? ridge * mean : 1.0;
  bool raised = false;
  upper_ = factor_damped(sums, lambda_, raised, threads);
}

void TargetSolver::compensate(std::span<float> w, std::uint64_t rows, std::span<const float> residual,
                              int threads) const {
  const std::uint64_t n = sums_.cols;
  if (w.size() != rows * n || (!residual.empty() && residual.size() != w.size())) {
    throw Error(ErrorKind::internal, "targets of another size than their curvature");
  }
  const double scale = sums_.tokens == 0 ? 0 : 1 / static_cast<double>(sums_.tokens);
  parallel_for((rows + kRowTile - 1) / kRowTile, threads, [&](std::size_t task) {
    const std::uint64_t begin = task * kRowTile;
    const std::uint64_t count = std::min(kRowTile, rows - begin);
    float* part = w.data() + begin * n;
    std::vector<float> product(count * n);
    blas::gemm(Op::none, Op::none, count, n, n, 1.0F, {part, n}, {sums_.cross.data(), n}, 0.0F,
               {product.data(), n});
    std::vector<double> right(count * n);
    for (std::size_t i = 0; i < right.size(); ++i) {
      auto sum = static_cast<double>(product[i]);
      if (!residual.empty()) sum += static_cast<double>(residual[begin * n + i]);
      right[i] = sum * scale + lambda_ * static_cast<double>(part[i]);
    }
    blas::solve_right_upper(Op::transpose, count, n, {upper_.data(), n}, {right.data(), n});
    blas::solve_right_upper(Op::none, count, n, {upper_.data(), n}, {right.data(), n});
    for (std::size_t i = 0; i < right.size(); ++i) part[i] = static_cast<float>(right[i]);
  });
}

}  // namespace fireq::libquant
