#include "libquant/curvature_quantizer.hpp"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/curvature_block.hpp"

namespace fireq::libquant {
namespace {

using blas::Op;
using curvature_block::add_scaled;
using curvature_block::BlockQuantizer;
using curvature_block::dot;
using curvature_block::kRowBlock;

// Rows by themselves: the error is the sum over rows of (w - v) H (w - v)^T.
CurvatureError quantize_block(BlockQuantizer& block, const float* w, std::uint64_t groups, std::uint64_t k,
                              unsigned passes) {
  std::vector<float> gradient(block.rows() * k);
  block.begin(w, gradient.data());
  for (std::uint64_t g = 0; g < groups; ++g) {
    block.start_group(g);
    for (std::uint64_t i = 0; i < block.rows(); ++i) block.round_row(g, i, w + i * k + g * kGroupSize);
  }
  CurvatureError report;
  report.reference = block.start_descent();
  report.greedy = block.energy();
  std::vector<float> local(block.rows() * kGroupSize);
  for (unsigned pass = 0; pass < passes; ++pass) {
    for (std::uint64_t g = 0; g < groups; ++g) {
      const BlockQuantizer::Columns c = block.columns(g);
      for (std::uint64_t i = 0; i < block.rows(); ++i) {
        std::copy_n(gradient.data() + i * k + c.begin, c.size, local.data() + i * kGroupSize);
      }
      block.start_improving();
      block.improve_rows(g, 0, block.rows(), local.data());
      block.finish_improving(g, 1);
    }
    for (std::uint64_t i = 0; i < block.rows(); ++i) block.refit_row(i, {});
  }
  report.final = passes == 0 ? report.greedy : block.energy();
  block.store();
  return report;
}

// Rows together: the error is the trace of G (W - V) H (W - V)^T, G the curvature of the outputs. Blocks of
// rows and groups of columns make a grid of cells. Rounding takes the cells of one anti-diagonal at a time:
// each needs those above it and to its left alone. The descent takes cell after cell (of cells at a time each
// would spoil what the others gain: where few directions own G and H the error then grows without bound);
// threads share the matrix products.
class RowsTogether {
 public:
  RowsTogether(std::span<const float> w, const CurvatureFactor& curvature, const CurvatureFactor& outputs,
               const CurvatureQuantizerOptions& options, int threads, QuantizedLinear& out)
      : w_(w),
        outputs_(outputs),
        curvature_(curvature),
        threads_(threads),
        n_(out.rows),
        k_(out.cols),
        groups_(out.groups()),
        shared_(n_ * k_) {
    for (std::uint64_t begin = 0; begin < n_; begin += kRowBlock) {
      blocks_.push_back(
          std::make_unique<BlockQuantizer>(curvature, options, out, begin, std::min(kRowBlock, n_ - begin)));
    }
  }

  CurvatureError run(unsigned passes) {
    each_block([&](std::size_t b) { block(b).begin(w_.data() + at(b), shared_.data() + at(b)); });
    each_diagonal([&](std::size_t b, std::uint64_t g) { round(b, g); });
    each_block([&](std::size_t b) { block(b).start_descent(); });
    CurvatureError report;
    report.greedy = energy();
    for (unsigned pass = 0; pass < passes; ++pass) {
      for (std::size_t b = 0; b < blocks_.size(); ++b) {
        for (std::uint64_t g = 0; g < groups_; ++g) improve(b, g);
        refit(b);
      }
    }
    report.final = passes == 0 ? report.greedy : energy();
    each_block([&](std::size_t b) { block(b).store(); });
    report.reference = reference();
    return report;
  }

 private:
  BlockQuantizer& block(std::size_t b) { return *blocks_[b]; }
  std::uint64_t at(std::size_t b) const { return b * kRowBlock * k_; }
  const float* output_row(std::uint64_t row) const { return outputs_.matrix.data() + row * n_; }

  template <typename Body>
  void each_block(const Body& body) {
    parallel_for(blocks_.size(), threads_, body);
  }
  template <typename Body>
  void each_diagonal(const Body& body) {
    const std::uint64_t count = blocks_.size();
    for (std::uint64_t d = 0; d < count + groups_ - 1; ++d) {
      const std::uint64_t first = d < groups_ ? 0 : d - groups_ + 1;
      const std::uint64_t last = std::min(d, count - 1);
      parallel_for(last - first + 1, threads_, [&](std::size_t i) { body(first + i, d - first - i); });
    }
  }

