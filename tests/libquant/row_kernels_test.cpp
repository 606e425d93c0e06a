// Every instruction set that this CPU can run gives the bytes of the plain loops.
#include "libquant/row_kernels.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "common/parallel.hpp"
#include "libquant/number_formats.hpp"
#include "libquant/quantized_linear.hpp"

namespace fireq::libquant {
namespace {

std::mt19937_64& random_source() {
  static std::mt19937_64 source(std::random_device{}());
  return source;
}

std::vector<std::byte> random_bytes(std::size_t n) {
  std::vector<std::byte> bytes(n);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random_source()());
  return bytes;
}

std::vector<float> random_floats(std::size_t n) {
  std::vector<float> values(n);
  std::normal_distribution<float> normal;
  for (float& v : values)
    v = std::ldexp(normal(random_source()), static_cast<int>(random_source()() % 9) - 4);
  return values;
}

GroupTable random_table() {
  GroupTable table;
  for (std::size_t j = 0; j < 8; ++j) {
    // Around the exponents of random_floats, some at the ends of the range.
    const auto draw = random_source()() % 10;
    table.threshold[j] = draw == 0 ? 1U
                         : draw == 1
                             ? 0x7f800000U
                             : 0x3d000000U + static_cast<std::uint32_t>(random_source()() % 0x4000000U);
    table.threshold16[j] = draw == 0   ? std::uint16_t{1}
                           : draw == 1 ? std::uint16_t{0x7f80}
                                       : static_cast<std::uint16_t>(1 + random_source()() % 0x7f80U);
    table.value[j] = std::ldexp(static_cast<float>(j), -3);
  }
  std::sort(table.threshold.begin(), table.threshold.begin() + 7);
  std::sort(table.threshold16.begin(), table.threshold16.begin() + 7);
  return table;
}

class EveryTarget : public testing::Test {
 protected:
  static std::vector<const RowKernels*> others() {
    std::vector<const RowKernels*> tables = available_kernels();
    EXPECT_EQ(tables[0], &plain_kernels());
    tables.erase(tables.begin());
    return tables;
  }
  void TearDown() override { use_kernels(nullptr); }
};

TEST_F(EveryTarget, Conversions) {
  std::vector<std::byte> all16(2 * 65536 + 1);  // every 16-bit pattern, at an odd address
  for (unsigned h = 0; h < 65536; ++h) {
    const auto half = static_cast<std::uint16_t>(h);
    std::memcpy(all16.data() + 1 + 2 * h, &half, 2);
  }
  std::vector<std::uint8_t> all8(256);
  std::iota(all8.begin(), all8.end(), std::uint8_t{0});
  const std::vector<std::byte> raw = random_bytes(4 * 200003);
  std::vector<float> floats(200003);
  std::memcpy(floats.data(), raw.data(), raw.size());
  const RowKernels& plain = plain_kernels();
  for (const RowKernels* k : others()) {
    SCOPED_TRACE(std::string(k->name));
    const auto same_floats = [](const std::vector<float>& a, const std::vector<float>& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    std::vector<float> a(65536), b(65536);
    plain.decode_f16(all16.data() + 1, a.data(), 65536);
    k->decode_f16(all16.data() + 1, b.data(), 65536);
    EXPECT_TRUE(same_floats(a, b));
    plain.decode_bf16(all16.data() + 1, a.data(), 65536);
    k->decode_bf16(all16.data() + 1, b.data(), 65536);
    EXPECT_TRUE(same_floats(a, b));
    plain.decode_e4m3(all8.data(), a.data(), 256);
    k->decode_e4m3(all8.data(), b.data(), 256);
    EXPECT_TRUE(same_floats(a, b));

    std::vector<std::uint16_t> h1(floats.size()), h2(floats.size());
    plain.encode_f16(floats.data(), h1.data(), floats.size());
    k->encode_f16(floats.data(), h2.data(), floats.size());
    EXPECT_EQ(h1, h2);
    plain.encode_bf16(floats.data(), h1.data(), floats.size());
    k->encode_bf16(floats.data(), h2.data(), floats.size());
    EXPECT_EQ(h1, h2);
    std::vector<std::uint8_t> e1(floats.size()), e2(floats.size());
    plain.encode_e4m3(floats.data(), e1.data(), floats.size());
    k->encode_e4m3(floats.data(), e2.data(), floats.size());
    EXPECT_EQ(e1, e2);
    for (const float scale : {1.0F, 0.37F, 1e-30F, 3e30F}) {
      plain.divide_to_e4m3(floats.data(), scale, e1.data(), floats.size());
      k->divide_to_e4m3(floats.data(), scale, e2.data(), floats.size());
      EXPECT_EQ(e1, e2);
      std::vector<float> f1 = floats, f2 = floats;
      plain.divide_round_e4m3(f1.data(), scale, f1.size());
      k->divide_round_e4m3(f2.data(), scale, f2.size());
      EXPECT_TRUE(same_floats(f1, f2));
    }
    std::vector<float> f1(floats.size()), f2(floats.size());
    plain.round_bf16(floats.data(), f1.data(), f1.size());
    k->round_bf16(floats.data(), f2.data(), f2.size());
    EXPECT_TRUE(same_floats(f1, f2));
    for (const std::size_t n : {0UL, 1UL, 5UL, 16UL, 33UL, 1000UL}) {
      EXPECT_EQ(plain.absmax32(floats.data(), n), k->absmax32(floats.data(), n));
    }
  }
}

TEST_F(EveryTarget, RowsOfWeights) {
  const RowKernels& plain = plain_kernels();
  for (const RowKernels* k : others()) {
    SCOPED_TRACE(std::string(k->name));
    for (const std::size_t n : {1UL, 8UL, 127UL, 128UL, 129UL, 255UL, 256UL, 288UL, 700UL, 2880UL}) {
      const std::size_t groups = (n + 127) / 128;
      std::vector<GroupTable> tables(groups);
      std::vector<const GroupTable*> pointers(groups);
      for (std::size_t g = 0; g < groups; ++g) {
        tables[g] = random_table();
        pointers[g] = &tables[g];
      }
      // Random bytes are numbers of all sizes, both zeros among them; the address is odd.
      std::vector<std::byte> row = random_bytes(4 * n + 1);
      for (std::size_t i = 1; i + 4 <= row.size(); i += 36) std::memset(row.data() + i, 0, 4);
      const std::byte* at = row.data() + 1;
      std::vector<std::uint32_t> m1(groups, 1), m2(groups, 2);
      plain.group_absmax16(at, n, m1.data());
      k->group_absmax16(at, n, m2.data());
      EXPECT_EQ(m1, m2);
      plain.group_absmax32(at, n, m1.data());
      k->group_absmax32(at, n, m2.data());
      EXPECT_EQ(m1, m2);
      std::vector<std::uint8_t> c1(groups * 64 + 1, 0xee), c2(groups * 64 + 1, 0xee);
      plain.encode_row16(at, at, n, pointers.data(), c1.data());
      k->encode_row16(at, at, n, pointers.data(), c2.data());
      EXPECT_EQ(c1, c2);
      const std::vector<float> floats = random_floats(n);
      const auto* bytes = reinterpret_cast<const std::byte*>(floats.data());
      plain.encode_row32(bytes, bytes, n, pointers.data(), c1.data());
      k->encode_row32(bytes, bytes, n, pointers.data(), c2.data());
      EXPECT_EQ(c1, c2);
      EXPECT_EQ(c2.back(), 0xee);
    }
  }
}

TEST_F(EveryTarget, SearchErrors) {
  const RowKernels& plain = plain_kernels();
  for (int round = 0; round < 200; ++round) {
    std::vector<float> magnitude = random_floats(128), weight = random_floats(128);
    for (float& v : magnitude) v = std::fabs(v);
    for (float& v : weight) v = std::fabs(v);
    std::vector<GroupTable> tables(10);
    std::vector<const GroupTable*> pointers;
    for (GroupTable& t : tables) {
      t = random_table();
      pointers.push_back(&t);
    }
    std::vector<float> expected(10), errors(10);
    plain.search_errors(magnitude.data(), weight.data(), pointers.data(), 10, expected.data());
    for (const RowKernels* k : others()) {
      k->search_errors(magnitude.data(), weight.data(), pointers.data(), 10, errors.data());
      ASSERT_EQ(errors, expected) << k->name;
    }
  }
}

// The whole quantiser, on every target and on several threads.
TEST_F(EveryTarget, QuantizerBytes) {
  const std::uint64_t rows = 24, cols = 700;
  std::vector<float> w = random_floats(rows * cols);
  std::vector<float> importance = random_floats(cols);
  for (float& v : importance) v *= v;
  for (const bool search : {false, true}) {
    for (const Levels& levels : {Levels::int4(), Levels::normal()}) {
      WeightQuantizerOptions options;
      options.levels = levels;
      options.rounding = search ? Rounding::product : Rounding::value;
      options.search_low = search ? -7 : 0;
      options.search_high = search ? 2 : 0;
      std::vector<QuantizedLinear> results;
      for (const RowKernels* k : available_kernels()) {
        use_kernels(k);
        EXPECT_EQ(simd_target(), k->name);
        QuantizedLinear q = make_quantized_linear(rows, cols, levels, false);
        parallel_for(rows, 3, [&](std::size_t r) {
          quantize_rows(std::span(w).subspan(r * cols, cols), r, 1, options, importance, q);
        });
        results.push_back(std::move(q));
      }
      for (const QuantizedLinear& q : results) {
        EXPECT_EQ(q.codes, results[0].codes);
        EXPECT_EQ(q.group_scales, results[0].group_scales);
        EXPECT_EQ(q.row_scales, results[0].row_scales);
      }
    }
  }
}

}  // namespace
}  // namespace fireq::libquant
