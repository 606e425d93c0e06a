// The weight quantiser: second-level scales, group scales with their search, and codes
// (quantized_linear.hpp).
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "common/error.hpp"
#include "libquant/float_bits.hpp"
#include "libquant/group_table.hpp"
#include "libquant/number_formats.hpp"
#include "libquant/quantized_linear.hpp"
#include "libquant/row_kernels.hpp"

namespace fireq::libquant {
namespace {

constexpr std::uint8_t kTopScale = 0x7e;     // 448
constexpr std::uint8_t kTopRowScale = 0x66;  // 56 = 448 / 8
constexpr float kTopRowLevel = 8;            // 8 * 56 = 448: no product saturates

[[noreturn]] void usage(const char* message, std::string expected, std::string found) {
  throw Error(ErrorKind::usage, message).expected(std::move(expected)).found(std::move(found));
}
[[noreturn]] void internal(const char* message, std::uint64_t expected, std::uint64_t found) {
  throw Error(ErrorKind::internal, message).expected(std::to_string(expected)).found(std::to_string(found));
}

void check_options(const WeightQuantizerOptions& options) {
  check_levels(options.levels);
  if (options.search_low > 0 || options.search_high < 0 || options.search_low < -126 ||
      options.search_high > 126) {
    usage("the search range of group scales is impossible", "-126 <= low <= 0 <= high <= 126",
          std::to_string(options.search_low) + " .. " + std::to_string(options.search_high));
  }
  if (options.row_scale == RowScale::row && options.levels.magnitude[7] > kTopRowLevel) {
    usage("these levels need a per-tensor scale", "a largest level of at most 8",
          std::to_string(options.levels.magnitude[7]));
  }
}

float bits_to_float(std::uint32_t bits, Dtype dtype) {
  if (dtype == Dtype::f32) return std::bit_cast<float>(bits);
  const auto half = static_cast<std::uint16_t>(bits);
  return dtype == Dtype::f16 ? bits::f32_from_f16(half) : bits::f32_from_bf16(half);
}

// One call's state: options understood once, scratch of one row.
class RowQuantizer {
 public:
  RowQuantizer(std::uint64_t cols, Dtype dtype, const WeightQuantizerOptions& options,
               std::span<const float> column_weight)
      : options_(options),
        kernels_(kernels()),
        dtype_(dtype),
        cols_(cols),
        groups_((cols + kGroupSize - 1) / kGroupSize),
        top_(options.row_scale == RowScale::row ? kTopRowScale : kTopScale),
        searching_(options.search_low != 0 || options.search_high != 0),
        tables_(options.levels, options.rounding, dtype, searching_),
        absmax_(groups_),
        chosen_(groups_) {
    if (!searching_) return;
    magnitude_.assign(groups_ * kGroupSize, 0.0F);
    weight_.assign(groups_ * kGroupSize, 0.0F);  // the padding of K never counts: its activations are zero
    if (column_weight.empty()) {
      std::fill_n(weight_.begin(), cols_, 1.0F);
    } else {
      std::copy(column_weight.begin(), column_weight.end(), weight_.begin());
    }
    // Nearest offset first, then the lower code: the first smallest error wins.
    offsets_.push_back(0);
    for (int step = 1; step <= 126; ++step) {
      if (-step >= options.search_low) offsets_.push_back(-step);
      if (step <= options.search_high) offsets_.push_back(step);
    }
    candidates_.reserve(offsets_.size());
    codes_.reserve(offsets_.size());
    errors_.resize(offsets_.size());
  }

  // next: the row that follows, or `row` itself; only prefetched.
  void quantize(const std::byte* row, const std::byte* next, std::uint64_t index, QuantizedLinear& out) {
    const bool wide = dtype_ == Dtype::f32;
    (wide ? kernels_.group_absmax32 : kernels_.group_absmax16)(row, cols_, absmax_.data());
    const std::uint32_t largest = *std::max_element(absmax_.begin(), absmax_.end());
    if (largest >= infinity()) refuse_non_finite(row, index);

    const bool per_row = options_.row_scale == RowScale::row;
    float r = per_row ? row_scale_for(bits_to_float(largest, dtype_), options_.levels.magnitude[7])
                      : out.row_scales[0];
    if (searching_) load_magnitudes(row);
    std::uint8_t* scales = out.group_scales.data() + index * groups_;
    choose_scales(r, kNoGroup, scales);
    if (per_row && searching_ && options_.pin_top_scale) r = pin_top(r, scales);
    if (per_row) out.row_scales[index] = r;
    for (std::size_t g = 0; g < groups_; ++g) chosen_[g] = &tables_.get(scales[g]);
    (wide ? kernels_.encode_row32 : kernels_.encode_row16)(
        row, next, cols_, chosen_.data(), out.codes.data() + index * groups_ * (kGroupSize / 2));
  }

 private:
  static constexpr std::size_t kNoGroup = std::numeric_limits<std::size_t>::max();

