// RN8 of a non-negative double by search in the value table: the definition (docs/numerics.md) on a path of
// its own, for checks. Shares nothing with libquant's conversions.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

namespace fireq::calib {

class ExactE4m3 {
 public:
  ExactE4m3() {
    for (std::size_t b = 0; b < value_.size(); ++b) {
      const auto exponent = static_cast<int>(b >> 3U);
      const auto mantissa = static_cast<double>(b & 7U);
      value_[b] = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    }
  }
  double value(std::uint8_t byte) const { return value_[byte]; }  // 0x00 .. 0x7e
  double round(double x) const { return value_[nearest(x)]; }
  std::uint8_t nearest(double x) const {
    if (x >= value_.back()) return static_cast<std::uint8_t>(value_.size() - 1);
    const auto above =
        static_cast<std::size_t>(std::upper_bound(value_.begin(), value_.end(), x) - value_.begin());
    const std::size_t below = above - 1;
    const double middle = 0.5 * (value_[below] + value_[above]);
    if (x != middle) return static_cast<std::uint8_t>(x < middle ? below : above);
    return static_cast<std::uint8_t>(below % 2 == 0 ? below : above);
  }

 private:
  std::array<double, 127> value_{};  // bytes 0x00 .. 0x7e
};

}  // namespace fireq::calib
