// Where a weight's code and scale sit in either layout, for host and device code that goes element by
// element. Four codes with k a multiple of 4 ("a quad") are the smallest piece that both layouts keep
// together.
#pragma once

#include <cstdint>

#include "kernels/sm90_layout.hpp"
#include "kernels/split_plan.hpp"
#include "kernels/types.hpp"

namespace fireq::kernels {

// Byte offset in the tiles of the 32-bit word with the codes of row n, column k (k % 4 == 0), and which half
// of it (0: codes 0-3).
struct WordPlace {
  std::uint64_t offset;
  std::uint32_t half;
};
FIREQ_HOST_DEVICE WordPlace sm90_word(std::uint64_t n, std::uint64_t k, std::uint64_t groups) {
  const std::uint64_t tile = n / kTileRows * groups + k / kGroup;
  const auto row = static_cast<std::uint32_t>(n % kHalfRows);
  const auto column = static_cast<std::uint32_t>(k % kGroup);
  const std::uint32_t q = column / 32 * 2 + row % 16 / 8;
  const std::uint32_t thread = row / 16 * 32 + row % 8 * 4 + column % 16 / 4;
  return {tile * kTileBytes + n % kTileRows / kHalfRows * kHalfBytes + q / 4 * 2048 + thread * 16 + q % 4 * 4,
          column % 32 / 16};
}
FIREQ_HOST_DEVICE std::uint64_t sm90_scale(std::uint64_t n, std::uint64_t group, std::uint64_t groups) {
  const std::uint64_t tile = n / kTileRows * groups + group;
  const auto row = static_cast<std::uint32_t>(n % kHalfRows);
  return tile * kTileBytes + n % kTileRows / kHalfRows * kHalfBytes + kHalfCodeBytes +
         (row / 16 * 8 + row % 8) * 2 + row % 16 / 8;
}

// A word of the sm90 layout and its two quads (16 bits each: four nibbles, sign in bit 3, lowest k lowest).
FIREQ_HOST_DEVICE std::uint32_t join_quads(std::uint32_t first, std::uint32_t second) {
  std::uint32_t word = (first & 0x7777U) | ((second & 0x7777U) << 16U);
  for (std::uint32_t i = 0; i < 4; ++i) {
    word |= (first >> (4 * i + 3) & 1U) << (8 * i + 7);
    word |= (second >> (4 * i + 3) & 1U) << (8 * i + 3);
  }
  return word;
}
FIREQ_HOST_DEVICE std::uint32_t split_quad(std::uint32_t word, std::uint32_t half) {
  std::uint32_t quad = (half == 0 ? word : word >> 16U) & 0x7777U;
  const std::uint32_t sign = half == 0 ? 7 : 3;
  for (std::uint32_t i = 0; i < 4; ++i) quad |= (word >> (8 * i + sign) & 1U) << (4 * i + 3);
  return quad;
}

// n < N and k < Kp, k % 4 == 0.
FIREQ_HOST_DEVICE std::uint32_t load_quad(const WeightRef& w, std::uint64_t n, std::uint64_t k) {
  const std::uint64_t groups = (w.cols + kGroup - 1) / kGroup;
  if (w.layout == WeightLayout::row) {
    const std::uint8_t* p = w.codes + n * (groups * kGroup / 2) + k / 2;
#ifdef __CUDA_ARCH__
    return *reinterpret_cast<const std::uint16_t*>(p);
#else
    return static_cast<std::uint32_t>(p[0]) | static_cast<std::uint32_t>(p[1]) << 8U;
#endif
  }
  const WordPlace place = sm90_word(n, k, groups);
  const std::uint8_t* p = w.tiles + place.offset;
#ifdef __CUDA_ARCH__
  const std::uint32_t word = *reinterpret_cast<const std::uint32_t*>(p);
#else
  const std::uint32_t word = static_cast<std::uint32_t>(p[0]) | static_cast<std::uint32_t>(p[1]) << 8U |
                             static_cast<std::uint32_t>(p[2]) << 16U |
                             static_cast<std::uint32_t>(p[3]) << 24U;
#endif
  return split_quad(word, place.half);
}
FIREQ_HOST_DEVICE std::uint8_t load_scale(const WeightRef& w, std::uint64_t n, std::uint64_t group) {
  const std::uint64_t groups = (w.cols + kGroup - 1) / kGroup;
  return w.layout == WeightLayout::row ? w.group_scales[n * groups + group]
                                       : w.tiles[sm90_scale(n, group, groups)];
}

}  // namespace fireq::kernels