  // The scales of all groups under r, but for `kept`.
  void choose_scales(float r, std::size_t kept, std::uint8_t* scales) {
    tables_.set_row_scale(r);
    const double unit = static_cast<double>(r) * static_cast<double>(options_.levels.magnitude[7]);
    const double inverse_unit = 1.0 / unit;
    for (std::size_t g = 0; g < groups_; ++g) {
      if (g == kept) continue;
      scales[g] = 1;  // an all-zero group
      if (absmax_[g] == 0) continue;
      scales[g] =
          group_scale_code(static_cast<double>(bits_to_float(absmax_[g], dtype_)), unit, inverse_unit, top_);
      if (searching_) scales[g] = search(g, scales[g]);
    }
  }

  // Moves r to where the largest of the scales is 56, and chooses the others again.
  float pin_top(float r, std::uint8_t* scales) {
    const std::uint8_t* const top = std::max_element(scales, scales + groups_);
    if (*top == kTopRowScale) return r;
    const float pinned = row_scale_with_top(decode_e4m3(*top) * r);
    if (pinned == r) return r;  // at its least already
    const auto group = static_cast<std::size_t>(top - scales);
    const bool least = pinned <= kLeastRowScale;
    if (!least) scales[group] = kTopRowScale;
    choose_scales(pinned, least ? kNoGroup : group, scales);
    return pinned;
  }

  std::uint32_t infinity() const noexcept {
    return dtype_ == Dtype::f32 ? bits::kInf : dtype_ == Dtype::f16 ? 0x7c00U : 0x7f80U;
  }

  void load_magnitudes(const std::byte* row) {
    if (dtype_ == Dtype::f32) {
      std::memcpy(magnitude_.data(), row, cols_ * sizeof(float));
    } else {
      (dtype_ == Dtype::f16 ? kernels_.decode_f16 : kernels_.decode_bf16)(row, magnitude_.data(), cols_);
    }
    for (std::size_t k = 0; k < cols_; ++k) magnitude_[k] = std::fabs(magnitude_[k]);
  }

  std::uint8_t search(std::size_t g, std::uint8_t base) {
    candidates_.clear();
    codes_.clear();
    for (const int offset : offsets_) {
      const int code = static_cast<int>(base) + offset;
      if (code < 1 || code > static_cast<int>(top_)) continue;
      codes_.push_back(static_cast<std::uint8_t>(code));
      candidates_.push_back(&tables_.get(static_cast<std::uint8_t>(code)));
    }
    kernels_.search_errors(magnitude_.data() + g * kGroupSize, weight_.data() + g * kGroupSize,
                           candidates_.data(), candidates_.size(), errors_.data());
    std::size_t best = 0;
    for (std::size_t c = 1; c < candidates_.size(); ++c) {
      if (errors_[c] < errors_[best]) best = c;
    }
    return codes_[best];
  }

  [[noreturn]] void refuse_non_finite(const std::byte* row, std::uint64_t index) const {
    const std::size_t size = dtype_size(dtype_);
    for (std::uint64_t k = 0; k < cols_; ++k) {
      std::uint32_t x = 0;
      std::memcpy(&x, row + k * size, size);
      const float value = bits_to_float(x, dtype_);
      if (std::isfinite(value)) continue;
      throw Error(ErrorKind::input, "a weight is not a finite number")
          .expected("finite weights")
          .found(std::string(std::isnan(value) ? "NaN" : "infinity") + " at [" + std::to_string(index) +
                 ", " + std::to_string(k) + "]");
    }
    throw Error(ErrorKind::internal, "a non-finite group maximum without a non-finite weight");
  }

  const WeightQuantizerOptions& options_;
  const RowKernels& kernels_;
  Dtype dtype_;
  std::uint64_t cols_;
  std::uint64_t groups_;
  std::uint8_t top_;
  bool searching_;
  GroupTables tables_;
  std::vector<std::uint32_t> absmax_;
  std::vector<const GroupTable*> chosen_;
  std::vector<float> magnitude_, weight_, errors_;
  std::vector<int> offsets_;
  std::vector<const GroupTable*> candidates_;
  std::vector<std::uint8_t> codes_;
};

}  // namespace

void quantize_rows_raw(std::span<const std::byte> w, Dtype dtype, std::uint64_t row_begin,
                       std::uint64_t count, const WeightQuantizerOptions& options,
                       std::span<const float> column_weight, QuantizedLinear& out) {
  check_options(options);
  if (dtype != Dtype::f32 && dtype != Dtype::f16 && dtype != Dtype::bf16) {
    throw Error(ErrorKind::input, "weights of this type cannot be quantised")
        .expected("F32, F16 or BF16")
        .found(std::string(dtype_name(dtype)));
  }
  const std::uint64_t row_bytes = out.cols * dtype_size(dtype);
  if (row_begin > out.rows || count > out.rows - row_begin)
    internal("rows out of range", out.rows, row_begin + count);
  if (w.size() != count * row_bytes) internal("bytes of weight rows", count * row_bytes, w.size());
  if (!column_weight.empty() && column_weight.size() != out.cols) {
    internal("weights of the squared error", out.cols, column_weight.size());
  }
  if (out.codes.size() != out.rows * out.padded_cols() / 2) {
    internal("bytes of codes", out.rows * out.padded_cols() / 2, out.codes.size());
  }
  if (out.group_scales.size() != out.rows * out.groups()) {
    internal("bytes of group scales", out.rows * out.groups(), out.group_scales.size());
  }
  const std::uint64_t scales = options.row_scale == RowScale::row ? out.rows : 1;
  if (out.row_scales.size() != scales) internal("second-level scales", scales, out.row_scales.size());
  if (!(out.levels == options.levels)) throw Error(ErrorKind::internal, "levels differ from the output's");
  for (const float h : column_weight) {
    if (std::isfinite(h) && h >= 0) continue;
    throw Error(ErrorKind::input, "a weight of the squared error is impossible")
        .expected("a finite number >= 0")
        .found(std::to_string(h));
  }
  if (count == 0 || out.cols == 0) return;
  if (options.row_scale == RowScale::tensor && !(std::isfinite(out.row_scales[0]) && out.row_scales[0] > 0)) {
    throw Error(ErrorKind::internal, "the per-tensor scale is not set");
  }
  RowQuantizer quantizer(out.cols, dtype, options, column_weight);
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::byte* row = w.data() + i * row_bytes;
    quantizer.quantize(row, i + 1 < count ? row + row_bytes : row, row_begin + i, out);
  }
}

