// A quantised weight matrix in the canonical row-major layout of the checkpoint format, and its quantiser.
// Shapes: W is [rows N, cols K]; Kp = K rounded up to 128; groups = Kp / 128.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "libquant/levels.hpp"

namespace fireq::libquant {

struct QuantizedLinear {
  std::uint64_t rows = 0;
  std::uint64_t cols = 0;  // true K, before padding
  Levels levels = Levels::int4();
  std::vector<std::uint8_t> codes;  // [rows, Kp/2], element 2i in the low nibble of byte i; padding code 0
  std::vector<std::uint8_t> group_scales;  // [rows, Kp/128], E4M3 bytes 0x01..0x7e
  std::vector<float> row_scales;           // [rows], or [1] for a per-tensor scale

  std::uint64_t padded_cols() const noexcept { return (cols + kGroupSize - 1) / kGroupSize * kGroupSize; }
  std::uint64_t groups() const noexcept { return padded_cols() / kGroupSize; }
  float row_scale(std::uint64_t row) const noexcept {
    return row_scales.size() == 1 ? row_scales[0] : row_scales[row];
  }
  std::uint8_t code(std::uint64_t row, std::uint64_t col) const noexcept {
    const std::uint8_t b = codes[row * (padded_cols() / 2) + col / 2];
    return static_cast<std::uint8_t>(col % 2 == 0 ? b & 15U : b >> 4U);
  }
};

// Same shape with all vectors allocated; row_scales of size rows, or 1 when per_tensor.
QuantizedLinear make_quantized_linear(std::uint64_t rows, std::uint64_t cols, const Levels& levels,
                                      bool per_tensor);

// Every rule of docs/checkpoint-format.md on the content (sizes, padding codes, "minus zero" where level 0 is
// 0, scale bytes, finite positive row scales). Throws Error(input).
void check_quantized_linear(const QuantizedLinear& q);

enum class RowScale : std::uint8_t { row, tensor };
enum class Rounding : std::uint8_t {
  value,
  product
};  // nearest level times unrounded sigma, or nearest RN8(level*sigma)

struct WeightQuantizerOptions {
  Levels levels = Levels::int4();
  RowScale row_scale = RowScale::row;
  Rounding rounding = Rounding::value;
  // sigma is searched over E4M3 codes RN8(max/top level) + [search_low, search_high]; 0,0 = no search.
  int search_low = 0;
  int search_high = 0;
  // m of the per-tensor search (docs/numerics.md), paper 7 * 2^-9.
  float tensor_search_threshold = 7.0F * 0x1p-9F;
};

// A row source: rows [begin, begin + count) as FP32, row-major [count, K], into `out`.
// The per-tensor scale s in {1 .. 2^14} for the whole tensor; the caller streams rows in any cut.
class TensorScaleSearch {
 public:
  explicit TensorScaleSearch(float threshold);
  void add_rows(std::span<const float> w, std::uint64_t rows, std::uint64_t cols);
  void merge(const TensorScaleSearch& other);
  float scale() const;  // s; the stored second-level scale is r = 1/s

 private:
  float threshold_;
  std::vector<double> under_;  // per candidate
  float largest_group_max_ = 0;
};

// Quantises rows [row_begin, row_begin + count) of a tensor into `out` (allocated for the whole tensor). `w`
// is [count, K]. `column_weight` is empty or [K]: weights of the squared error in the sigma search (mean x^2
// of each input channel). With RowScale::tensor, out.row_scales[0] must be set already. Pure function of its
// arguments: any cut of rows over threads gives the same bytes. Throws Error(input) with found "NaN at [r,
// c]" for a non-finite weight.
void quantize_rows(std::span<const float> w, std::uint64_t row_begin, std::uint64_t count,
                   const WeightQuantizerOptions& options, std::span<const float> column_weight,
                   QuantizedLinear& out);

// The definition's reconstruction r * (+-RN8(level * sigma)) of rows [row_begin, row_begin+count) into
// [count, K].
void dequantize_rows(const QuantizedLinear& q, const ProductTable& table, std::uint64_t row_begin,
                     std::uint64_t count, std::span<float> out);
// The same without r (the FP8 operand's value), and as FP8 bytes.
void operand_rows(const QuantizedLinear& q, const ProductTable& table, std::uint64_t row_begin,
                  std::uint64_t count, std::span<float> out);
void operand_bytes(const QuantizedLinear& q, const ProductTable& table, std::uint64_t row_begin,
                   std::uint64_t count, std::span<std::uint8_t> out);

}  // namespace fireq::libquant