  // With G = U U^T the error is the sum over rows i of t_i H t_i^T, t_i = sum over m <= i of U_mi (w - v)_m:
  // row i is rounded to what makes up for the rows before it. shared_ holds w - v of what is rounded.
  void round(std::size_t b, std::uint64_t g) {
    BlockQuantizer& work = block(b);
    const BlockQuantizer::Columns c = work.columns(g);
    const std::uint64_t begin = work.begin_row();
    std::vector<float> shift(work.rows() * kGroupSize, 0.0F);
    if (begin > 0) {
      blas::gemm(Op::transpose, Op::none, work.rows(), c.size, begin, 1.0F,
                 {outputs_.upper.data() + begin, n_}, {shared_.data() + c.begin, k_}, 0.0F,
                 {shift.data(), kGroupSize});
    }
    work.start_group(g);
    for (std::uint64_t i = 0; i < work.rows(); ++i) {
      float* target = shift.data() + i * kGroupSize;
      for (std::uint64_t m = 0; m < i; ++m) {
        add_scaled(outputs_.upper[(begin + m) * n_ + begin + i], shared_.data() + at(b) + m * k_ + c.begin,
                   target, c.size);
      }
      const float own = outputs_.upper[(begin + i) * n_ + begin + i];
      const float* w = w_.data() + at(b) + i * k_ + c.begin;
      for (std::uint64_t j = 0; j < c.size; ++j) target[j] = w[j] + target[j] / own;
      work.round_row(g, i, target);
      float* error = shared_.data() + at(b) + i * k_ + c.begin;
      for (std::uint64_t j = 0; j < c.size; ++j) error[j] = w[j] - work.value(i)[c.begin + j];
    }
  }

  // shared_ holds (w - v) H; area_ gets the cell's part of G (W - V) H.
  void improve(std::size_t b, std::uint64_t g) {
    BlockQuantizer& work = block(b);
    const BlockQuantizer::Columns c = work.columns(g);
    const std::uint64_t begin = work.begin_row();
    area_.resize(std::max<std::size_t>(area_.size(), kRowBlock * kGroupSize));
    constexpr std::uint64_t kRows = 16;
    parallel_for((work.rows() + kRows - 1) / kRows, threads_, [&](std::size_t task) {
      const std::uint64_t first = task * kRows;
      blas::gemm(Op::none, Op::none, std::min(kRows, work.rows() - first), c.size, n_, 1.0F,
                 {output_row(begin + first), n_}, {shared_.data() + c.begin, k_}, 0.0F,
                 {area_.data() + first * kGroupSize, kGroupSize});
    });
    std::vector<float> gradient(kGroupSize);
    std::vector<float> effect(kGroupSize);
    work.start_improving();
    for (std::uint64_t i = 0; i < work.rows(); ++i) {
      const float* row = output_row(begin + i) + begin;
      for (std::uint64_t j = 0; j < c.size; ++j) gradient[j] = area_[i * kGroupSize + j] / row[i];
      work.improve_rows(g, i, i + 1, gradient.data());
      if (i + 1 == work.rows()) break;
      blas::gemm(Op::none, Op::none, 1, c.size, c.size, 1.0F, {work.change(i), kGroupSize},
                 {curvature_.matrix.data() + c.begin * k_ + c.begin, k_}, 0.0F, {effect.data(), kGroupSize});
      for (std::uint64_t m = i + 1; m < work.rows(); ++m) {
        add_scaled(-row[m], effect.data(), area_.data() + m * kGroupSize, c.size);
      }
    }
    work.finish_improving(g, threads_);
  }

