#include "libquant/packing.hpp"

#include <algorithm>
#include <string>

#include "common/checked.hpp"

namespace fireq::libquant {
namespace {

constexpr std::uint64_t kHalfRows = 64;
constexpr std::uint64_t kHalfCodeBytes = kHalfRows * kGroupSize / 2;
constexpr std::uint64_t kHalfBytes = kHalfCodeBytes + kHalfRows;  // codes, then one scale per row
constexpr std::uint64_t kThreads = 128;
static_assert(2 * kHalfBytes == kTileBytes);

// Where word q of thread t sits in its half (docs/sm90-layout.md), and which 2 x 4 codes it holds.
struct Word {
  std::uint64_t byte;  // in the half
  std::uint64_t row;   // in the half
  std::uint64_t k;     // in the group: codes 0..3 are k .. k + 3, codes 4..7 are k + 16 .. k + 19
};
constexpr Word word_place(std::uint64_t t, std::uint64_t q) {
  const std::uint64_t warp = t / 32, lane = t % 32;
  return {q / 4 * 2048 + t * 16 + q % 4 * 4, 16 * warp + lane / 4 + 8 * (q % 2),
          32 * (q / 2) + 4 * (lane % 4)};
}
constexpr std::uint64_t scale_place(std::uint64_t row) {
  return kHalfCodeBytes + (row / 16 * 8 + row % 8) * 2 + row % 16 / 8;
}

// Eight codes in the order 0..7, four bits each, to the word: magnitudes stay in bits 4c..4c+2, signs move to
// bit 8i + 7 (codes 0..3) and 8j + 3 (codes 4..7), where one shift and one mask make them FP8 sign bits.
constexpr std::uint32_t to_word(std::uint32_t codes) {
  std::uint32_t word = codes & 0x77777777U;
  for (unsigned i = 0; i < 4; ++i) {
    word |= ((codes >> (4 * i + 3)) & 1U) << (8 * i + 7);
    word |= ((codes >> (4 * (i + 4) + 3)) & 1U) << (8 * i + 3);
  }
  return word;
}
constexpr std::uint32_t from_word(std::uint32_t word) {
  std::uint32_t codes = word & 0x77777777U;
  for (unsigned i = 0; i < 4; ++i) {
    codes |= ((word >> (8 * i + 7)) & 1U) << (4 * i + 3);
    codes |= ((word >> (8 * i + 3)) & 1U) << (4 * (i + 4) + 3);
  }
  return codes;
}

std::uint32_t load16(const std::uint8_t* p) {
  return static_cast<std::uint32_t>(p[0]) | static_cast<std::uint32_t>(p[1]) << 8U;
}
void store16(std::uint8_t* p, std::uint32_t v) {
  p[0] = static_cast<std::uint8_t>(v);
  p[1] = static_cast<std::uint8_t>(v >> 8U);
}

// Calls body(half bytes, first row of the half, group) for every half of every tile.
template <typename Bytes, typename Body>
void for_each_half(Bytes* tiles, std::uint64_t rows, std::uint64_t groups, const Body& body) {
  const std::uint64_t row_blocks = (rows + kTileRows - 1) / kTileRows;
  for (std::uint64_t block = 0; block < row_blocks; ++block) {
    for (std::uint64_t g = 0; g < groups; ++g) {
      for (std::uint64_t h = 0; h < 2; ++h, tiles += kHalfBytes)
        body(tiles, block * kTileRows + h * kHalfRows, g);
    }
  }
}

[[noreturn]] void broken_tile(const char* message, std::uint64_t offset, std::string expected,
                              std::string found) {
  throw Error(ErrorKind::input, message).offset(offset).expected(std::move(expected)).found(std::move(found));
}

}  // namespace

std::uint64_t tile_bytes(std::uint64_t rows, std::uint64_t cols) {
  const std::uint64_t blocks = checked_round_up(rows, kTileRows, "rows of sm90 tiles") / kTileRows;
  const std::uint64_t groups = checked_round_up(cols, kGroupSize, "columns of sm90 tiles") / kGroupSize;
  return checked_mul(checked_mul(blocks, groups, "sm90 tiles"), kTileBytes, "bytes of sm90 tiles");
}

std::vector<std::uint8_t> pack_sm90(const QuantizedLinear& q) {
  std::vector<std::uint8_t> tiles(tile_bytes(q.rows, q.cols));
  const std::uint64_t groups = q.groups();
  if (q.codes.size() != q.rows * groups * (kGroupSize / 2) || q.group_scales.size() != q.rows * groups) {
    throw Error(ErrorKind::internal, "a quantised linear and its shape disagree");
  }
  for_each_half(
      tiles.data(), q.rows, groups, [&](std::uint8_t* half, std::uint64_t first_row, std::uint64_t g) {
        for (std::uint64_t row = 0; row < kHalfRows; ++row) {
          const std::uint64_t n = first_row + row;
          half[scale_place(row)] = n < q.rows ? q.group_scales[n * groups + g] : std::uint8_t{0x01};
        }
        for (std::uint64_t t = 0; t < kThreads; ++t) {
          for (std::uint64_t w = 0; w < 8; ++w) {
            const Word place = word_place(t, w);
            const std::uint64_t n = first_row + place.row;
            if (n >= q.rows) continue;  // code 0, already there
            const std::uint8_t* from = q.codes.data() + (n * groups + g) * (kGroupSize / 2) + place.k / 2;
            const std::uint32_t word = to_word(load16(from) | load16(from + 8) << 16U);
            store16(half + place.byte, word);
            store16(half + place.byte + 2, word >> 16U);
          }
        }
      });
  return tiles;
}

void unpack_sm90(std::span<const std::uint8_t> tiles, QuantizedLinear& q) {
  const std::uint64_t expected = tile_bytes(q.rows, q.cols);
  if (tiles.size() != expected) {
    throw Error(ErrorKind::input, "sm90 tiles have the wrong size")
        .expected(std::to_string(expected) + " bytes")
        .found(std::to_string(tiles.size()));
  }
  const std::uint64_t groups = q.groups();
  q.codes.assign(q.rows * groups * (kGroupSize / 2), 0);
  q.group_scales.assign(q.rows * groups, 0);
  for_each_half(tiles.data(), q.rows, groups,
                [&](const std::uint8_t* half, std::uint64_t first_row, std::uint64_t g) {
                  const auto offset = static_cast<std::uint64_t>(half - tiles.data());
                  for (std::uint64_t row = 0; row < kHalfRows; ++row) {
                    const std::uint64_t n = first_row + row;
                    const std::uint8_t sigma = half[scale_place(row)];
                    if (n < q.rows) {
                      q.group_scales[n * groups + g] = sigma;
                    } else if (sigma != 0x01) {
                      broken_tile("a padding row of sm90 tiles has a wrong scale", offset + scale_place(row),
                                  "1", std::to_string(sigma));
                    }
                  }
                  for (std::uint64_t t = 0; t < kThreads; ++t) {
                    for (std::uint64_t w = 0; w < 8; ++w) {
                      const Word place = word_place(t, w);
                      const std::uint64_t n = first_row + place.row;
                      const std::uint8_t* from = half + place.byte;
                      const std::uint32_t codes = from_word(load16(from) | load16(from + 2) << 16U);
                      if (n >= q.rows) {
                        if (codes != 0)
                          broken_tile("a padding row of sm90 tiles has codes", offset + place.byte, "0",
                                      std::to_string(codes));
                        continue;
                      }
                      std::uint8_t* to = q.codes.data() + (n * groups + g) * (kGroupSize / 2) + place.k / 2;
                      store16(to, codes);
                      store16(to + 8, codes >> 16U);
                    }
                  }
                });
}

}  // namespace fireq::libquant
