// FireQ folders: the quantised matrices and the FP8 operands that they multiply.
#include <algorithm>
#include <cstring>

#include "calib/plain_tensors.hpp"
#include "calib/weights_folder.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/packing.hpp"

namespace fireq::calib {
namespace {

// Names, dtypes and shapes are checked when the folder is opened; sizes here are those the shapes promise.
template <typename T>
std::vector<T> copy_of(const TensorView& view) {
  std::vector<T> out(view.data.size() / sizeof(T));
  std::memcpy(out.data(), view.data.data(), out.size() * sizeof(T));
  return out;
}

}  // namespace

libquant::QuantizedLinear FolderWeights::quantized(std::uint64_t layer, std::size_t linear) const {
  const std::string name = formats::linear_names(layer)[linear];
  if (!is_packed(name)) {
    throw Error(ErrorKind::input, "this linear is not in 4 bits").path(reader_.folder()).tensor(name);
  }
  const auto shape = formats::linear_shape(config_, linear);
  libquant::Levels levels{quantization_->levels};
  const std::string own_levels = name + ".weight_levels";
  if (reader_.contains(own_levels)) {
    const std::vector<float> values = copy_of<float>(reader_.tensor(own_levels));
    std::copy_n(values.begin(), std::min(values.size(), levels.magnitude.size()), levels.magnitude.begin());
  }
  libquant::check_levels(levels);
  libquant::QuantizedLinear q =
      libquant::make_quantized_linear(shape[0], shape[1], levels, !quantization_->row_scale_per_row);
  q.row_scales = copy_of<float>(reader_.tensor(name + ".weight_row_scale"));
  try {
    if (quantization_->layout == formats::WeightLayout::sm90) {
      libquant::unpack_sm90(copy_of<std::uint8_t>(reader_.tensor(name + ".weight_tiles")), q);
      reader_.release(name + ".weight_tiles");
    } else {
      q.codes = copy_of<std::uint8_t>(reader_.tensor(name + ".weight_codes"));
      q.group_scales = copy_of<std::uint8_t>(reader_.tensor(name + ".weight_group_scale"));
      reader_.release(name + ".weight_codes");
    }
    libquant::check_quantized_linear(q);
  } catch (Error& error) {
    throw error.path_if_unset(reader_.folder()).tensor_if_unset(name);
  }
  return q;
}

void FolderWeights::load_operands(std::uint64_t layer, std::size_t linear, int threads,
                                  LinearWeights& out) const {
  const libquant::QuantizedLinear q = quantized(layer, linear);
  const libquant::ProductTable table(q.levels);
  constexpr std::uint64_t kRows = 64;
  out.weight.resize(q.rows * q.cols);
  parallel_for((q.rows + kRows - 1) / kRows, threads, [&](std::size_t task) {
    const std::uint64_t begin = task * kRows;
    const std::uint64_t count = std::min(kRows, q.rows - begin);
    libquant::operand_rows(q, table, begin, count,
                           std::span(out.weight).subspan(begin * q.cols, count * q.cols));
  });
  out.row_scale = q.row_scales;
}

void FolderWeights::load_fp8(const std::string& module, int threads, LinearWeights& out) const {
  const Fp8Table table(reader_, module);
  constexpr std::uint64_t kRows = 64;
  out.weight.resize(out.rows * out.cols);
  out.row_scale.resize(out.rows);
  parallel_for((out.rows + kRows - 1) / kRows, threads, [&](std::size_t task) {
    const std::uint64_t begin = task * kRows;
    const std::uint64_t count = std::min(kRows, out.rows - begin);
    table.operands(begin, count, std::span(out.weight).subspan(begin * out.cols, count * out.cols));
    for (std::uint64_t r = begin; r < begin + count; ++r) out.row_scale[r] = table.row_scale(r);
  });
}

}  // namespace fireq::calib
