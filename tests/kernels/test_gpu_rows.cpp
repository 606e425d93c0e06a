// The activation kernels against their CPU twins.
#include <gtest/gtest.h>

#include "common/error.hpp"
#include "kernels/activations.hpp"
#include "kernels/cpu_twin.hpp"
#include "kernels/device_memory.hpp"
#include "kernels/gemm_config.hpp"
#include "tests/kernels/division_check.hpp"
#include "tests/kernels/problem.hpp"

namespace fireq::kernels::testing {
namespace {

struct Shape {
  std::uint64_t tokens, cols;
};

class RowTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (device_count() == 0) GTEST_SKIP() << "no CUDA device";
  }
  template <std::size_t kCount>
  void quantiser_is_bit_exact(const std::array<Shape, kCount>& shapes);
  template <std::size_t kCount>
  void norm_and_quantiser(const std::array<Shape, kCount>& shapes);
  template <std::size_t kCount>
  void silu_mul_and_quantiser(const std::array<Shape, kCount>& shapes);

  std::mt19937 rng{std::random_device{}()};
  std::normal_distribution<float> normal;

  std::vector<std::uint16_t> random_bf16(std::size_t count, float scale) {
    std::vector<std::uint16_t> v(count);
    for (auto& b : v) b = to_bf16(scale * normal(rng));
    return v;
  }
};

// Vector and scalar paths, rows longer than what the registers keep, rows of clusters (few) and of CTAs.
constexpr std::array<Shape, 11> kShapes{{{1, 1},
                                         {3, 100},
                                         {2, 2048},
                                         {5, 4096},
                                         {2, 4099},
                                         {2, 8192},
                                         {9, 8200},
                                         {33, 14336},
                                         {2, 14336},
                                         {66, 14336},
                                         {1, 28680}}};
// As many rows as take the kernels with few threads a row.
constexpr std::array<Shape, 4> kManyRows{{{2048, 520}, {2050, 4096}, {2049, 8200}, {2048, 14336}}};

struct Quantized {
  std::vector<std::uint8_t> x8;
  std::vector<float> scale;
};

// Fraction of FP8 bytes that differ; scales may differ by `scale_error` relatively. Bytes behind the row
// stay.
double compare(const Quantized& gpu, const Quantized& cpu, const Shape& s, std::uint64_t pitch,
               double scale_error) {
  std::size_t different = 0;
  for (std::uint64_t m = 0; m < s.tokens; ++m) {
    EXPECT_NEAR(gpu.scale[m], cpu.scale[m], scale_error * static_cast<double>(cpu.scale[m]));
    for (std::uint64_t k = 0; k < pitch; ++k) {
      const std::uint8_t a = gpu.x8[m * pitch + k], b = cpu.x8[m * pitch + k];
      if (a == b) continue;
      ++different;
      EXPECT_LT(k, s.cols) << "wrote behind the row";
      // Only a neighbouring number, or a zero of the other sign.
      const double step = std::max(std::fabs(e4m3_value(b)) / 8, 0x1p-9);
      EXPECT_NEAR(e4m3_value(a), e4m3_value(b), 1.01 * step);
    }
  }
  return static_cast<double>(different) / static_cast<double>(s.tokens * s.cols);
}

std::uint64_t pitch_for(std::uint64_t cols) {
  return (cols + 127) / 128 * 128;
}

template <std::size_t kCount>
void RowTest::quantiser_is_bit_exact(const std::array<Shape, kCount>& shapes) {
  for (const Shape& s : shapes) {
    SCOPED_TRACE(s.cols);
    const std::uint64_t pitch = pitch_for(s.cols);
    std::vector<std::uint16_t> x = random_bf16(s.tokens * s.cols, 3.0F);
    x[0] = to_bf16(900.0F);
    if (s.tokens > 1)
      for (std::uint64_t k = 0; k < s.cols; ++k)
        x[s.cols + k] = k % 2 == 0 ? 0x8000 : 0;  // zeros of both signs
    if (s.tokens > 2) {
      x[2 * s.cols + 5] = 0xff80;  // -infinity, which makes all but NaN zero
      x[2 * s.cols + 9] = 0x7fc0;
    }
    if (s.tokens > 4) x[4 * s.cols + 17] = 0xffc0;  // NaN alone
    Quantized cpu{std::vector<std::uint8_t>(s.tokens * pitch, 0xaa), std::vector<float>(s.tokens)};
    cpu::quantize_activations({x.data(), s.cols}, s.tokens, s.cols, {cpu.x8.data(), pitch, cpu.scale.data()});
    DeviceBuffer<std::uint16_t> dx(x);
    DeviceBuffer<std::uint8_t> x8(s.tokens * pitch);
    DeviceBuffer<float> scale(s.tokens);
    x8.fill(0xaa);
    quantize_activations({dx.get(), s.cols}, s.tokens, s.cols, {x8.get(), pitch, scale.get()}, {});
    EXPECT_EQ(x8.download(), cpu.x8);
    EXPECT_EQ(scale.download(), cpu.scale);
  }
}

TEST_F(RowTest, SmallQuantiserIsBitExact) {
  quantiser_is_bit_exact(kShapes);
}
TEST_F(RowTest, QuantiserOfManyRowsIsBitExact) {
  quantiser_is_bit_exact(kManyRows);
}

