#include "libquant/group_table.hpp"

#include <algorithm>
#include <bit>

#include "libquant/float_bits.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::libquant {
namespace {

double scale_value(unsigned code) {
  return static_cast<double>(bits::f32_from_e4m3(static_cast<std::uint8_t>(code)));
}

// kMiddle[c]: half way from the value of byte c to that of c + 1.
constexpr std::array<double, 126> kMiddle = [] {
  std::array<double, 126> middle{};
  for (std::size_t c = 0; c < middle.size(); ++c) {
    middle[c] = 0.5 * (static_cast<double>(bits::f32_from_e4m3(static_cast<std::uint8_t>(c))) +
                       static_cast<double>(bits::f32_from_e4m3(static_cast<std::uint8_t>(c + 1))));
  }
  return middle;
}();

// Bits of the smallest non-negative FP32 x with x > limit, or x >= limit when ties go up (infinity when there
// is none).
std::uint32_t first_at_or_over(double limit, bool ties_up) {
  const auto x = static_cast<float>(limit);
  const auto back = static_cast<double>(x);
  const bool next = (back < limit) | ((back == limit) & !ties_up);
  return std::min(std::bit_cast<std::uint32_t>(x) + static_cast<std::uint32_t>(next), bits::kInf);
}

// Smallest number of the 16-bit format at or over the FP32 with bits u.
std::uint16_t ceil_bf16(std::uint32_t u) {
  return static_cast<std::uint16_t>((u + 0xffffU) >> 16U);
}
std::uint16_t ceil_f16(std::uint32_t u) {
  if (u > 0x477fe000U) return 0x7c00;  // over 65504
  if (u >= 0x38800000U) return static_cast<std::uint16_t>(((u + 0x1fffU) >> 13U) - (112U << 10U));
  const float steps = std::bit_cast<float>(u) * 0x1p24F;  // exact; at most 1024
  const auto whole = static_cast<std::uint32_t>(steps);
  return static_cast<std::uint16_t>(static_cast<float>(whole) < steps ? whole + 1 : whole);
}

}  // namespace

std::uint8_t group_scale_code(double amax, double unit, double inverse_unit, std::uint8_t top) {
  const auto guess = static_cast<float>(amax * inverse_unit);
  // Nearly always the guess is a normal number, clear of every midpoint by more than its own error.
  const auto u = std::bit_cast<std::uint32_t>(guess);
  const std::uint32_t from_middle = (u - 0x80000U) & 0xfffffU;  // 0 at a midpoint of 4-bit significands
  if (u >= 0x3c800000U && u < 0x43d00000U && from_middle - 16U < 0xfffffU - 32U) {
    return static_cast<std::uint8_t>(std::min<std::uint32_t>(((u + 0x80000U) >> 20U) - (120U << 3U), top));
  }
  unsigned c = std::clamp<unsigned>(bits::e4m3_from_f32(guess), 1, top);
  // The guess was rounded more than once; exact products settle its neighbourhood. Ties go to the even code.
  while (c < top) {
    const double limit = kMiddle[c] * unit;
    if (amax < limit || (amax == limit && c % 2 == 0)) break;
    ++c;
  }
  while (c > 1) {
    const double limit = kMiddle[c - 1] * unit;
    if (amax > limit || (amax == limit && c % 2 == 0)) break;
    --c;
  }
  return static_cast<std::uint8_t>(c);
}

float row_scale_for(float row_max, float top_level) {
  constexpr std::uint32_t kSmallest = 0x3b00;  // 2^-9 = 56 / 28672
  constexpr std::uint32_t kLargest = 0x7f7f;
  const auto guess = static_cast<float>(static_cast<double>(row_max) / static_cast<double>(top_level));
  std::uint32_t b = std::clamp(std::bit_cast<std::uint32_t>(guess) >> 16U, kSmallest, kLargest);
  const auto value = [](std::uint32_t code) { return bits::f32_from_bf16(static_cast<std::uint16_t>(code)); };
  // bf16 times FP32 is exact in double.
  while (b > kSmallest &&
         static_cast<double>(value(b - 1)) * static_cast<double>(top_level) >= static_cast<double>(row_max))
    --b;
  while (b < kLargest &&
         static_cast<double>(value(b)) * static_cast<double>(top_level) < static_cast<double>(row_max))
    ++b;
  return value(b) / 56.0F;
}

float row_scale_with_top(float scale) {
  return std::max(bits::f32_from_bf16(bits::bf16_from_f32(scale)) / 56.0F, kLeastRowScale);
}

GroupTables::GroupTables(const Levels& levels, Rounding rounding, Dtype dtype, bool with_values)
    : rounding_(rounding),
      dtype_(dtype),
      with_values_(with_values),
      has_zero_(levels.magnitude[0] == 0.0F),
      products_(levels) {
  for (std::size_t j = 0; j < 7; ++j) {
    level_middle_[j] =
        0.5 * (static_cast<double>(levels.magnitude[j]) + static_cast<double>(levels.magnitude[j + 1]));
  }
}

void GroupTables::fill(std::uint8_t sigma) {
  GroupTable& table = tables_[sigma];
  made_[sigma] = true;
  const std::array<float, 8>& product = products_.value[sigma];
  const auto r = static_cast<double>(r_);
  if (rounding_ == Rounding::value) {
    const double unit = r * scale_value(sigma);
    // Threshold j leads to index j + 1; a tie goes to the even one.
    for (std::size_t j = 0; j < 7; ++j)
      table.threshold[j] = first_at_or_over(level_middle_[j] * unit, j % 2 == 1);
  } else {
    for (std::size_t j = 0; j < 7; ++j) {
      const double middle = 0.5 * (static_cast<double>(product[j]) + static_cast<double>(product[j + 1]));
      table.threshold[j] = first_at_or_over(middle * r, false);
    }
    // Where two indices have one value the lower is used: index j + 1 is only passed through on the way to j
    // + 2.
    for (std::size_t j = 7; j-- > 0;) {
      if (product[j] == product[j + 1]) table.threshold[j] = j == 6 ? bits::kInf : table.threshold[j + 1];
    }
  }
  table.threshold[7] = has_zero_ ? table.threshold[0] : 1U;
  if (with_values_) {
    for (std::size_t i = 0; i < 8; ++i) table.value[i] = r_ * product[i];
  }
  if (dtype_ == Dtype::f16) {
    for (std::size_t j = 0; j < 8; ++j) table.threshold16[j] = ceil_f16(table.threshold[j]);
  } else if (dtype_ == Dtype::bf16) {
    for (std::size_t j = 0; j < 8; ++j) table.threshold16[j] = ceil_bf16(table.threshold[j]);
  }
}

}  // namespace fireq::libquant
