// A quantised weight matrix in the canonical row-major layout of the checkpoint format, and its quantiser.
// Shapes: W is [rows N, cols K]; Kp = K rounded up to 128; groups = Kp / 128.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "common/tensor.hpp"
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

// Same shape with all vectors allocated (codes 0, sigma 0x01, r 1); row_scales of size rows, or 1 when
// per_tensor.
QuantizedLinear make_quantized_linear(std::uint64_t rows, std::uint64_t cols, const Levels& levels,
                                      bool per_tensor);

// Every rule of docs/checkpoint-format.md on the content (sizes, padding codes, "minus zero" where level 0 is
// 0, scale bytes, finite positive row scales). Throws Error(input).
void check_quantized_linear(const QuantizedLinear& q);

enum class RowScale : std::uint8_t { row, tensor };
// value: the level nearest to |w| / (r * sigma), ties to the even index (for integers: round half to even,
// then clamp). product: the operand RN8(level * sigma) nearest to |w| / r, ties to the smaller magnitude; of
// indices whose operands are equal the lowest. Both are decided in real arithmetic on the stored r and sigma,
// not on a rounded quotient.
enum class Rounding : std::uint8_t { value, product };

struct WeightQuantizerOptions {
  Levels levels = Levels::int4();
  RowScale row_scale = RowScale::row;
  Rounding rounding = Rounding::value;
  // sigma is searched over E4M3 codes RN8(max/top level) + [search_low, search_high] (low <= 0 <= high) that
  // are in 0x01 .. 0x7e, at most 0x66 (56) with row scales; 0, 0 = no search. The smallest sum over the true
  // columns of column_weight * (|w| - FP32(r * product))^2 wins, FP32 in a fixed order; ties: the smallest
  // |offset|, then the lower code.
  int search_low = 0;
  int search_high = 0;
  // RowScale::row: the largest group scale of every row is exactly 56, except where r is at its least, so
  // that a loader that derives r from it finds r and every scale again (vllm_scales.hpp). After the search 56
  // r = bf16(largest sigma * r), the first group of that sigma takes 56, and the others are searched again.
  bool pin_top_scale = false;
  // m of the per-tensor search (docs/numerics.md), paper 7 * 2^-9.
  float tensor_search_threshold = 7.0F * 0x1p-9F;
};

// The per-tensor scale s in {1, 2, 4 .. 2^14} for the whole tensor (docs/numerics.md, "Per-tensor scale");
// the caller streams rows in any cut and order, and may merge: sums are integers, so the result never depends
// on it. Non-finite weights count as huge here; quantize_rows refuses them with their index.
class TensorScaleSearch {
 public:
  explicit TensorScaleSearch(float threshold);
  void add_rows(std::span<const float> w, std::uint64_t rows, std::uint64_t cols);
  void add_rows_raw(std::span<const std::byte> w, Dtype dtype, std::uint64_t rows, std::uint64_t cols);
  void merge(const TensorScaleSearch& other);
  float scale() const;  // s; the stored second-level scale is r = 1/s
  // Groups with a weight beyond 448, the largest product of a level and sigma: s does not go below 1, so that
  // such weights become +-448.
  std::uint64_t saturated_groups() const noexcept { return saturated_groups_; }

 private:
  float threshold_;
  std::uint64_t saturated_groups_ = 0;
  std::vector<std::uint64_t> under_;  // per candidate, in units of 2^-36
  float largest_group_max_ = 0;
};

// Quantises rows [row_begin, row_begin + count) of a tensor into `out` (allocated for the whole tensor, with
// the same levels). `w` is [count, K]. `column_weight` is empty (all 1) or [K]: weights of the squared error
// in the sigma search (mean x^2 of each input channel), finite and >= 0. sigma = RN8(group max / (r * top
// level)), at least 2^-9. With RowScale::row, r = b / 56 in FP32, b the smallest bf16 number >= row max / top
// level and >= 2^-9 (clipped at the largest finite bf16), and sigma <= 56; levels must not exceed 8. With
// RowScale::tensor, out.row_scales[0] must be set already. Pure function of its arguments: any cut of rows
// over threads, any SIMD target gives the same bytes. Code 8 is never written where level 0 is 0, and zeros
// of either sign are positive. Throws Error(input) with found "NaN at [r, c]" ("infinity at ...") for a
// non-finite weight, r counted in the tensor; Error(usage) for options that cannot be.
void quantize_rows(std::span<const float> w, std::uint64_t row_begin, std::uint64_t count,
                   const WeightQuantizerOptions& options, std::span<const float> column_weight,
                   QuantizedLinear& out);
// The same from a tensor's bytes as they lie in a file: F16, BF16 or F32, little-endian, at any address.
// Without a search nothing is expanded to FP32 (a row is read twice, the second time from cache); with one, a
// row at a time.
void quantize_rows_raw(std::span<const std::byte> w, Dtype dtype, std::uint64_t row_begin,
                       std::uint64_t count, const WeightQuantizerOptions& options,
                       std::span<const float> column_weight, QuantizedLinear& out);

// `out` is exactly count * K; Error(internal) otherwise. The definition's reconstruction r * (+-RN8(level *
// sigma)) of rows [row_begin, row_begin+count) into [count, K].
void dequantize_rows(const QuantizedLinear& q, const ProductTable& table, std::uint64_t row_begin,
                     std::uint64_t count, std::span<float> out);
// The same without r (the FP8 operand's value), and as FP8 bytes.
void operand_rows(const QuantizedLinear& q, const ProductTable& table, std::uint64_t row_begin,
                  std::uint64_t count, std::span<float> out);
void operand_bytes(const QuantizedLinear& q, const ProductTable& table, std::uint64_t row_begin,
                   std::uint64_t count, std::span<std::uint8_t> out);

}  // namespace fireq::libquant
