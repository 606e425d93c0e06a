// FP8 matrices: every row against the definition in double precision, and what is refused.
#include "libquant/fp8_linear.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/error.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::libquant {
namespace {

using testing::HasSubstr;

std::string refusal(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::input);
    return e.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

TEST(Fp8Linear, EachWeightIsTheNearest) {
  std::mt19937_64 random(std::random_device{}());
  std::normal_distribution<float> normal;
  constexpr std::uint64_t kRows = 37;
  constexpr std::uint64_t kCols = 211;
  std::vector<float> w(kRows * kCols);
  for (std::uint64_t r = 0; r < kRows; ++r) {
    const float size = std::exp2(static_cast<float>(random() % 60) - 30);
    for (std::uint64_t c = 0; c < kCols; ++c) w[r * kCols + c] = size * normal(random);
  }
  std::vector<double> values;
  for (int b = 0; b < 127; ++b)
    values.push_back(static_cast<double>(decode_e4m3(static_cast<std::uint8_t>(b))));
  Fp8Linear q = make_fp8_linear(kRows, kCols);
  std::fill(q.codes.begin(), q.codes.end(), 0x7f);  // every one has to be written
  quantize_fp8_rows(std::span(w).first(20 * kCols), 0, 20, q);
  quantize_fp8_rows(std::span(w).subspan(20 * kCols), 20, kRows - 20, q);
  check_fp8_linear(q);
  for (std::uint64_t r = 0; r < kRows; ++r) {
    float largest = 0;
    for (std::uint64_t c = 0; c < kCols; ++c) largest = std::max(largest, std::fabs(w[r * kCols + c]));
    EXPECT_EQ(q.row_scales[r], largest / 448.0F);
    for (std::uint64_t c = 0; c < kCols; ++c) {
      const double scale = static_cast<double>(q.row_scales[r]);
      const double target = static_cast<double>(w[r * kCols + c]) / scale;
      double nearest = std::numeric_limits<double>::infinity();
      for (const double v : values) nearest = std::min(nearest, std::fabs(std::fabs(target) - v));
      const auto got = static_cast<double>(decode_e4m3(q.codes[r * kCols + c]));
      EXPECT_LE(std::fabs(target - got), nearest + 1e-6 * std::fabs(target)) << r << ", " << c;
    }
  }
}

TEST(Fp8Linear, RowsOfZerosAndOfTinyWeights) {
  Fp8Linear q = make_fp8_linear(3, 2);
  const std::vector<float> w{0, -0.0F, 0x1p-140F, 0, std::numeric_limits<float>::max(), 1};
  quantize_fp8_rows(w, 0, 3, q);
  check_fp8_linear(q);
  EXPECT_EQ(q.row_scales[0], 0x1p-100F / 448);
  EXPECT_EQ(q.codes[0] & 0x7FU, 0U);
  EXPECT_EQ(q.codes[2], 0U);
  EXPECT_EQ(q.codes[4], 0x7eU);
}

TEST(Fp8Linear, RefusesWhatIsNotFinite) {
  Fp8Linear q = make_fp8_linear(4, 2);
  std::vector<float> w(4);
  w[3] = std::nanf("");
  EXPECT_THAT(refusal([&] { quantize_fp8_rows(w, 2, 2, q); }), HasSubstr("NaN at [3, 1]"));
  w[3] = -std::numeric_limits<float>::infinity();
  EXPECT_THAT(refusal([&] { quantize_fp8_rows(w, 2, 2, q); }), HasSubstr("infinity at [3, 1]"));
  q = make_fp8_linear(4, 2);
  q.codes[5] = 0xff;
  EXPECT_THAT(refusal([&] { check_fp8_linear(q, 10); }), HasSubstr("NaN at [12, 1]"));
  for (const float bad : {0.0F, -1.0F, std::nanf(""), std::numeric_limits<float>::infinity()}) {
    q = make_fp8_linear(4, 2);
    q.row_scales[1] = bad;
    EXPECT_THAT(refusal([&] { check_fp8_linear(q); }), HasSubstr("at row 1"));
  }
}

}  // namespace
}  // namespace fireq::libquant
