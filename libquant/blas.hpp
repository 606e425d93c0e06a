// Row-major matrix products on OpenBLAS, which picks its loops for the CPU at run time. Internal.
//
// Every call runs on the calling thread: OpenBLAS's own threads cut a product by how many there are, and the
// sums with it. Callers share out fixed tiles instead, so that results do not depend on the thread count.
#pragma once

#include <cstddef>
#include <string>

namespace fireq::libquant::blas {

// Which library serves: "OpenBLAS 0.3.21 ..., loops for Haswell, pthread". Error(environment) when none can
// be loaded, as from every other function here.
std::string description();

enum class Op : bool { none, transpose };

// A matrix [rows, cols] inside a larger one of row stride `stride`.
template <typename T>
struct View {
  T* data = nullptr;
  std::size_t stride = 0;
  T* at(std::size_t row, std::size_t col) const noexcept { return data + row * stride + col; }
};

// c [m, n] = beta * c + alpha * op(a) [m, k] * op(b) [k, n].
void gemm(Op op_a, Op op_b, std::size_t m, std::size_t n, std::size_t k, float alpha, View<const float> a,
          View<const float> b, float beta, View<float> c);
void gemm(Op op_a, Op op_b, std::size_t m, std::size_t n, std::size_t k, double alpha, View<const double> a,
          View<const double> b, double beta, View<double> c);

// b [m, n] = b * op(u)^-1, u [n, n] upper triangular.
void solve_right_upper(Op op_u, std::size_t m, std::size_t n, View<const double> u, View<double> b);

}  // namespace fireq::libquant::blas
