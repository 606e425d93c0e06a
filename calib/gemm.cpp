#include "calib/gemm.hpp"

#include <algorithm>

#include "calib/simd.hpp"
#include "common/checked.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"

namespace fireq::calib {
namespace {

constexpr std::uint64_t kPanelRows = simd::kPanel;
// Columns per task: enough panels for the one-row loop to keep its chains busy, few enough to share out a
// matrix of a few hundred rows.
constexpr std::uint64_t kPanelsPerTask = 4;
constexpr std::uint64_t kRowBlock = 128;

std::uint64_t panels_of(std::uint64_t rows) {
  return (rows + kPanelRows - 1) / kPanelRows;
}

void multiply_columns(const float* a, std::size_t lda, std::size_t m, const Panels& b, std::uint64_t begin,
                      std::uint64_t end, float* c, std::size_t ldc) {
  const simd::Kernels& run = simd::kernels();
  const float* panels = b.panel(begin / kPanelRows);
  if (m == 1) {
    run.gemv(a, panels, end - begin, b.cols(), c + begin);
  } else {
    run.gemm(a, lda, m, panels, kPanelRows * b.cols(), end - begin, b.cols(), c + begin, ldc, false);
  }
}

}  // namespace

Panels::Panels(std::uint64_t rows, std::uint64_t cols)
    : rows_(rows),
      cols_(cols),
      data_(checked_mul(checked_mul(panels_of(rows), kPanelRows, "matrix"), cols, "matrix"), 0.0F) {}

Panels::Panels(std::span<const float> matrix, std::uint64_t rows, std::uint64_t cols, int threads)
    : Panels(rows, cols) {
  if (matrix.size() != rows * cols) throw Error(ErrorKind::internal, "matrix of another size than its shape");
  parallel_for(panels_of(rows), threads, [&](std::size_t panel) {
    const std::uint64_t begin = panel * kPanelRows;
    const std::uint64_t count = std::min(kPanelRows, rows - begin);
    set_rows(begin, matrix.subspan(begin * cols, count * cols));
  });
}

const float* Panels::panel(std::uint64_t index) const noexcept {
  return data_.data() + index * kPanelRows * cols_;
}

void Panels::set_rows(std::uint64_t begin, std::span<const float> values) {
  const std::uint64_t count = cols_ == 0 ? 0 : values.size() / cols_;
  if (begin + count > rows_ || count * cols_ != values.size()) {
    throw Error(ErrorKind::internal, "rows outside the matrix");
  }
  // A tile of 16 columns at a time keeps the panel's lines in the cache while its 32 rows are written.
  constexpr std::uint64_t kTile = 16;
  for (std::uint64_t first = 0; first < count;) {
    const std::uint64_t row = begin + first;
    const std::uint64_t lane = row % kPanelRows;
    const std::uint64_t lanes = std::min(kPanelRows - lane, count - first);
    float* out = data_.data() + row / kPanelRows * kPanelRows * cols_ + lane;
    const float* in = values.data() + first * cols_;
    for (std::uint64_t k0 = 0; k0 < cols_; k0 += kTile) {
      const std::uint64_t k1 = std::min(k0 + kTile, cols_);
      for (std::uint64_t i = 0; i < lanes; ++i) {
        for (std::uint64_t k = k0; k < k1; ++k) out[k * kPanelRows + i] = in[i * cols_ + k];
      }
    }
    first += lanes;
  }
}

void multiply(const float* a, std::size_t lda, std::size_t m, const Panels& b, float* c, std::size_t ldc,
              int threads) {
  if (m == 0) return;
  const std::uint64_t step = kPanelsPerTask * kPanelRows;
  const std::uint64_t tasks = (b.rows() + step - 1) / step;
  if (resolve_threads(threads) == 1 || tasks < 2) {
    multiply_columns(a, lda, m, b, 0, b.rows(), c, ldc);
    return;
  }
  parallel_for(tasks, threads, [&](std::size_t task) {
    multiply_columns(a, lda, m, b, task * step, std::min((task + 1) * step, b.rows()), c, ldc);
  });
}

void gemm_nt(std::span<const float> a, std::span<const float> b, std::span<float> c, std::uint64_t m,
             std::uint64_t n, std::uint64_t k, int threads) {
  if (a.size() != checked_mul(m, k, "matrix") || b.size() != checked_mul(n, k, "matrix") ||
      c.size() != checked_mul(m, n, "matrix")) {
    throw Error(ErrorKind::internal, "matrix of another size than its shape");
  }
  if (m == 0 || n == 0) return;
  const Panels panels(b, n, k, threads);
  Pool<FloatBuffer> rows;
  const std::size_t lda = padded_stride(k);
  parallel_for((m + kRowBlock - 1) / kRowBlock, threads, [&](std::size_t block) {
    const std::uint64_t begin = block * kRowBlock;
    const std::uint64_t count = std::min(kRowBlock, m - begin);
    Pool<FloatBuffer>::Loan area(rows);
    area->resize(kRowBlock * lda);
    for (std::uint64_t i = 0; i < count; ++i) {
      std::copy_n(a.data() + (begin + i) * k, k, area->data() + i * lda);
    }
    multiply(area->data(), lda, count, panels, c.data() + begin * n, n, threads);
  });
}

}  // namespace fireq::calib
