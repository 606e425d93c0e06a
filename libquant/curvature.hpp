// The curvature of a linear's output error, and what follows from it before a weight is rounded.
//
// A linear is given X_q [n, K] (its inputs in the quantised model, rounded to FP8 as they will be) and should
// give what the original gave on X_f [n, K] (the original's inputs at the same place). For a row w of the
// original and its replacement v the squared error is, up to a constant,
//   (v - w*) H (v - w*)^T,  H = X_q^T X_q / n,
// where w* is the compensated target of docs/accuracy.md. Rounding a weight of channel j moves the error by
// row j of H: that is why the weights of a row are rounded together (curvature_quantizer.hpp).
//
// Memory for K input channels: 4 K^2 bytes for each sum; 8 K^2 more while a factor is computed. K = 14336:
// 0.8 GB a sum, 1.6 GB for a factor; K = 28672: 3.3 GB and 6.6 GB.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fireq::libquant {

// out [na, nb] += a^T b over `tokens` rows of a (row stride lda) and b (row stride ldb). upper_only: tiles
// under the diagonal are left alone (a == b). The same bits for any thread count.
void add_outer_products(const float* a, std::size_t lda, std::uint64_t na, const float* b, std::size_t ldb,
                        std::uint64_t nb, std::uint64_t tokens, bool upper_only, std::span<float> out,
                        int threads);

// Sums over calibration tokens for one input of a layer, in FP32. Mergeable: sums of parts are the sum of the
// whole to FP32 rounding.
struct Curvature {
  enum class Cross : bool { with, without };
  explicit Curvature(std::uint64_t channels, Cross cross_sums = Cross::with);

  std::uint64_t cols;         // K
  std::uint64_t tokens = 0;   // n
  std::vector<float> square;  // [K, K] sum of x_q^T x_q; tiles under the diagonal are not kept
  std::vector<float> cross;   // [K, K] sum of x_f^T x_q, or empty

  // Rows of X_q and X_f, both of row stride ld.
  void add(const float* x_q, const float* x_f, std::size_t ld, std::uint64_t count, int threads);
  void merge(const Curvature& other);
};

// H + lambda I with its triangular factor.
struct CurvatureFactor {
  std::uint64_t cols = 0;
  std::uint64_t dead = 0;     // channels whose input was always zero
  double damping = 0;         // lambda, after what was needed to make the matrix definite
  bool raised = false;        // lambda had to be more than asked for
  std::vector<float> matrix;  // [K, K] H + lambda I, whole
  std::vector<float> upper;   // [K, K] U, upper triangular, U U^T = H + lambda I; zeros below
};

// damping: lambda as a share of the mean of H's diagonal, > 0. H is positive semidefinite, so any share
// makes it definite in real arithmetic; where rounding breaks that, lambda is raised tenfold until the factor
// exists. A site that saw zeros only has lambda = 1. Error(input) when a sum is not finite.
CurvatureFactor factor_curvature(const Curvature& sums, double damping, int threads);

// Solves for compensated targets, for several linears that read the same input.
class TargetSolver {
 public:
  // ridge: lambda as a share of H's mean diagonal; it pulls w* to w.
  TargetSolver(const Curvature& sums, double ridge, int threads);

  // w* = [w (X_f^T X_q / n + lambda I) + residual / n] (H + lambda I)^-1, in place. w [rows, K]; residual
  // [rows, K] is the sum of (h_f - h_q)^T x_q, or empty: what the residual stream lacks already.
  void compensate(std::span<float> w, std::uint64_t rows, std::span<const float> residual, int threads) const;

 private:
  const Curvature& sums_;
  double lambda_ = 0;
  std::vector<double> upper_;
};

}  // namespace fireq::libquant
