#include "libquant/kv_rounding.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "common/error.hpp"
#include "libquant/kv_quantizer.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::libquant {
namespace {

std::mt19937_64& random() {
  static std::mt19937_64 generator(std::random_device{}());
  return generator;
}

std::vector<float> random_vector(std::size_t n, double size) {
  std::normal_distribution<double> normal(0, size);
  std::vector<float> x(n);
  for (float& v : x) v = static_cast<float>(normal(random()));
  return x;
}

// A^T A of `rows` random rows: of a lower rank than D where rows < D.
std::vector<double> random_moment(std::uint64_t d, std::uint64_t rows) {
  std::vector<double> moment(d * d, 0.0);
  for (std::uint64_t r = 0; r < rows; ++r) {
    const std::vector<float> a = random_vector(d, 1);
    for (std::uint64_t i = 0; i < d; ++i) {
      for (std::uint64_t j = 0; j < d; ++j) {
        moment[i * d + j] += static_cast<double>(a[i]) * static_cast<double>(a[j]);
      }
    }
  }
  return moment;
}

double quadratic(const std::vector<double>& h, const std::vector<double>& e) {
  double sum = 0;
  for (std::size_t i = 0; i < e.size(); ++i) {
    for (std::size_t j = 0; j < e.size(); ++j) sum += e[i] * h[i * e.size() + j] * e[j];
  }
  return sum;
}

std::vector<double> error_of(const std::vector<float>& x, const std::vector<float>& codes, float sigma) {
  std::vector<double> e(x.size());
  for (std::size_t i = 0; i < e.size(); ++i) {
    e[i] = static_cast<double>(x[i]) - static_cast<double>(codes[i]) * static_cast<double>(sigma);
  }
  return e;
}

TEST(KvRounding, FactorIsThatOfTheDampedMoment) {
  for (const std::uint64_t d : {1U, 2U, 8U, 64U}) {
    for (const std::uint64_t rows : {std::uint64_t{1}, d / 2 + 1, 4 * d}) {
      const std::vector<double> moment = random_moment(d, rows);
      const std::vector<float> factor = kv_rounding(moment, d);
      ASSERT_EQ(factor.size(), kv_rounding_size(d));
      // U from its numbers, its scale from that of the moment's corner.
      std::vector<double> diagonal(d);
      std::size_t at = 0;
      for (std::uint64_t i = 0; i < d; at += d - i, ++i)
        diagonal[i] = std::sqrt(static_cast<double>(factor[at]));
      EXPECT_EQ(*std::max_element(diagonal.begin(), diagonal.end()), 1.0);
      std::vector<double> upper(d * d, 0.0);
      at = 0;
      for (std::uint64_t i = 0; i < d; ++i) {
        for (std::uint64_t j = i; j < d; ++j, ++at) {
          EXPECT_EQ(factor[at], round_bf16(factor[at]));
          upper[i * d + j] = i == j ? diagonal[i] : static_cast<double>(factor[at]) * diagonal[j];
        }
      }
      double mean = 0;
      for (std::uint64_t i = 0; i < d; ++i) mean += moment[i * d + i] / static_cast<double>(d);
      const double last = moment[d * d - 1] + 0.01 * mean;
      const double unit = last / (upper[d * d - 1] * upper[d * d - 1]);
      for (std::uint64_t i = 0; i < d; ++i) {
        for (std::uint64_t j = 0; j < d; ++j) {
          double product = 0;
          for (std::uint64_t k = 0; k < d; ++k) product += upper[i * d + k] * upper[j * d + k];
          const double expected = moment[i * d + j] + (i == j ? 0.01 * mean : 0);
          const double size = std::sqrt((moment[i * d + i] + mean) * (moment[j * d + j] + mean));
          EXPECT_NEAR(product * unit, expected, 0.03 * size) << d << " " << rows << " " << i << " " << j;
        }
      }
    }
  }
}

// Codes under one sigma, from the moment and not from its factor: channel j is the real number that makes the
// whole error least, channels before it fixed and those behind it free, rounded.
std::vector<double> by_elimination(std::vector<double> h, const std::vector<float>& x, double sigma) {
  const std::size_t d = x.size();
  std::vector<double> inverse(d * d, 0.0);  // Gauss-Jordan
  for (std::size_t i = 0; i < d; ++i) inverse[i * d + i] = 1;
  for (std::size_t p = 0; p < d; ++p) {
    const double pivot = h[p * d + p];
    for (std::size_t c = 0; c < d; ++c) h[p * d + c] /= pivot, inverse[p * d + c] /= pivot;
    for (std::size_t r = 0; r < d; ++r) {
      const double factor = h[r * d + p];
      if (r == p || factor == 0) continue;
      for (std::size_t c = 0; c < d; ++c) {
        h[r * d + c] -= factor * h[p * d + c];
        inverse[r * d + c] -= factor * inverse[p * d + c];
      }
    }
  }
  // Optimal brain surgeon: an error of channel j moves what the later ones should be.
  std::vector<double> wanted(x.begin(), x.end()), codes(d);
  for (std::size_t j = 0; j < d; ++j) {
    codes[j] = std::nearbyint(std::clamp(wanted[j] / sigma, -7.0, 7.0));
    const double step = (wanted[j] - codes[j] * sigma) / inverse[j * d + j];
    for (std::size_t k = j; k < d; ++k) wanted[k] -= step * inverse[j * d + k];
    const double pivot = inverse[j * d + j];
    for (std::size_t r = j + 1; r < d; ++r) {
      const double factor = inverse[r * d + j] / pivot;
      for (std::size_t c = j; c < d; ++c) inverse[r * d + c] -= factor * inverse[j * d + c];
    }
  }
  return codes;
}

TEST(KvRounding, CodesAreThoseOfEliminationAndSigmaTheBestOfThem) {
  int same = 0, all = 0;
  for (int repeat = 0; repeat < 60; ++repeat) {
    const std::uint64_t d = 12;
    std::vector<double> moment = random_moment(d, 40);
    const std::vector<float> factor = kv_rounding(moment, d);
    double mean = 0;
    for (std::uint64_t i = 0; i < d; ++i) mean += moment[i * d + i] / static_cast<double>(d);
    for (std::uint64_t i = 0; i < d; ++i) moment[i * d + i] += 0.01 * mean;
    for (const KvPart part : {KvPart::key, KvPart::value}) {
      const std::vector<float> x = random_vector(d, 2);
      std::vector<float> codes = x;
      const float sigma = quantize_kv_together(codes, factor, part);
      double least = std::numeric_limits<double>::infinity();
      double best_sigma = 0;
      std::vector<double> best;
      for (int offset = part == KvPart::key ? -1 : 0; offset <= 3; ++offset) {
        const float s = decode_e4m3(static_cast<std::uint8_t>(kv_scale_code(x) + offset));
        const std::vector<double> c = by_elimination(moment, x, static_cast<double>(s));
        const double error = quadratic(moment, error_of(x, {c.begin(), c.end()}, s));
        if (error < least) least = error, best_sigma = static_cast<double>(s), best = c;
      }
      const double error = quadratic(moment, error_of(x, codes, sigma));
      EXPECT_LT(error, 1.6 * least + 1e-9);
      ++all;
      same += best_sigma == static_cast<double>(sigma) && std::equal(best.begin(), best.end(), codes.begin())
                  ? 1
                  : 0;
    }
  }
  // The factor is in BF16: a code on the edge, or two scales that are as good, may come out the other way.
  EXPECT_GT(same, all * 3 / 4) << "of " << all;
}

TEST(KvRounding, LessensTheErrorUnderTheMoment) {
  const std::uint64_t d = 32;
  const std::vector<double> moment = random_moment(d, 10);
  const std::vector<float> factor = kv_rounding(moment, d);
  for (const KvPart part : {KvPart::key, KvPart::value}) {
    double alone = 0, together = 0;
    for (int repeat = 0; repeat < 100; ++repeat) {
      const std::vector<float> x = random_vector(d, 3);
      std::vector<float> codes = x;
      const float nearest = quantize_kv_in_place(codes);
      alone += quadratic(moment, error_of(x, codes, nearest));
      codes = x;
      const float sigma = quantize_kv_together(codes, factor, part);
      if (part == KvPart::value) {
        EXPECT_GE(sigma, nearest);
      }
      for (const float c : codes) {
        EXPECT_EQ(c, std::nearbyint(c));
        EXPECT_LE(std::fabs(c), 7);
      }
      together += quadratic(moment, error_of(x, codes, sigma));
    }
    EXPECT_LT(together, 0.5 * alone);
  }
}

TEST(KvRounding, OddInputsStayInTheFormat) {
  const std::vector<float> unit = kv_rounding(std::vector<double>(16, 0.0), 4);  // of no queries at all
  EXPECT_EQ(unit, (std::vector<float>{1, 0, 0, 0, 1, 0, 0, 1, 0, 1}));
  for (const float size : {0.0F, 1e-30F, 1e30F}) {
    std::vector<float> x{size, -size, size / 2, 0};
    const float sigma = quantize_kv_together(x, unit, KvPart::key);
    EXPECT_GE(sigma, 0x1p-9F);
    EXPECT_LE(sigma, 448);
    for (const float c : x) EXPECT_LE(std::fabs(c), 7);
  }
  std::vector<float> x{1, NAN, 1, 1};
  try {
    quantize_kv_together(x, unit, KvPart::value);
    FAIL();
  } catch (const Error& e) {
    EXPECT_THAT(e.found(), testing::HasSubstr("NaN in channel 1"));
  }
  EXPECT_THROW(quantize_kv_together(x, std::span(unit).first(9), KvPart::key), Error);
  std::vector<double> bad(16, 1.0);
  bad[5] = std::numeric_limits<double>::infinity();
  EXPECT_THROW(kv_rounding(bad, 4), Error);
}

}  // namespace
}  // namespace fireq::libquant
