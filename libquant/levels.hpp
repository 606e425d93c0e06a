// Magnitude levels of 4-bit codes and the table of FP8 operands they make with a group scale.
// A code is sign (bit 3) and index i of a magnitude (bits 0-2); the multiplied operand is +-RN8(level[i] *
// sigma) (docs/numerics.md, "The product").
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace fireq::libquant {

inline constexpr std::uint64_t kGroupSize = 128;  // weights per group along K

struct Levels {
  std::array<float, 8> magnitude{};  // finite, >= 0, strictly increasing, <= 448

  static Levels int4();    // 0, 1, ... 7
  static Levels normal();  // sign-symmetric normal-float, largest 8, no zero (docs/accuracy.md)

  bool is_int4() const;
  std::string name() const;  // "int4", "normal" or "custom"
  bool operator==(const Levels&) const = default;
};

// Throws Error(input) naming the first rule that is broken.
void check_levels(const Levels& levels);

// operand[sigma][i] = RN8(levels[i] * decode(sigma)), the exact product rounded once, as an FP8 byte (sign 0)
// and as its value, for sigma bytes 0x00..0x7e (rows 0 and 0x7f are zero and never used by valid files). A
// GPU table is best copied from here: rounding the product to FP32 first can differ for levels with many
// mantissa bits.
struct ProductTable {
  std::array<std::array<std::uint8_t, 8>, 128> byte{};
  std::array<std::array<float, 8>, 128> value{};
  explicit ProductTable(const Levels& levels);
};

}  // namespace fireq::libquant