void quantize_rows(std::span<const float> w, std::uint64_t row_begin, std::uint64_t count,
                   const WeightQuantizerOptions& options, std::span<const float> column_weight,
                   QuantizedLinear& out) {
  quantize_rows_raw(std::as_bytes(w), Dtype::f32, row_begin, count, options, column_weight, out);
}

// --- Per-tensor scale
// ---------------------------------------------------------------------------------------------

namespace {
// under(s) is kept in units of 2^-36: integers add up to the same sum in any order, so that the choice cannot
// depend on how the rows were cut. 2^28 groups fit.
constexpr double kUnderUnit = 0x1p36;
constexpr int kScaleCandidates = 15;
}  // namespace

TensorScaleSearch::TensorScaleSearch(float threshold) : threshold_(threshold), under_(kScaleCandidates, 0) {
  if (!(std::isfinite(threshold) && threshold > 0)) {
    usage("the threshold of the per-tensor search is impossible", "a finite number > 0",
          std::to_string(threshold));
  }
}

void TensorScaleSearch::add_rows(std::span<const float> w, std::uint64_t rows, std::uint64_t cols) {
  add_rows_raw(std::as_bytes(w), Dtype::f32, rows, cols);
}

void TensorScaleSearch::add_rows_raw(std::span<const std::byte> w, Dtype dtype, std::uint64_t rows,
                                     std::uint64_t cols) {
  if (dtype != Dtype::f32 && dtype != Dtype::f16 && dtype != Dtype::bf16) {
    throw Error(ErrorKind::input, "weights of this type cannot be quantised")
        .expected("F32, F16 or BF16")
        .found(std::string(dtype_name(dtype)));
  }
  const std::uint64_t row_bytes = cols * dtype_size(dtype);
  if (w.size() != rows * row_bytes) internal("bytes of weight rows", rows * row_bytes, w.size());
  std::vector<std::uint32_t> absmax((cols + kGroupSize - 1) / kGroupSize);
  const auto group_absmax = dtype == Dtype::f32 ? kernels().group_absmax32 : kernels().group_absmax16;
  const double m = threshold_;
  for (std::uint64_t row = 0; row < rows; ++row) {
    group_absmax(w.data() + row * row_bytes, cols, absmax.data());
    for (const std::uint32_t group : absmax) {
      const float value = bits_to_float(group, dtype);
      const float amax =
          std::isfinite(value) ? value : HUGE_VALF;  // refused with its index when it is quantised
      largest_group_max_ = std::max(largest_group_max_, amax);
      if (amax > kFp8Max) ++saturated_groups_;
      double s = 1;
      for (std::uint64_t& under : under_) {
        const double scaled = s * static_cast<double>(amax);
        if (!(scaled < m)) break;  // nor is it for a larger s
        under += static_cast<std::uint64_t>(std::llround((m - scaled) / m * kUnderUnit));
        s *= 2;
      }
    }
  }
}

void TensorScaleSearch::merge(const TensorScaleSearch& other) {
  if (threshold_ != other.threshold_)
    throw Error(ErrorKind::internal, "per-tensor searches with different thresholds");
  for (std::size_t i = 0; i < under_.size(); ++i) under_[i] += other.under_[i];
  largest_group_max_ = std::max(largest_group_max_, other.largest_group_max_);
  saturated_groups_ += other.saturated_groups_;
}

float TensorScaleSearch::scale() const {
  std::size_t best = 0;
  double s = 2;
  for (std::size_t i = 1; i < under_.size(); ++i, s *= 2) {
    if (s * static_cast<double>(largest_group_max_) > static_cast<double>(kFp8Max)) break;
    if (under_[i] < under_[best]) best = i;
  }
  return std::ldexp(1.0F, static_cast<int>(best));
}

}  // namespace fireq::libquant
