#include "libquant/levels.hpp"

#include <cmath>

#include "common/error.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::libquant {

Levels Levels::int4() {
  return {{0, 1, 2, 3, 4, 5, 6, 7}};
}

Levels Levels::normal() {
  // Phi^-1(1/2 + (i + 1/2) / 7.5 * 0.4677) over its largest, times 8, as FP32. Written out, because the bits
  // are part of the format and a library's quantile function may differ in the last one; a test recomputes
  // them.
  return {{0x1.5acfaap-2F, 0x1.064564p+0F, 0x1.bcb9cap+0F, 0x1.4018dap+1F, 0x1.ad0a16p+1F, 0x1.16eebcp+2F,
           0x1.6ba8b8p+2F, 8}};
}

bool Levels::is_int4() const {
  return *this == int4();
}

std::string Levels::name() const {
  if (is_int4()) return "int4";
  return *this == normal() ? "normal" : "custom";
}

void check_levels(const Levels& levels) {
  for (std::size_t i = 0; i < levels.magnitude.size(); ++i) {
    const float v = levels.magnitude[i];
    const std::string at = "levels[" + std::to_string(i) + "]";
    const auto fail = [&](const char* expected) {
      throw Error(ErrorKind::input, at + " breaks a rule").expected(expected).found(std::to_string(v));
    };
    if (!std::isfinite(v)) fail("a finite number");
    if (v < 0 || std::signbit(v)) fail("a number >= 0");
    if (v > kFp8Max) fail("at most 448");
    if (i > 0 && v <= levels.magnitude[i - 1]) fail("strictly increasing magnitudes");
  }
}

ProductTable::ProductTable(const Levels& levels) {
  // In FP32 the product would be rounded once more before RN8; in double it is exact (24 + 4 bits).
  for (std::size_t sigma = 0; sigma < 0x7f; ++sigma) {
    const double scale = decode_e4m3(static_cast<std::uint8_t>(sigma));
    for (std::size_t i = 0; i < 8; ++i) {
      byte[sigma][i] = encode_e4m3_from_double(static_cast<double>(levels.magnitude[i]) * scale);
      value[sigma][i] = decode_e4m3(byte[sigma][i]);
    }
  }
}

}  // namespace fireq::libquant
