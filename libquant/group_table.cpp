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

// Smallest non-negative FP32 x with x > limit, or x >= limit when ties go up, as bits (infinity when there is
// none).
std::uint32_t first_at_or_over(double limit, bool ties_up) {
  const auto x = static_cast<float>(limit);
  auto u = std::bit_cast<std::uint32_t>(x);
  const auto back = static_cast<double>(x);
  if (back < limit || (back == limit && !ties_up)) ++u;
  return std::min(u, bits::kInf);
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

std::uint8_t group_scale_code(double amax, double unit, std::uint8_t top) {
  unsigned c = std::clamp<unsigned>(bits::e4m3_from_f32(static_cast<float>(amax / unit)), 1, top);
  // The quotient above is rounded twice; settle the neighbourhood by exact products. Ties go to the even
  // code.
  while (c < top) {
    const double limit = 0.5 * (scale_value(c) + scale_value(c + 1)) * unit;
    if (amax < limit || (amax == limit && c % 2 == 0)) break;
    ++c;
  }
  while (c > 1) {
    const double limit = 0.5 * (scale_value(c - 1) + scale_value(c)) * unit;
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

GroupTables::GroupTables(const Levels& levels, Rounding rounding, Dtype dtype)
    : levels_(levels), rounding_(rounding), dtype_(dtype), products_(levels) {}

void GroupTables::set_row_scale(float r) noexcept {
  if (r == r_) return;
  r_ = r;
  made_.fill(false);
}

const GroupTable& GroupTables::get(std::uint8_t sigma) {
  if (!made_[sigma]) {
    fill(sigma, tables_[sigma]);
    made_[sigma] = true;
  }
  return tables_[sigma];
}

void GroupTables::fill(std::uint8_t sigma, GroupTable& table) const {
  const std::array<float, 8>& product = products_.value[sigma];
  const double r = static_cast<double>(r_);
  const double unit = r * scale_value(sigma);
  for (std::size_t i = 0; i < 8; ++i) table.value[i] = r_ * product[i];
  for (std::size_t i = 7; i > 0; --i) {
    if (rounding_ == Rounding::value) {
      const double middle =
          0.5 * (static_cast<double>(levels_.magnitude[i - 1]) + static_cast<double>(levels_.magnitude[i]));
      table.threshold[i] = first_at_or_over(middle * unit, i % 2 == 0);
    } else if (product[i] == product[i - 1]) {
      // Two indices with one value: the lower is used, so index i is only passed through on the way to i + 1.
      table.threshold[i] = i == 7 ? bits::kInf : table.threshold[i + 1];
    } else {
      const double middle = 0.5 * (static_cast<double>(product[i - 1]) + static_cast<double>(product[i]));
      table.threshold[i] = first_at_or_over(middle * r, false);
    }
  }
  table.threshold[0] = levels_.magnitude[0] == 0.0F ? table.threshold[1] : 1U;
  if (dtype_ == Dtype::f32) return;
  for (std::size_t i = 0; i < 8; ++i) {
    table.threshold16[i] =
        dtype_ == Dtype::f16 ? ceil_f16(table.threshold[i]) : ceil_bf16(table.threshold[i]);
  }
}

}  // namespace fireq::libquant
