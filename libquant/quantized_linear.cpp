#include "libquant/quantized_linear.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "common/checked.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::libquant {
namespace {

[[noreturn]] void broken(const char* message, std::string expected, std::string found) {
  throw Error(ErrorKind::input, message).expected(std::move(expected)).found(std::move(found));
}

std::string hex(unsigned byte) {
  constexpr char kDigits[] = "0123456789abcdef";
  return {'0', 'x', kDigits[(byte >> 4U) & 15U], kDigits[byte & 15U]};
}

std::string at(std::uint64_t row, std::uint64_t col) {
  return " at [" + std::to_string(row) + ", " + std::to_string(col) + "]";
}

void check_size(const char* what, std::uint64_t expected, std::uint64_t found) {
  if (expected != found) broken(what, std::to_string(expected), std::to_string(found));
}

// For each code of the rows, out[element] = lookup[code], where the 16 entries of a group come from make(row,
// group).
template <typename T, typename Make>
void expand_rows(const QuantizedLinear& q, std::uint64_t row_begin, std::uint64_t count, std::span<T> out,
                 const Make& make) {
  if (row_begin > q.rows || count > q.rows - row_begin || out.size() != count * q.cols) {
    throw Error(ErrorKind::internal, "rows to expand do not fit the output")
        .expected(std::to_string(count * q.cols))
        .found(std::to_string(out.size()));
  }
  const std::uint64_t groups = q.groups();
  T* to = out.data();
  for (std::uint64_t row = row_begin; row < row_begin + count; ++row) {
    const std::uint8_t* codes = q.codes.data() + row * groups * (kGroupSize / 2);
    for (std::uint64_t g = 0; g < groups; ++g, codes += kGroupSize / 2) {
      const std::array<T, 16> lookup = make(row, q.group_scales[row * groups + g] & 0x7fU);
      const std::uint64_t n = std::min(kGroupSize, q.cols - g * kGroupSize);
      for (std::uint64_t i = 0; i + 1 < n; i += 2) {
        to[i] = lookup[codes[i / 2] & 15U];
        to[i + 1] = lookup[codes[i / 2] >> 4U];
      }
      if (n % 2 == 1) to[n - 1] = lookup[codes[n / 2] & 15U];
      to += n;
    }
  }
}

}  // namespace

QuantizedLinear make_quantized_linear(std::uint64_t rows, std::uint64_t cols, const Levels& levels,
                                      bool per_tensor) {
  QuantizedLinear q;
  q.rows = rows;
  q.cols = cols;
  q.levels = levels;
  const std::uint64_t padded = checked_round_up(cols, kGroupSize, "columns of a quantised linear");
  q.codes.resize(checked_mul(rows, padded / 2, "codes of a quantised linear"));
  q.group_scales.assign(checked_mul(rows, padded / kGroupSize, "group scales of a quantised linear"), 0x01);
  q.row_scales.assign(per_tensor ? 1 : rows, 1.0F);
  return q;
}

void check_quantized_linear(const QuantizedLinear& q) {
  check_levels(q.levels);
  const std::uint64_t padded = checked_round_up(q.cols, kGroupSize, "columns of a quantised linear");
  const std::uint64_t groups = padded / kGroupSize;
  check_size("number of code bytes", checked_mul(q.rows, padded / 2, "codes of a quantised linear"),
             q.codes.size());
  check_size("number of group scales", checked_mul(q.rows, groups, "group scales of a quantised linear"),
             q.group_scales.size());
  if (q.row_scales.size() != 1) check_size("number of second-level scales", q.rows, q.row_scales.size());
  for (std::size_t i = 0; i < q.row_scales.size(); ++i) {
    if (std::isfinite(q.row_scales[i]) && q.row_scales[i] > 0) continue;
    broken("a second-level scale is impossible", "a finite number > 0",
           std::to_string(q.row_scales[i]) + " at [" + std::to_string(i) + "]");
  }
  const bool has_zero = q.levels.magnitude[0] == 0.0F;
  for (std::uint64_t row = 0; row < q.rows; ++row) {
    for (std::uint64_t g = 0; g < groups; ++g) {
      const std::uint8_t sigma = q.group_scales[row * groups + g];
      if (sigma < 0x01 || sigma > 0x7e) {
        broken("a group scale is impossible", "an E4M3 byte 0x01 .. 0x7e", hex(sigma) + at(row, g));
      }
    }
    const std::uint8_t* codes = q.codes.data() + row * (padded / 2);
    for (std::uint64_t i = 0; i < padded / 2; ++i) {
      const unsigned low = codes[i] & 15U, high = codes[i] >> 4U;
      if (has_zero && (low == 8 || high == 8)) {
        broken("code 8 (minus zero) where level 0 is 0", "codes 0 .. 7 and 9 .. 15",
               std::to_string(8) + at(row, 2 * i + (low == 8 ? 0 : 1)));
      }
      if (2 * i + 1 < q.cols) continue;
      const bool low_is_padding = 2 * i >= q.cols;
      if (high != 0 || (low_is_padding && low != 0)) {
        const bool at_low = low_is_padding && low != 0;
        broken("a padding code is not 0", "0",
               std::to_string(at_low ? low : high) + at(row, 2 * i + (at_low ? 0 : 1)));
      }
    }
  }
}

void dequantize_rows(const QuantizedLinear& q, const ProductTable& table, std::uint64_t row_begin,
                     std::uint64_t count, std::span<float> out) {
  expand_rows<float>(q, row_begin, count, out, [&](std::uint64_t row, std::size_t sigma) {
    std::array<float, 16> lookup{};
    const float r = q.row_scale(row);
    for (std::size_t i = 0; i < 8; ++i) {
      lookup[i] = r * table.value[sigma][i];
      lookup[i + 8] = -lookup[i];
    }
    return lookup;
  });
}

void operand_rows(const QuantizedLinear& q, const ProductTable& table, std::uint64_t row_begin,
                  std::uint64_t count, std::span<float> out) {
  expand_rows<float>(q, row_begin, count, out, [&](std::uint64_t, std::size_t sigma) {
    std::array<float, 16> lookup{};
    for (std::size_t i = 0; i < 8; ++i) {
      lookup[i] = table.value[sigma][i];
      lookup[i + 8] = -lookup[i];
    }
    return lookup;
  });
}

void operand_bytes(const QuantizedLinear& q, const ProductTable& table, std::uint64_t row_begin,
                   std::uint64_t count, std::span<std::uint8_t> out) {
  expand_rows<std::uint8_t>(q, row_begin, count, out, [&](std::uint64_t, std::size_t sigma) {
    std::array<std::uint8_t, 16> lookup{};
    for (std::size_t i = 0; i < 8; ++i) {
      lookup[i] = table.byte[sigma][i];
      lookup[i + 8] = static_cast<std::uint8_t>(table.byte[sigma][i] | 0x80U);
    }
    return lookup;
  });
}

}  // namespace fireq::libquant
