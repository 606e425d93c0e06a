// What runs per token: activations, keys and values, queries, probabilities. And the error metrics.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/error.hpp"
#include "libquant/activation_quantizer.hpp"
#include "libquant/kv_quantizer.hpp"
#include "libquant/metrics.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::libquant {
namespace {

using testing::HasSubstr;

std::mt19937_64& random_source() {
  static std::mt19937_64 source(std::random_device{}());
  return source;
}
std::vector<float> random_vector(std::size_t n, float size) {
  std::normal_distribution<float> normal(0.0F, size);
  std::vector<float> x(n);
  for (float& v : x) v = normal(random_source());
  return x;
}
float absmax(const std::vector<float>& x) {
  float m = 0;
  for (const float v : x) m = std::fmax(m, std::fabs(v));
  return m;
}
std::string input_error(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::input);
    return e.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

TEST(Activations, ArePerTokenFp8OfBf16) {
  for (const std::size_t n : {1UL, 7UL, 64UL, 129UL, 576UL}) {
    for (const float size : {1e-9F, 1e-3F, 1.0F, 1e4F}) {
      const std::vector<float> x = random_vector(n, size);
      float m = 0;
      for (const float v : x) m = std::fmax(m, std::fabs(round_bf16(v)));
      const float a = std::fmax(m, 0x1p-20F) * (1.0F / 448.0F);
      std::vector<std::uint8_t> x8(n, 0xaa);
      EXPECT_EQ(quantize_token(x, x8), a);
      std::vector<float> in_place = x;
      EXPECT_EQ(quantize_token_in_place(in_place), a);
      std::vector<std::uint16_t> bf16(n, 0x7fc1);
      round_token(x, bf16);
      for (std::size_t k = 0; k < n; ++k) EXPECT_EQ(bf16[k], encode_bf16(x[k])) << k;
      for (std::size_t k = 0; k < n; ++k) {
        const float quotient = round_bf16(x[k]) / a;
        ASSERT_EQ(x8[k], encode_e4m3(quotient));
        ASSERT_EQ(in_place[k], decode_e4m3(x8[k]));
        // The codes do describe the input: half a step of E4M3 and of bf16.
        ASSERT_NEAR(a * decode_e4m3(x8[k]), x[k], 0.067F * std::fabs(x[k]) + a * 0x1p-10F);
      }
    }
  }
  std::vector<float> zeros(16, 0.0F);
  EXPECT_EQ(quantize_token_in_place(zeros), 0x1p-20F * (1.0F / 448.0F));
  EXPECT_EQ(zeros, std::vector<float>(16, 0.0F));
}

TEST(Activations, NonFiniteOnesAreNamed) {
  std::vector<float> x(40, 1.0F);
  std::vector<std::uint8_t> x8(40);
  x[37] = NAN;
  EXPECT_THAT(input_error([&] { quantize_token(x, x8); }), HasSubstr("NaN in channel 37"));
  EXPECT_THAT(input_error([&] { quantize_token_in_place(x); }), HasSubstr("NaN in channel 37"));
  std::vector<std::uint16_t> bf16(x.size());
  EXPECT_THAT(input_error([&] { round_token(x, bf16); }), HasSubstr("NaN in channel 37"));
  x[37] = 1;
  x[0] = -HUGE_VALF;
  EXPECT_THAT(input_error([&] { quantize_token(x, x8); }), HasSubstr("infinity in channel 0"));
  x[0] = 3.4e38F;  // finite, but not as bf16
  EXPECT_THAT(input_error([&] { quantize_token(x, x8); }), HasSubstr("channel 0"));
  EXPECT_THAT(input_error([&] { round_token(x, bf16); }), HasSubstr("channel 0"));
  EXPECT_THROW(quantize_token(x, std::span(x8).first(39)), Error);
}

TEST(KeysAndValues, AreSymmetricInt4WithAnE4m3Scale) {
  for (const std::size_t n : {1UL, 2UL, 5UL, 64UL, 127UL, 128UL}) {
    for (const float size : {1e-12F, 1e-2F, 1.0F, 300.0F, 5000.0F}) {
      std::vector<float> x = random_vector(n, size);
      if (n > 4) x[3] = 0;
      const std::uint8_t scale_byte = std::max<std::uint8_t>(1, encode_e4m3(absmax(x) / 7.0F));
      const double sigma = decode_e4m3(scale_byte);
      std::vector<std::uint8_t> nibbles((n + 1) / 2, 0xff);
      ASSERT_EQ(quantize_kv(x, nibbles), scale_byte);
      std::vector<float> codes = x, back(n, 99.0F);
      ASSERT_EQ(static_cast<double>(quantize_kv_in_place(codes)), sigma);
      dequantize_kv(nibbles, scale_byte, back);
      for (std::size_t i = 0; i < n; ++i) {
        // std::nearbyint on the exact quotient's neighbourhood: the tie is decided on 2x against odd
        // multiples of sigma.
        const double value = x[i];
        double expected = std::nearbyint(value / sigma);
        expected = std::fmin(7.0, std::fmax(-7.0, expected));
        ASSERT_EQ(static_cast<double>(codes[i]), expected) << value << " / " << sigma;
        const unsigned nibble = unsigned{nibbles[i / 2]} >> (i % 2 * 4) & 15U;
        ASSERT_NE(nibble, 8U);
        ASSERT_EQ(static_cast<double>(nibble & 7U) * ((nibble & 8U) != 0 ? -1 : 1), expected);
        ASSERT_EQ(back[i], static_cast<float>(expected * sigma));
      }
      ASSERT_TRUE(n % 2 == 0 || nibbles.back() < 16);
    }
  }
}

TEST(KeysAndValues, TiesGoToTheEvenCode) {
  std::vector<float> x{7.0F, 0.5F, -0.5F, 1.5F, -1.5F, 2.5F, 6.5F, -6.5F};
  EXPECT_EQ(quantize_kv_in_place(x), 1.0F);
  EXPECT_EQ(x, (std::vector<float>{7, 0, 0, 2, -2, 2, 6, -6}));
  std::vector<std::uint8_t> nibbles(4);
  quantize_kv(std::vector<float>{7, -7, -0.0F, 0.25F, -0.25F, 3, -3, 1}, nibbles);
  EXPECT_EQ(nibbles, (std::vector<std::uint8_t>{0xf7, 0x00, 0x30, 0x1b}));
}

TEST(KeysAndValues, NonFiniteOnesAreNamed) {
  std::vector<float> x(8, 1.0F);
  std::vector<std::uint8_t> nibbles(4);
  x[6] = HUGE_VALF;
  EXPECT_THAT(input_error([&] { quantize_kv(x, nibbles); }), HasSubstr("infinity in channel 6"));
  x[2] = NAN;
  EXPECT_THAT(input_error([&] { quantize_kv_in_place(x); }), HasSubstr("NaN in channel 2"));
  EXPECT_THAT(input_error([&] { quantize_query_in_place(x); }), HasSubstr("query"));
  x.assign(8, 1.0F);
  EXPECT_THROW(quantize_kv(x, std::span(nibbles).first(3)), Error);
  EXPECT_THROW(dequantize_kv(nibbles, 1, std::span(x).first(6)), Error);
}

TEST(Queries, AreFp8PerHead) {
  for (const float size : {1e-9F, 1.0F, 1e5F}) {
    const std::vector<float> x = random_vector(67, size);
    std::vector<float> q = x;
    const float a = quantize_query_in_place(q);
    EXPECT_EQ(a, std::fmax(absmax(x), 0x1p-20F) / 448.0F);
    for (std::size_t i = 0; i < x.size(); ++i) ASSERT_EQ(q[i], round_e4m3(x[i] / a));
  }
}

TEST(Probabilities, CarryTheValueScales) {
  std::uniform_real_distribution<float> uniform(0.0F, 1.0F);
  for (const std::size_t n : {1UL, 3UL, 128UL}) {
    std::vector<float> p(n), sigma(n);
    for (float& v : p) v = uniform(random_source());
    for (float& v : sigma) v = decode_e4m3(static_cast<std::uint8_t>(1 + random_source()() % 0x7e));
    float m = 0;
    for (const float v : sigma) m = std::fmax(m, v);
    std::vector<float> q = p;
    const float back = quantize_probabilities_in_place(q, sigma);
    EXPECT_EQ(back, m / 448.0F);
    for (std::size_t j = 0; j < n; ++j) {
      ASSERT_EQ(q[j], round_e4m3((448.0F * p[j]) * sigma[j] / m));
      ASSERT_NEAR(back * q[j], p[j] * sigma[j], 0.0626F * p[j] * sigma[j] + back * 0x1p-10F);
    }
    q = p;
    EXPECT_EQ(quantize_probabilities_in_place(q, {}), 1.0F / 448.0F);
    for (std::size_t j = 0; j < n; ++j) ASSERT_EQ(q[j], round_e4m3(448.0F * p[j]));
  }
  std::vector<float> one{1.0F};
  EXPECT_EQ(quantize_probabilities_in_place(one, std::vector<float>{0.25F}), 0.25F / 448.0F);
  EXPECT_EQ(one[0], 448.0F);
  const std::vector<float> two(2, 1.0F), zero(1, 0.0F);
  EXPECT_THROW(quantize_probabilities_in_place(one, two), Error);
  EXPECT_THROW(quantize_probabilities_in_place(one, zero), Error);
}

TEST(Metrics, AreTheFormulas) {
  const std::vector<float> reference = random_vector(1000, 1.0F);
  std::vector<float> value = reference;
  for (float& v : value) v += 0.01F * random_vector(1, 1.0F)[0];
  long double signal = 0, noise = 0, largest = 0;
  for (std::size_t i = 0; i < value.size(); ++i) {
    const long double e = static_cast<long double>(value[i]) - static_cast<long double>(reference[i]);
    signal += static_cast<long double>(reference[i]) * static_cast<long double>(reference[i]);
    noise += e * e;
    largest = std::fmax(largest, std::fabs(e));
  }
  ErrorSums whole;
  whole.add(reference, value);
  EXPECT_NEAR(whole.relative_mse(), static_cast<double>(noise / signal), 1e-15);
  EXPECT_NEAR(whole.relative(), static_cast<double>(std::sqrt(noise / signal)), 1e-14);
  EXPECT_NEAR(whole.snr_db(), static_cast<double>(-20 * std::log10(std::sqrt(noise / signal))), 1e-11);
  EXPECT_EQ(whole.max_abs_error, static_cast<double>(largest));
  // (a + b) + c and a + (b + c).
  ErrorSums part[3];
  const std::size_t cut[4] = {0, 123, 600, 1000};
  for (int i = 0; i < 3; ++i) {
    part[i].add(std::span(reference).subspan(cut[i], cut[i + 1] - cut[i]),
                std::span(value).subspan(cut[i], cut[i + 1] - cut[i]));
  }
  ErrorSums left = part[0], right = part[1];
  left.merge(part[1]);
  left.merge(part[2]);
  right.merge(part[2]);
  right.merge(part[0]);
  EXPECT_NEAR(left.error_sq, right.error_sq, 1e-12 * left.error_sq);
  EXPECT_NEAR(left.reference_sq, whole.reference_sq, 1e-12 * whole.reference_sq);
  EXPECT_EQ(left.max_abs_error, whole.max_abs_error);
  EXPECT_EQ(right.max_abs_error, whole.max_abs_error);

  ErrorSums nothing;
  EXPECT_EQ(nothing.relative(), 0);
  EXPECT_EQ(nothing.snr_db(), HUGE_VAL);
  const std::vector<float> zero{0.0F}, one{1.0F}, nan{NAN};
  ErrorSums from_zero;
  from_zero.add(zero, one);
  EXPECT_EQ(from_zero.relative(), HUGE_VAL);
  EXPECT_EQ(from_zero.snr_db(), -HUGE_VAL);
  ErrorSums broken;
  broken.add(one, nan);
  EXPECT_TRUE(std::isnan(broken.relative()));
  EXPECT_EQ(broken.max_abs_error, HUGE_VAL);
  EXPECT_THROW(broken.add(one, reference), Error);
}

TEST(Metrics, OutliersAndMoments) {
  // Two channels of 3 tokens: (1, -2, 3) and (0.5, 0, -1).
  const std::vector<float> top{3.0F, 1.0F};
  const std::vector<double> second{1 + 4 + 9, 0.25 + 1}, fourth{1 + 16 + 81, 0.0625 + 1};
  const ChannelSummary s = summarize(top, second, fourth, 3);
  EXPECT_EQ(s.absmax, 3);
  EXPECT_DOUBLE_EQ(s.rms, std::sqrt(15.25 / 6));
  EXPECT_DOUBLE_EQ(s.max_over_rms, 3 / std::sqrt(15.25 / 6));
  EXPECT_DOUBLE_EQ(s.kurtosis, (99.0625 / 6) / (15.25 / 6) / (15.25 / 6));
  EXPECT_EQ(summarize({}, {}, {}, 0).rms, 0);
  EXPECT_EQ(summarize(std::vector<float>{0}, std::vector<double>{0}, std::vector<double>{0}, 9).kurtosis, 0);
  EXPECT_THROW(summarize(top, second, std::vector<double>{1}, 3), Error);

  const auto outliers = top_outliers(std::vector<float>{1, 9, 2, 9, 3}, 3);
  ASSERT_EQ(outliers.size(), 3U);
  EXPECT_EQ(outliers[0].channel, 1U);  // ties by channel
  EXPECT_EQ(outliers[1].channel, 3U);
  EXPECT_EQ(outliers[2].channel, 4U);
  EXPECT_EQ(outliers[0].absmax, 9);
  EXPECT_EQ(outliers[0].ratio, 3);  // the median is 3
  EXPECT_EQ(top_outliers(std::vector<float>{1, 2, 3, 4}, 1)[0].ratio, 4 / 2.5);
  EXPECT_EQ(top_outliers(std::vector<float>{0, 0, 4}, 9).size(), 3U);
  EXPECT_EQ(top_outliers(std::vector<float>{0, 0, 4}, 1)[0].ratio, HUGE_VAL);
  EXPECT_EQ(top_outliers(std::vector<float>{0, 0}, 1)[0].ratio, 0);
  EXPECT_EQ(top_outliers(std::vector<float>{1, NAN, 5}, 1)[0].channel, 1U);
  EXPECT_TRUE(top_outliers({}, 4).empty());
}

}  // namespace
}  // namespace fireq::libquant
