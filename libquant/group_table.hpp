// Thresholds between codes for a second-level scale r and a group scale sigma. Internal to the weight
// quantiser.
//
// The quantiser is defined in real arithmetic on the stored numbers: w is a tensor element, r the stored
// FP32, sigma a decoded E4M3 byte. The index of |w| changes where |w| crosses r * m, m half way between two
// neighbours (levels times sigma for value rounding, products for product rounding). Those limits are exact
// in double for integer and normal-float levels (25 + 4 + 24 bits); an FP32 or 16-bit |w| is then compared
// with the smallest number of its own format on the upper side, so no rounding of w / (r * sigma) ever
// decides a code.
#pragma once

#include <array>
#include <cstdint>

#include "common/tensor.hpp"
#include "libquant/levels.hpp"
#include "libquant/quantized_linear.hpp"
#include "libquant/row_kernels.hpp"

namespace fireq::libquant {

// E4M3 byte of sigma = RN8(amax / unit), unit = r * top level, at least 0x01 and at most `top`. Exact
// (inverse_unit, about 1 / unit, only makes the first guess): the neighbours' midpoint times unit has at most
// 53 bits.
std::uint8_t group_scale_code(double amax, double unit, double inverse_unit, std::uint8_t top);

// r of a row: the smallest bf16 b >= row_max / top_level, at least 2^-9 and at most the largest finite bf16,
// over 56 in FP32. bf16(56 r) is b, and b / 448 * 8 is r again, which is how vLLM finds it
// (docs/checkpoint-format.md, "Export").
float row_scale_for(float row_max, float top_level);

// The least that it can be, 1 / 28672.
inline constexpr float kLeastRowScale = 0x1p-9F / 56.0F;

// r, at least kLeastRowScale, with which sigma = 56 is nearest to a group's whole scale: bf16(scale) / 56.
float row_scale_with_top(float scale);

// Tables of one r, made when first asked for: neighbouring groups share few sigma codes.
class GroupTables {
 public:
  // dtype: f16, bf16 or f32, the format that threshold16 is for. with_values: fill GroupTable::value too.
  GroupTables(const Levels& levels, Rounding rounding, Dtype dtype, bool with_values);

  void set_row_scale(float r) noexcept {  // forgets the tables if r changed
    if (r == r_) return;
    r_ = r;
    made_.fill(false);
  }
  const GroupTable& get(std::uint8_t sigma) {
    if (!made_[sigma]) fill(sigma);
    return tables_[sigma];
  }

 private:
  void fill(std::uint8_t sigma);

  Rounding rounding_;
  Dtype dtype_;
  bool with_values_;
  bool has_zero_;
  ProductTable products_;
  std::array<double, 7> level_middle_{};  // between levels j and j + 1
  float r_ = 0;
  std::array<bool, 128> made_{};
  std::array<GroupTable, 128> tables_{};
};

}  // namespace fireq::libquant