  // Row scales one after another, each given all others.
  void refit(std::size_t b) {
    BlockQuantizer& work = block(b);
    const std::uint64_t begin = work.begin_row();
    std::vector<float>& whole = area_;
    products(b, shared_.data(), whole);
    std::vector<float> lean(k_);
    std::vector<float> before(k_);
    for (std::uint64_t i = 0; i < work.rows(); ++i) {
      const float* row = output_row(begin + i) + begin;
      const float* gradient = shared_.data() + at(b) + i * k_;
      std::copy_n(gradient, k_, before.data());
      for (std::uint64_t k = 0; k < k_; ++k) lean[k] = whole[i * k_ + k] / row[i] - gradient[k];
      if (!work.refit_row(i, lean)) continue;
      for (std::uint64_t k = 0; k < k_; ++k) before[k] = gradient[k] - before[k];
      for (std::uint64_t m = i + 1; m < work.rows(); ++m) {
        add_scaled(row[m], before.data(), whole.data() + m * k_, k_);
      }
    }
  }

  // out [rows, K] = the block's rows of G times a [N, K].
  void products(std::size_t b, const float* a, std::vector<float>& out) {
    const BlockQuantizer& work = block(b);
    out.resize(std::max<std::size_t>(out.size(), work.rows() * k_));
    parallel_for(groups_, threads_, [&](std::size_t g) {
      const BlockQuantizer::Columns c = work.columns(g);
      blas::gemm(Op::none, Op::none, work.rows(), c.size, n_, 1.0F, {output_row(work.begin_row()), n_},
                 {a + c.begin, k_}, 0.0F, {out.data() + c.begin, k_});
    });
  }

  double energy() {
    double sum = 0;
    std::vector<float> whole;
    for (std::size_t b = 0; b < blocks_.size(); ++b) {
      products(b, shared_.data(), whole);
      sum += dot(block(b).errors(), whole.data(), block(b).rows() * k_);
    }
    return sum;
  }
  // Of the weights themselves; the last step, shared_ is lost.
  double reference() {
    each_block([&](std::size_t b) {
      std::copy_n(block(b).toward(0), block(b).rows() * k_, shared_.data() + at(b));
    });
    double sum = 0;
    std::vector<float> whole;
    for (std::size_t b = 0; b < blocks_.size(); ++b) {
      products(b, shared_.data(), whole);
      sum += dot(w_.data() + at(b), whole.data(), block(b).rows() * k_);
    }
    return sum;
  }

  const std::span<const float> w_;
  const CurvatureFactor& outputs_;
  const CurvatureFactor& curvature_;
  const int threads_;
  const std::uint64_t n_, k_, groups_;
  std::vector<std::unique_ptr<BlockQuantizer>> blocks_;
  std::vector<float> shared_;  // [N, K], of all blocks: w - v, then (w - v) H
  std::vector<float> area_;    // of the cell or block at work
};

}  // namespace

CurvatureError quantize_with_curvature(std::span<const float> w, const CurvatureFactor& curvature,
                                       const CurvatureQuantizerOptions& options, int threads,
                                       QuantizedLinear& out, const CurvatureFactor* outputs) {
  check_levels(out.levels);
  if (w.size() != out.rows * out.cols || curvature.cols != out.cols ||
      (outputs != nullptr && outputs->cols != out.rows) ||
      out.row_scales.size() != (options.row_scale == RowScale::row ? out.rows : 1)) {
    throw Error(ErrorKind::internal, "weights of another size than their curvature");
  }
  if (options.search_low > 0 || options.search_high < 0 || options.search_low < -126 ||
      options.search_high > 126 || options.scale_step < 0 || options.scale_step > 126) {
    throw Error(ErrorKind::usage, "the search range of group scales is impossible")
        .expected("-126 <= low <= 0 <= high <= 126")
        .found(std::to_string(options.search_low) + " .. " + std::to_string(options.search_high));
  }
  if (outputs != nullptr) {
    return RowsTogether(w, curvature, *outputs, options, threads, out).run(options.passes);
  }
  const std::uint64_t blocks = (out.rows + kRowBlock - 1) / kRowBlock;
  std::vector<CurvatureError> errors(blocks);
  parallel_for(blocks, threads, [&](std::size_t b) {
    const std::uint64_t begin = b * kRowBlock;
    BlockQuantizer block(curvature, options, out, begin, std::min(kRowBlock, out.rows - begin));
    errors[b] = quantize_block(block, w.data() + begin * out.cols, out.groups(), out.cols, options.passes);
  });
  CurvatureError total;
  for (const CurvatureError& e : errors) {
    total.reference += e.reference;
    total.greedy += e.greedy;
    total.final += e.final;
  }
  return total;
}

}  // namespace fireq::libquant
