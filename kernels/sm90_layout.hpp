// Constants of the sm90 weight layout (docs/sm90-layout.md): tiles of 128 rows x 128 k, two 64-row halves of
// 4096 B of codes and 64 B of scales. Thread t = 32w + l of a warpgroup, g = l / 4, owns words q = 0..7 of a
// half at (q/4) * 2048 + 16 t + 4 (q%4): the codes of row 16w + g + 8(q%2), k = 32(q/2) + 4(l%4) + {0..3} and
// the same + 16. Code c's magnitude is in bits 4c .. 4c+2; the sign of code i < 4 is bit 8i + 7, that of code
// 4 + j bit 8j + 3. The scales of rows 16w + g and 16w + g + 8 are the bytes 4096 + 2(8w + g) + {0, 1}.
#pragma once

#include <cstdint>

namespace fireq::kernels {

inline constexpr std::uint32_t kGroup = 128;       // weights per scale along K
inline constexpr std::uint32_t kTileRows = 128;    // rows of a tile
inline constexpr std::uint32_t kTileBytes = 8320;  // of a tile
inline constexpr std::uint32_t kHalfRows = 64;     // rows of a half: one warpgroup
inline constexpr std::uint32_t kHalfBytes = 4160;  // codes and scales of a half
inline constexpr std::uint32_t kHalfCodeBytes = 4096;

}  // namespace fireq::kernels
