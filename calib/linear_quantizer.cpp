#include "calib/linear_quantizer.hpp"

#include <algorithm>
#include <vector>

#include "common/parallel.hpp"
#include "libquant/mean_rounding.hpp"

namespace fireq::calib {
namespace {

using libquant::QuantizedLinear;
using libquant::RowScale;

constexpr std::uint64_t kRowsPerTask = 32;

// use(begin, count) for parts of the rows, side by side.
template <typename Use>
void for_row_parts(std::uint64_t rows, int threads, const Use& use) {
  parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, threads, [&](std::size_t t) {
    const std::uint64_t begin = t * kRowsPerTask;
    use(begin, std::min(kRowsPerTask, rows - begin));
  });
}

// The per-tensor search; add(search, begin, count) feeds it rows. Sums are integers: any cut gives the same
// s.
template <typename Add>
libquant::TensorScaleSearch search_tensor_scale(float threshold, std::uint64_t rows, int threads,
                                                const Add& add) {
  constexpr std::uint64_t kRows = 256;
  const libquant::TensorScaleSearch empty(threshold);
  std::vector<libquant::TensorScaleSearch> part((rows + kRows - 1) / kRows, empty);
  parallel_for(part.size(), threads,
               [&](std::size_t t) { add(part[t], t * kRows, std::min(kRows, rows - t * kRows)); });
  libquant::TensorScaleSearch total = empty;
  for (const auto& p : part) total.merge(p);
  return total;
}

}  // namespace

QuantizedLinear quantize_folded(const LinearWeights& w, const ModuleChoice& choice,
                                const InputMoments& inputs, int threads, std::uint64_t& saturated_groups) {
  const bool per_tensor = choice.weights.row_scale == RowScale::tensor;
  QuantizedLinear q = libquant::make_quantized_linear(w.rows, w.cols, choice.weights.levels, per_tensor);
  const std::span<const float> all(w.weight);
  if (per_tensor) {
    const auto add = [&](auto& search, std::uint64_t begin, std::uint64_t count) {
      search.add_rows(all.subspan(begin * w.cols, count * w.cols), count, w.cols);
    };
    const libquant::TensorScaleSearch found =
        search_tensor_scale(choice.weights.tensor_search_threshold, w.rows, threads, add);
    q.row_scales[0] = 1.0F / found.scale();
    saturated_groups = found.saturated_groups();
  }
  for_row_parts(w.rows, threads, [&](std::uint64_t begin, std::uint64_t count) {
    libquant::quantize_rows(all.subspan(begin * w.cols, count * w.cols), begin, count, choice.weights,
                            choice.weighted_search ? inputs.mean_square : std::span<const float>{}, q);
    if (choice.keep_means) {
      libquant::keep_row_means(all.subspan(begin * w.cols, count * w.cols), begin, count, inputs.mean,
                               inputs.mean_square, choice.weights.pin_top_scale, q);
    }
  });
  return q;
}

QuantizedLinear quantize_raw(const TensorView& view, const ModuleChoice& choice, const InputMoments& inputs,
                             int threads, std::uint64_t& saturated_groups) {
  const std::uint64_t rows = view.shape[0];
  const std::uint64_t cols = view.shape[1];
  const bool per_tensor = choice.weights.row_scale == RowScale::tensor;
  QuantizedLinear q = libquant::make_quantized_linear(rows, cols, choice.weights.levels, per_tensor);
  const std::uint64_t row_bytes = cols * dtype_size(view.dtype);
  if (per_tensor) {
    const auto add = [&](auto& search, std::uint64_t begin, std::uint64_t count) {
      search.add_rows_raw(view.data.subspan(begin * row_bytes, count * row_bytes), view.dtype, count, cols);
    };
    const libquant::TensorScaleSearch found =
        search_tensor_scale(choice.weights.tensor_search_threshold, rows, threads, add);
    q.row_scales[0] = 1.0F / found.scale();
    saturated_groups = found.saturated_groups();
  }
  for_row_parts(rows, threads, [&](std::uint64_t begin, std::uint64_t count) {
    libquant::quantize_rows_raw(view.data.subspan(begin * row_bytes, count * row_bytes), view.dtype, begin,
                                count, choice.weights,
                                choice.weighted_search ? inputs.mean_square : std::span<const float>{}, q);
    if (!choice.keep_means) return;
    std::vector<float> values(count * cols);
    tensor_to_float(view, begin * cols, values, true);
    libquant::keep_row_means(values, begin, count, inputs.mean, inputs.mean_square,
                             choice.weights.pin_top_scale, q);
  });
  return q;
}

libquant::Fp8Linear quantize_fp8(std::span<const float> weight, std::uint64_t rows, std::uint64_t cols,
                                 int threads) {
  libquant::Fp8Linear q = libquant::make_fp8_linear(rows, cols);
  for_row_parts(rows, threads, [&](std::uint64_t begin, std::uint64_t count) {
    libquant::quantize_fp8_rows(weight.subspan(begin * cols, count * cols), begin, count, q);
  });
  return q;
}

libquant::Fp8Linear quantize_fp8(const TensorView& view, int threads) {
  const std::uint64_t rows = view.shape.at(0);
  const std::uint64_t cols = view.shape.at(1);
  libquant::Fp8Linear q = libquant::make_fp8_linear(rows, cols);
  for_row_parts(rows, threads, [&](std::uint64_t begin, std::uint64_t count) {
    std::vector<float> values(count * cols);
    tensor_to_float(view, begin * cols, values, true);
    libquant::quantize_fp8_rows(values, begin, count, q);
  });
  return q;
}

}  // namespace fireq::calib
