// The sm90 layout: round trips, and words that are worked out here from the text of docs/sm90-layout.md
// alone.
#include "libquant/packing.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "common/error.hpp"

namespace fireq::libquant {
namespace {

using testing::HasSubstr;

QuantizedLinear random_linear(std::uint64_t rows, std::uint64_t cols) {
  static std::mt19937_64 random(std::random_device{}());
  QuantizedLinear q = make_quantized_linear(rows, cols, Levels::normal(), false);
  for (std::uint64_t n = 0; n < rows; ++n) {
    for (std::uint64_t k = 0; k < cols; ++k) {
      q.codes[n * q.padded_cols() / 2 + k / 2] |= static_cast<std::uint8_t>(random() % 16 << (k % 2 * 4));
    }
  }
  for (std::uint8_t& s : q.group_scales) s = static_cast<std::uint8_t>(1 + random() % 0x7e);
  return q;
}

unsigned code_or_padding(const QuantizedLinear& q, std::uint64_t n, std::uint64_t k) {
  return n < q.rows ? unsigned{q.code(n, k)} : 0U;
}

TEST(Sm90Layout, PackingAndUnpackingIsTheIdentity) {
  for (const std::uint64_t rows : {1UL, 8UL, 127UL, 128UL, 129UL, 288UL, 2880UL}) {
    for (const std::uint64_t cols : {1UL, 8UL, 127UL, 128UL, 129UL, 288UL, 2880UL}) {
      if (rows * cols > 1000000) continue;  // 2880 is met with every size but itself
      const QuantizedLinear q = random_linear(rows, cols);
      const std::vector<std::uint8_t> tiles = pack_sm90(q);
      ASSERT_EQ(tiles.size(), (rows + 127) / 128 * ((cols + 127) / 128) * 8320);
      ASSERT_EQ(tiles.size(), tile_bytes(rows, cols));
      QuantizedLinear back;
      back.rows = rows;
      back.cols = cols;
      back.codes.assign(3, 0xcc);
      unpack_sm90(tiles, back);
      ASSERT_EQ(back.codes, q.codes) << rows << " x " << cols;
      ASSERT_EQ(back.group_scales, q.group_scales) << rows << " x " << cols;
    }
  }
}

// Every byte of the tensor from the document's table, the other way round from the packer: for each byte of a
// tile, which codes does it hold?
TEST(Sm90Layout, EveryByteIsWhatThePageSays) {
  const QuantizedLinear q = random_linear(200, 300);
  const std::vector<std::uint8_t> tiles = pack_sm90(q);
  const std::uint64_t groups = 3;
  for (std::uint64_t at = 0; at < tiles.size(); ++at) {
    const std::uint64_t tile = at / 8320, half = at % 8320 / 4160, byte = at % 4160;
    const std::uint64_t first_row = tile / groups * 128 + half * 64, g = tile % groups;
    if (byte >= 4096) {
      const std::uint64_t pair = (byte - 4096) / 2, h = (byte - 4096) % 2;
      const std::uint64_t n = first_row + pair / 8 * 16 + pair % 8 + 8 * h;
      ASSERT_EQ(tiles[at], n < q.rows ? q.group_scales[n * groups + g] : 1) << at;
      continue;
    }
    const std::uint64_t thread = byte % 2048 / 16;
    const std::uint64_t q_word = byte / 2048 * 4 + byte % 16 / 4;
    const std::uint64_t n = first_row + thread / 32 * 16 + thread % 32 / 4 + (q_word % 2 == 1 ? 8 : 0);
    const std::uint64_t k = g * 128 + q_word / 2 * 32 + thread % 4 * 4;
    unsigned expected = 0;
    for (unsigned bit = 0; bit < 8; ++bit) {
      const auto in_word = static_cast<unsigned>(byte % 4) * 8 + bit;
      const unsigned nibble = in_word / 4, place = in_word % 4;
      unsigned set = 0;
      if (place < 3) {  // magnitude bit `place` of code `nibble`
        set = code_or_padding(q, n, k + (nibble < 4 ? nibble : 12 + nibble)) >> place & 1U;
      } else if (in_word % 8 == 7) {  // sign of code (in_word - 7) / 8
        set = code_or_padding(q, n, k + (in_word - 7) / 8) >> 3U;
      } else {  // sign of code 4 + (in_word - 3) / 8
        set = code_or_padding(q, n, k + 16 + (in_word - 3) / 8) >> 3U;
      }
      expected |= set << bit;
    }
    ASSERT_EQ(tiles[at], expected) << at;
  }
}

// The worked example of docs/sm90-layout.md, numbers and all.
TEST(Sm90Layout, WorkedExample) {
  QuantizedLinear q = make_quantized_linear(128, 128, Levels::normal(), false);
  const auto put = [&q](std::uint64_t n, std::uint64_t k, unsigned code) {
    q.codes[n * 64 + k / 2] |= static_cast<std::uint8_t>(code << (k % 2 * 4));
  };
  // Row 93, k = 36 .. 39 and 52 .. 55.
  const unsigned codes[8] = {0x1, 0xA, 0x3, 0xC, 0xD, 0x6, 0xF, 0x0};
  for (std::uint64_t i = 0; i < 4; ++i) {
    put(93, 36 + i, codes[i]);
    put(93, 52 + i, codes[4 + i]);
  }
  q.group_scales[93] = 0x5a;
  const std::vector<std::uint8_t> tiles = pack_sm90(q);
  // Half 1; row 29 = 16 * 1 + 5 + 8, so warp 1, g = 5, odd word; s = 1, so word 3; k = 32 + 4 * 1, so lane %
  // 4 = 1. Thread 32 + 4 * 5 + 1 = 53. Byte 4160 + 53 * 16 + 3 * 4 = 5020. Scale: 4160 + 4096 + (8 + 5) * 2 +
  // 1 = 8283.
  EXPECT_EQ(tiles[8283], 0x5a);
  const std::uint32_t word =
      static_cast<std::uint32_t>(tiles[5020]) | static_cast<std::uint32_t>(tiles[5021]) << 8 |
      static_cast<std::uint32_t>(tiles[5022]) << 16 | static_cast<std::uint32_t>(tiles[5023]) << 24;
  EXPECT_EQ(word, 0x876DC329U);
  std::size_t set = 0;
  for (std::uint64_t i = 0; i < 8320; ++i) set += tiles[i] > 1 ? 1U : 0U;
  EXPECT_EQ(set, 5U);  // the word and the scale, nothing else
}

TEST(Sm90Layout, WrongSizesAndPaddingAreRefused) {
  const QuantizedLinear q = random_linear(100, 200);
  const std::vector<std::uint8_t> good = pack_sm90(q);
  const auto refused = [&](std::vector<std::uint8_t> tiles) -> std::string {
    QuantizedLinear back;
    back.rows = 100;
    back.cols = 200;
    try {
      unpack_sm90(tiles, back);
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::input);
      return e.what();
    }
    ADD_FAILURE() << "nothing was thrown";
    return {};
  };
  std::vector<std::uint8_t> bad = good;
  bad.pop_back();
  EXPECT_THAT(refused(bad), testing::AllOf(HasSubstr("16640"), HasSubstr("16639")));
  bad = good;
  bad.push_back(0);
  EXPECT_THAT(refused(bad), HasSubstr("16641"));
  bad = good;
  bad[4160 + 4096 + 63] = 2;  // second half, row 64 + 63 = 127
  EXPECT_THAT(refused(bad), testing::AllOf(HasSubstr("padding row"), HasSubstr("8319")));
  bad = good;
  bad[4160 + 127 * 16] = 0x10;  // thread 127 of the second half: row 64 + 55 = 119
  EXPECT_THAT(refused(bad),
              testing::AllOf(HasSubstr("padding row"), HasSubstr(std::to_string(4160 + 127 * 16))));
  EXPECT_THROW(tile_bytes(~std::uint64_t{0}, 1), Error);
  EXPECT_THROW(tile_bytes(std::uint64_t{1} << 62U, std::uint64_t{1} << 40U), Error);
}

}  // namespace
}  // namespace fireq::libquant
