// The sm90 layout: tiles of 128 rows x 128 k that a Hopper kernel reads with one bulk copy. Lossless and
// reversible. weight_tiles U8 [ceil(N/128), Kp/128, 8320]; each holds two 64-row halves of 4096 B codes + 64
// B scales. docs/sm90-layout.md has the permutation.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "libquant/quantized_linear.hpp"

namespace fireq::libquant {

inline constexpr std::uint64_t kTileRows = 128;
inline constexpr std::uint64_t kTileBytes = 8320;

std::uint64_t tile_bytes(std::uint64_t rows, std::uint64_t cols);  // bytes of the whole weight_tiles tensor

// Rows that pad N to 128 hold code 0 and scale 0x01.
std::vector<std::uint8_t> pack_sm90(const QuantizedLinear& q);
// Fills q.codes and q.group_scales (q.rows, q.cols set). Throws Error(input) on a wrong size or padding.
void unpack_sm90(std::span<const std::uint8_t> tiles, QuantizedLinear& q);

}  // namespace fireq::libquant
