#include "libquant/blas.hpp"

#include <cblas.h>

#include <limits>

#include "common/error.hpp"

namespace fireq::libquant::blas {
namespace {

blasint size_of(std::size_t n) {
  static const bool single = [] {
    openblas_set_num_threads(1);
    return true;
  }();
  if (!single || n > static_cast<std::size_t>(std::numeric_limits<blasint>::max())) {
    throw Error(ErrorKind::internal, "a matrix is too large for this BLAS");
  }
  return static_cast<blasint>(n);
}

CBLAS_TRANSPOSE transposed(Op op) {
  return op == Op::none ? CblasNoTrans : CblasTrans;
}

}  // namespace

void gemm(Op op_a, Op op_b, std::size_t m, std::size_t n, std::size_t k, float alpha, View<const float> a,
          View<const float> b, float beta, View<float> c) {
  cblas_sgemm(CblasRowMajor, transposed(op_a), transposed(op_b), size_of(m), size_of(n), size_of(k), alpha,
              a.data, size_of(a.stride), b.data, size_of(b.stride), beta, c.data, size_of(c.stride));
}

void gemm(Op op_a, Op op_b, std::size_t m, std::size_t n, std::size_t k, double alpha, View<const double> a,
          View<const double> b, double beta, View<double> c) {
  cblas_dgemm(CblasRowMajor, transposed(op_a), transposed(op_b), size_of(m), size_of(n), size_of(k), alpha,
              a.data, size_of(a.stride), b.data, size_of(b.stride), beta, c.data, size_of(c.stride));
}

void solve_right_upper(Op op_u, std::size_t m, std::size_t n, View<const double> u, View<double> b) {
  cblas_dtrsm(CblasRowMajor, CblasRight, CblasUpper, transposed(op_u), CblasNonUnit, size_of(m), size_of(n),
              1.0, u.data, size_of(u.stride), b.data, size_of(b.stride));
}

}  // namespace fireq::libquant::blas
