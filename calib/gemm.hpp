// C[m, n] = sum_k A[m, k] * B[n, k] in FP32, B a weight matrix. Each element is one chain of multiply-adds
// over ascending k: the same bits for any thread count and any cut into calls (docs/forward-pass.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "calib/buffer.hpp"

namespace fireq::calib {

// A [rows, cols] matrix in the order in which the inner loops read it (simd.hpp, "Panels"). Packed once, used
// for every block of tokens.
class Panels {
 public:
  Panels() = default;
  Panels(std::uint64_t rows, std::uint64_t cols);  // zeros
  Panels(std::span<const float> matrix, std::uint64_t rows, std::uint64_t cols, int threads);

  // Rows [begin, begin + values.size() / cols). Different threads may write different panels of 32 rows.
  void set_rows(std::uint64_t begin, std::span<const float> values);

  std::uint64_t rows() const noexcept { return rows_; }
  std::uint64_t cols() const noexcept { return cols_; }
  std::uint64_t bytes() const noexcept { return data_.size() * sizeof(float); }
  const float* panel(std::uint64_t index) const noexcept;  // rows [32 * index, ...)

 private:
  std::uint64_t rows_ = 0;
  std::uint64_t cols_ = 0;
  FloatBuffer data_;
};

// c[m, b.rows()] = a[m, b.cols()] * b^T; row strides lda and ldc (in floats). Threads share the columns;
// inside another parallel_for it runs on the calling thread.
void multiply(const float* a, std::size_t lda, std::size_t m, const Panels& b, float* c, std::size_t ldc,
              int threads);

// The same from row-major matrices: a [m, k], b [n, k], c [m, n].
void gemm_nt(std::span<const float> a, std::span<const float> b, std::span<float> c, std::uint64_t m,
             std::uint64_t n, std::uint64_t k, int threads);

}  // namespace fireq::calib
