#include "calib/int4_weights.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "calib/weights.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"

namespace fireq::calib {
namespace {

using formats::Int4Format;

constexpr std::uint64_t kPerWord = 8;  // codes of an int32
constexpr std::uint64_t kRowsPerTask = 64;
constexpr std::uint32_t kMiddle = 8;          // the zero of symmetric codes
constexpr std::uint32_t kOnes = 0x11111111U;  // a one in each nibble
// The nibble of a word, counted from the lowest, that holds each of its eight elements. AWQ: nibbles hold
// elements 0 2 4 6 1 3 5 7.
constexpr std::array<std::uint64_t, kPerWord> kPlainPlace{0, 1, 2, 3, 4, 5, 6, 7};
constexpr std::array<std::uint64_t, kPerWord> kAwqPlace{0, 4, 1, 5, 2, 6, 3, 7};

std::uint64_t words_of(std::uint64_t n) {
  return (n + kPerWord - 1) / kPerWord;
}

std::uint32_t nibble(std::uint32_t word, std::uint64_t index) {
  return (word >> (4 * index)) & 15U;
}

}  // namespace

std::uint32_t Int4Table::word(std::uint64_t index) const noexcept {
  std::uint32_t value = 0;
  std::memcpy(&value, codes_.data.data() + index * sizeof(value), sizeof(value));
  return value;
}

float Int4Table::weight(std::uint64_t row, std::uint64_t col, std::uint32_t code) const noexcept {
  const std::uint64_t g = group_[col];
  const bool by_row = format_ == Int4Format::compressed_tensors;
  return scale_[by_row ? row * groups_ + g : g * rows_ + row] *
         (static_cast<float>(code) - zero_[g * rows_ + row]);
}

void Int4Table::values(std::uint64_t begin, std::span<float> out) const {
  const std::uint64_t end = begin + out.size() / cols_;
  switch (format_) {
    case Int4Format::compressed_tensors:
      return compressed_tensors_rows(begin, end, out);
    case Int4Format::gptq:
      return gptq_rows(begin, end, out);
    case Int4Format::awq:
      return awq_rows(begin, end, out);
  }
}

void Int4Table::compressed_tensors_rows(std::uint64_t begin, std::uint64_t end, std::span<float> out) const {
  for (std::uint64_t row = begin; row < end; ++row) {
    for (std::uint64_t k = 0; k < cols_; ++k) {
      const std::uint32_t code = nibble(word(row * words_of(cols_) + k / kPerWord), k % kPerWord);
      out[(row - begin) * cols_ + k] = weight(row, k, code);
    }
  }
}

void Int4Table::gptq_rows(std::uint64_t begin, std::uint64_t end, std::span<float> out) const {
  for (std::uint64_t k = 0; k < cols_; ++k) {
    for (std::uint64_t row = begin; row < end; ++row) {
      const std::uint32_t code = nibble(word(k / kPerWord * rows_ + row), k % kPerWord);
      out[(row - begin) * cols_ + k] = weight(row, k, code);
    }
  }
}

void Int4Table::awq_rows(std::uint64_t begin, std::uint64_t end, std::span<float> out) const {
  for (std::uint64_t k = 0; k < cols_; ++k) {
    for (std::uint64_t row = begin; row < end; ++row) {
      const std::uint32_t code = nibble(word((k * rows_ + row) / kPerWord), kAwqPlace[row % kPerWord]);
      out[(row - begin) * cols_ + k] = weight(row, k, code);
    }
  }
}

std::vector<std::string> int4_parts(const formats::CheckpointReader& reader, const std::string& module) {
  std::vector<std::string> out;
  for (const char* part : {".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_g_idx",
                           ".weight_shape", ".qweight", ".scales", ".qzeros", ".g_idx"}) {
    if (reader.contains(module + part)) out.push_back(module + part);
  }
  return out;
}

std::optional<Dtype> int4_scale_dtype(const formats::CheckpointReader& reader, const std::string& module) {
  for (const char* part : {".weight_scale", ".scales"}) {
    if (reader.contains(module + part)) return reader.tensor(module + part).dtype;
  }
  return std::nullopt;
}

Int4Weights::Names Int4Weights::names(const std::string& module) const {
  if (scheme_.format == Int4Format::compressed_tensors)
    return {module + ".weight_packed", module + ".weight_scale", module + ".weight_zero_point",
            module + ".weight_g_idx"};
  return {module + ".qweight", module + ".scales", module + ".qzeros", module + ".g_idx"};
}

bool Int4Weights::holds(const std::string& module) const {
  const Names n = names(module);
  // A plain weight beside nothing else is a module that was left alone; any part of the packed ones counts,
  // so that one that is missing is named.
  return reader_.contains(n.codes) ||
         (!reader_.contains(module + ".weight") && (reader_.contains(n.scales) || reader_.contains(n.zeros)));
}

std::uint64_t Int4Weights::groups_of(std::uint64_t cols) const {
  return scheme_.group_size == 0 ? 1 : (cols + scheme_.group_size - 1) / scheme_.group_size;
}

void Int4Weights::check(const std::string& module, std::uint64_t rows, std::uint64_t cols) const {
  const auto require = [&](const std::string& name, std::vector<std::uint64_t> shape, bool integers) {
    if (!reader_.contains(name)) {
      throw Error(ErrorKind::input, "a part of a quantised linear is missing")
          .path(reader_.folder())
          .tensor(name)
          .expected(shape_text(shape))
          .found("nothing");
    }
    const TensorView view = reader_.tensor(name);
    if (view.shape != shape) {
      throw Error(ErrorKind::input, "a part of a quantised linear has another shape than config.json says")
          .path(reader_.file_of(name))
          .tensor(name)
          .expected(shape_text(shape))
          .found(shape_text(view.shape));
    }
    const bool floats = view.dtype == Dtype::f16 || view.dtype == Dtype::bf16 || view.dtype == Dtype::f32;
    if (integers ? view.dtype != Dtype::i32 : !floats) {
      throw Error(ErrorKind::input, "a part of a quantised linear has another type")
          .path(reader_.file_of(name))
          .tensor(name)
          .expected(integers ? "I32" : "F16, BF16 or F32")
          .found(std::string(dtype_name(view.dtype)));
    }
  };
  const Names n = names(module);
  const std::uint64_t groups = groups_of(cols);
  const bool compressed = scheme_.format == Int4Format::compressed_tensors;
  // compressed-tensors fills the last word of a row; AWQ has no words along K.
  const bool whole_rows = compressed || rows % kPerWord == 0;
  if (!whole_rows || (scheme_.format == Int4Format::gptq && cols % kPerWord != 0)) {
    throw Error(ErrorKind::input, "a quantised linear whose sizes are no multiples of 8")
        .path(reader_.folder())
        .tensor(module)
        .found(shape_text(std::array{rows, cols}));
  }
  if (compressed) {
    require(n.codes, {rows, words_of(cols)}, true);
    require(n.scales, {rows, groups}, false);
    if (scheme_.zero_points) require(n.zeros, {words_of(rows), groups}, true);
    const std::string shape = module + ".weight_shape";
    if (reader_.contains(shape)) {
      const TensorView view = reader_.tensor(shape);
      std::array<std::int64_t, 2> stored{};
      const bool fits = view.dtype == Dtype::i64 && view.data.size() == sizeof(stored);
      if (fits) std::memcpy(stored.data(), view.data.data(), sizeof(stored));
      if (!fits || !std::cmp_equal(stored[0], rows) || !std::cmp_equal(stored[1], cols)) {
        throw Error(ErrorKind::input, "weight_shape says something else than config.json")
            .path(reader_.file_of(shape))
            .tensor(shape)
            .expected(shape_text(std::array{rows, cols}))
            .found(fits ? "[" + std::to_string(stored[0]) + ", " + std::to_string(stored[1]) + "]"
                        : std::string(dtype_name(view.dtype)) + " " + shape_text(view.shape));
      }
    }
  } else {
    const bool awq = scheme_.format == Int4Format::awq;
    require(n.codes, awq ? std::vector{cols, rows / kPerWord} : std::vector{cols / kPerWord, rows}, true);
    require(n.scales, {groups, rows}, false);
    if (scheme_.zero_points || reader_.contains(n.zeros)) require(n.zeros, {groups, rows / kPerWord}, true);
  }
  const bool indexed = scheme_.format != Int4Format::awq && reader_.contains(n.groups);
  if (indexed || (scheme_.any_order && groups > 1)) require(n.groups, {cols}, true);
}

std::vector<std::uint32_t> Int4Weights::words(const std::string& name) const {
  const TensorView view = reader_.tensor(name);
  std::vector<std::uint32_t> out(view.elements());
  std::memcpy(out.data(), view.data.data(), out.size() * sizeof(std::uint32_t));
  return out;
}

std::vector<std::uint64_t> Int4Weights::group_of_column(const std::string& name, std::uint64_t cols) const {
  std::vector<std::uint64_t> out(cols);
  if (scheme_.format == Int4Format::awq || !reader_.contains(name)) {
    for (std::uint64_t k = 0; k < cols; ++k) out[k] = scheme_.group_size == 0 ? 0 : k / scheme_.group_size;
    return out;
  }
  const std::vector<std::uint32_t> index = words(name);
  for (std::uint64_t k = 0; k < cols; ++k) {
    if (index[k] >= groups_of(cols)) {
      throw Error(ErrorKind::input, "a column belongs to a group that is not there")
          .path(reader_.file_of(name))
          .tensor(name)
          .expected("0 to " + std::to_string(groups_of(cols) - 1))
          .found(std::to_string(static_cast<std::int32_t>(index[k])) + " at index " + std::to_string(k));
    }
    out[k] = index[k];
  }
  return out;
}

// Zeros of a model that says it is symmetric: tools disagree on the convention and label files wrongly, but
// either way all are alike.
void Int4Weights::require_middle(const std::string& name, const std::vector<std::uint32_t>& packed) const {
  const std::uint32_t first = packed.empty() ? kMiddle : nibble(packed.front(), 0);
  const bool alike =
      std::all_of(packed.begin(), packed.end(), [&](std::uint32_t w) { return w == first * kOnes; });
  const bool gptq = scheme_.format == Int4Format::gptq;
  if (alike && (first == kMiddle || (gptq && first == kMiddle - 1))) return;
  throw Error(ErrorKind::input, "zero points of a symmetric model are not all in the middle")
      .path(reader_.file_of(name))
      .tensor(name)
      .expected(gptq ? "7, or 8, throughout" : "8 throughout")
      .found(alike ? std::to_string(first) : "others")
      .hint(gptq ? "set sym: false in quantization_config if the model is not symmetric"
                 : "set zero_point: true in quantization_config if the model is not symmetric");
}

// Zero points [groups, rows].
std::vector<float> Int4Weights::offsets(const std::string& name, std::uint64_t rows,
                                        std::uint64_t groups) const {
  std::vector<float> out(groups * rows, static_cast<float>(kMiddle));
  if (!scheme_.zero_points && !(scheme_.symmetric && reader_.contains(name))) return out;
  std::vector<std::uint32_t> packed = words(name);
  if (scheme_.symmetric) {
    require_middle(name, packed);
    return out;
  }
  if (scheme_.zero_plus_one) {
    // On whole words, as they were taken off: a zero of 0 has borrowed from its neighbour.
    for (std::uint32_t& word : packed) word += kOnes;
  }
  const bool compressed = scheme_.format == Int4Format::compressed_tensors;
  const std::array<std::uint64_t, kPerWord>& place =
      scheme_.format == Int4Format::awq ? kAwqPlace : kPlainPlace;
  for (std::uint64_t g = 0; g < groups; ++g) {
    for (std::uint64_t n = 0; n < rows; ++n) {
      // compressed-tensors packs along the rows of [rows, groups], the others along those of [groups, rows].
      const std::uint32_t word =
          compressed ? packed[n / kPerWord * groups + g] : packed[(g * rows + n) / kPerWord];
      out[g * rows + n] = static_cast<float>(nibble(word, place[n % kPerWord]));
    }
  }
  return out;
}

Int4Table Int4Weights::table(const std::string& module, std::uint64_t rows, std::uint64_t cols) const {
  const Names n = names(module);
  Int4Table out;
  out.format_ = scheme_.format;
  out.rows_ = rows;
  out.cols_ = cols;
  out.groups_ = groups_of(cols);
  out.group_ = group_of_column(n.groups, cols);
  out.zero_ = offsets(n.zeros, rows, out.groups_);
  out.scale_.resize(rows * out.groups_);
  try {
    tensor_to_float(reader_.tensor(n.scales), 0, out.scale_, true);
  } catch (Error& error) {
    throw error.path_if_unset(reader_.file_of(n.scales));
  }
  out.codes_ = reader_.tensor(n.codes);
  return out;
}

std::vector<float> Int4Weights::load(const std::string& module, std::uint64_t rows, std::uint64_t cols,
                                     int threads) const {
  const Int4Table whole = table(module, rows, cols);
  std::vector<float> out(rows * cols);
  parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, threads, [&](std::size_t task) {
    const std::uint64_t begin = task * kRowsPerTask, count = std::min(rows - begin, kRowsPerTask);
    whole.values(begin, std::span(out).subspan(begin * cols, count * cols));
  });
  return out;
}

void Int4Weights::release(const std::string& module) const {
  const Names n = names(module);
  for (const std::string& name : {n.codes, n.scales, n.zeros, n.groups}) reader_.release(name);
}

}  // namespace fireq::calib