// Every bf16 magnitude against a maximum of 448: the quotient's rounding, bit for bit.
TEST_F(RowTest, QuantiserRoundsEveryBf16AsTheDefinition) {
  for (const std::uint64_t cols : {0x43e1U, 0x43e8U}) {  // element by element, and in vectors
    std::vector<std::uint16_t> x(cols);
    for (std::uint64_t i = 0; i < cols; ++i)
      x[i] = static_cast<std::uint16_t>(std::min<std::uint64_t>(i, 0x43e0U) | (i % 3 == 0 ? 0x8000U : 0U));
    const std::uint64_t pitch = pitch_for(cols);
    DeviceBuffer<std::uint16_t> dx(x);
    DeviceBuffer<std::uint8_t> x8(pitch);
    DeviceBuffer<float> scale(1);
    quantize_activations({dx.get(), cols}, 1, cols, {x8.get(), pitch, scale.get()}, {});
    const auto got = x8.download();
    const float a = scale.download()[0];
    for (std::uint64_t i = 0; i < cols; ++i)
      ASSERT_EQ(got[i], e4m3_nearest(from_bf16(x[i]) / a)) << "bf16 bits " << x[i];
  }
}

template <std::size_t kCount>
void RowTest::norm_and_quantiser(const std::array<Shape, kCount>& shapes) {
  for (const Shape& s : shapes) {
    for (const bool with_addend : {false, true}) {
      SCOPED_TRACE(std::to_string(s.cols) + (with_addend ? " with addend" : ""));
      const std::uint64_t pitch = pitch_for(s.cols);
      const std::vector<std::uint16_t> x = random_bf16(s.tokens * s.cols, 2.0F);
      const std::vector<std::uint16_t> addend = random_bf16(s.tokens * s.cols, 1.0F);
      std::vector<float> weight(s.cols);
      for (auto& w : weight) w = 1.0F + 0.3F * normal(rng);
      NormInput in;
      std::vector<std::uint16_t> sum(x.size(), 0);
      in.x = {x.data(), s.cols};
      if (with_addend) in.addend = {addend.data(), s.cols};
      in.sum = sum.data();
      in.weight = weight.data();
      Quantized cpu{std::vector<std::uint8_t>(s.tokens * pitch, 0xaa), std::vector<float>(s.tokens)};
      cpu::rmsnorm_quantize(in, s.tokens, s.cols, {cpu.x8.data(), pitch, cpu.scale.data()});
      DeviceBuffer<std::uint16_t> dx(x), da(addend);
      DeviceBuffer<float> dw(weight);
      DeviceBuffer<std::uint8_t> x8(s.tokens * pitch);
      DeviceBuffer<float> scale(s.tokens);
      x8.fill(0xaa);
      in.x.data = dx.get();
      in.sum = dx.get();  // in place
      in.weight = dw.get();
      if (with_addend) in.addend.data = da.get();
      rmsnorm_quantize(in, s.tokens, s.cols, {x8.get(), pitch, scale.get()}, {});
      EXPECT_EQ(dx.download(), sum) << "the residual stream";
      // The mean of squares is summed in another order: now and then a value lands on the other side of a
      // rounding.
      EXPECT_LT(compare({x8.download(), scale.download()}, cpu, s, pitch, 1.0 / 128), 0.02);
    }
  }
}

TEST_F(RowTest, SmallNormAndQuantiser) {
  norm_and_quantiser(kShapes);
}
TEST_F(RowTest, NormAndQuantiserOfManyRows) {
  norm_and_quantiser(kManyRows);
}

template <std::size_t kCount>
void RowTest::silu_mul_and_quantiser(const std::array<Shape, kCount>& shapes) {
  for (const Shape& s : shapes) {
    SCOPED_TRACE(s.cols);
    const std::uint64_t pitch = pitch_for(s.cols);
    std::vector<std::uint16_t> x = random_bf16(s.tokens * s.cols * 2, 4.0F);
    x[0] = to_bf16(-200.0F);  // exp overflows: silu is -0
    Quantized cpu{std::vector<std::uint8_t>(s.tokens * pitch, 0xaa), std::vector<float>(s.tokens)};
    cpu::silu_mul_quantize({x.data(), 2 * s.cols}, s.tokens, s.cols,
                           {cpu.x8.data(), pitch, cpu.scale.data()});
    DeviceBuffer<std::uint16_t> dx(x);
    DeviceBuffer<std::uint8_t> x8(s.tokens * pitch);
    DeviceBuffer<float> scale(s.tokens);
    x8.fill(0xaa);
    silu_mul_quantize({dx.get(), 2 * s.cols}, s.tokens, s.cols, {x8.get(), pitch, scale.get()}, {});
    EXPECT_LT(compare({x8.download(), scale.download()}, cpu, s, pitch, 1.0 / 128), 0.02);
  }
}

TEST_F(RowTest, SmallSiluMulAndQuantiser) {
  silu_mul_and_quantiser(kShapes);
}
TEST_F(RowTest, SiluMulAndQuantiserOfManyRows) {
  silu_mul_and_quantiser(kManyRows);
}

TEST_F(RowTest, DivisionIsIeees) {
  EXPECT_EQ(wrong_quotients(), 0U);
}

TEST_F(RowTest, RefusesImpossibleShapes) {
  DeviceBuffer<std::uint16_t> x(64);
  DeviceBuffer<std::uint8_t> x8(64);
  DeviceBuffer<float> scale(1);
  EXPECT_THROW(quantize_activations({x.get(), 16}, 0, 16, {x8.get(), 16, scale.get()}, {}), Error);
  EXPECT_THROW(quantize_activations({x.get(), 16}, 1, 16, {x8.get(), 8, scale.get()}, {}), Error);
  EXPECT_THROW(quantize_activations({x.get(), 8}, 1, 16, {x8.get(), 16, scale.get()}, {}), Error);
}

}  // namespace
}  // namespace fireq::kernels::testing
