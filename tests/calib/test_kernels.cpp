// The inner loops against the same sums in double, for every variant this CPU can run; matrix products; the
// key/value cache.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "calib/gemm.hpp"
#include "calib/kv_cache.hpp"
#include "calib/simd.hpp"
#include "common/error.hpp"
#include "tests/calib/support.hpp"

namespace fireq::calib {
namespace {

using test::Random;

const std::vector<simd::Kernels>& variants() {
  static const std::vector<simd::Kernels> all = simd::all_kernels();
  return all;
}

constexpr float kPoison = 1.0e30F;

struct Product {
  std::uint64_t m, n, k;
};

std::vector<double> product_in_double(const std::vector<float>& a, const std::vector<float>& b,
                                      const Product& s) {
  std::vector<double> c(s.m * s.n);
  for (std::uint64_t i = 0; i < s.m; ++i) {
    for (std::uint64_t j = 0; j < s.n; ++j) {
      for (std::uint64_t k = 0; k < s.k; ++k) {
        c[i * s.n + j] += static_cast<double>(a[i * s.k + k]) * static_cast<double>(b[j * s.k + k]);
      }
    }
  }
  return c;
}

TEST(Variants, IncludeThePlainLoopsAndTheChosenOnes) {
  std::vector<std::string> names;
  for (const simd::Kernels& v : variants()) names.emplace_back(v.target);
  EXPECT_THAT(names, testing::Contains("plain"));
  EXPECT_THAT(names, testing::Contains(std::string(simd::kernels().target)));
}

TEST(Gemm, EveryVariantMatchesDoubleAtTheEdgesOfItsTiles) {
  Random random(1);
  for (const std::uint64_t m : {1U, 3U, 4U, 7U, 8U, 9U, 17U}) {
    for (const std::uint64_t n : {1U, 15U, 16U, 31U, 32U, 33U, 65U}) {
      for (const std::uint64_t k : {1U, 2U, 63U, 255U, 256U, 257U, 530U}) {
        const Product s{m, n, k};
        const auto a = random.normals(m * k);
        const auto b = random.normals(n * k);
        const Panels panels(b, n, k, 1);
        const auto expected = product_in_double(a, b, s);
        const std::size_t ldc = n + 3;
        for (const simd::Kernels& v : variants()) {
          std::vector<float> c(m * ldc, kPoison);
          v.gemm(a.data(), k, m, panels.panel(0), 32 * k, n, k, c.data(), ldc, false);
          std::vector<float> doubled = c;
          v.gemm(a.data(), k, m, panels.panel(0), 32 * k, n, k, doubled.data(), ldc, true);
          for (std::uint64_t i = 0; i < m; ++i) {
            for (std::uint64_t j = 0; j < n; ++j) {
              const double e = expected[i * n + j];
              const double bound = 1e-6 * std::sqrt(static_cast<double>(k)) * 8;
              ASSERT_NEAR(c[i * ldc + j], e, bound) << v.target << " " << m << "x" << n << "x" << k;
              ASSERT_NEAR(doubled[i * ldc + j], 2 * e, 2 * bound) << v.target;
            }
            for (std::uint64_t j = n; j < ldc; ++j) ASSERT_EQ(c[i * ldc + j], kPoison) << v.target;
          }
        }
      }
    }
  }
}

TEST(Gemm, OneRowHasTheBitsOfManyAndOfAnyCutOfColumns) {
  Random random(2);
  const Product s{11, 150, 300};
  const auto a = random.normals(s.m * s.k);
  const Panels panels(random.normals(s.n * s.k), s.n, s.k, 1);
  for (const simd::Kernels& v : variants()) {
    std::vector<float> all(s.m * s.n);
    v.gemm(a.data(), s.k, s.m, panels.panel(0), 32 * s.k, s.n, s.k, all.data(), s.n, false);
    for (std::uint64_t i = 0; i < s.m; ++i) {
      std::vector<float> row(s.n, kPoison);
      v.gemv(a.data() + i * s.k, panels.panel(0), s.n, s.k, row.data());
      EXPECT_TRUE(test::same_bits(row, std::span(all).subspan(i * s.n, s.n))) << v.target;
      std::vector<float> cut(s.n, kPoison);
      v.gemm(a.data() + i * s.k, s.k, 1, panels.panel(0), 32 * s.k, 64, s.k, cut.data(), s.n, false);
      v.gemm(a.data() + i * s.k, s.k, 1, panels.panel(2), 32 * s.k, s.n - 64, s.k, cut.data() + 64, s.n,
             false);
      EXPECT_TRUE(test::same_bits(cut, row)) << v.target;
    }
  }
}

TEST(Gemm, MatricesMatchDoubleAndAnyThreadCountGivesTheSameBits) {
  Random random(3);
  const Product s{261, 333, 97};
  const auto a = random.normals(s.m * s.k);
  const auto b = random.normals(s.n * s.k);
  std::vector<float> one(s.m * s.n, kPoison);
  gemm_nt(a, b, one, s.m, s.n, s.k, 1);
  EXPECT_LT(test::relative_error(product_in_double(a, b, s), one), 1e-6);
  for (const int threads : {2, 3, 7}) {
    std::vector<float> many(s.m * s.n, kPoison);
    gemm_nt(a, b, many, s.m, s.n, s.k, threads);
    EXPECT_TRUE(test::same_bits(one, many)) << threads;
  }
  const Panels panels(b, s.n, s.k, 2);
  std::vector<float> row(s.n, kPoison);
  multiply(a.data(), s.k, 1, panels, row.data(), s.n, 2);
  EXPECT_TRUE(test::same_bits(row, std::span(one).first(s.n)));
}

TEST(Gemm, RowsMayComeInAnyCutAndMustFit) {
  Random random(4);
  const auto b = random.normals(70 * 13);
  const Panels whole(b, 70, 13, 1);
  Panels pieces(70, 13);
  for (std::uint64_t begin = 0; begin < 70;) {
    const std::uint64_t count = std::min<std::uint64_t>(1 + random.below(40), 70 - begin);
    pieces.set_rows(begin, std::span(b).subspan(begin * 13, count * 13));
    begin += count;
  }
  EXPECT_TRUE(test::same_bits({whole.panel(0), whole.bytes() / 4}, {pieces.panel(0), pieces.bytes() / 4}));
  EXPECT_THROW(pieces.set_rows(69, std::span(b).first(26)), Error);
  EXPECT_THROW(pieces.set_rows(0, std::span(b).first(14)), Error);
  std::vector<float> c(4);
  EXPECT_THROW(gemm_nt(b, b, c, 2, 2, 13, 1), Error);
}

TEST(Loops, RmsNormAndSiluMatchDouble) {
  Random random(5);
  for (std::size_t n = 1; n < 70; ++n) {
    const auto x = random.normals(n, 3);
    const auto weight = random.normals(n);
    const auto up = random.normals(n);
    auto gate = random.normals(n, 4);
    gate[random.below(n)] = -120;  // exp overflows: the result is 0
    gate[random.below(n)] = 95;
    double square = 0;
    for (const float v : x) square += static_cast<double>(v) * static_cast<double>(v);
    const double inverse = 1 / std::sqrt(square / static_cast<double>(n) + 1e-5);
    for (const simd::Kernels& v : variants()) {
      std::vector<float> y(n + 1, kPoison);
      v.rms_norm(x.data(), weight.data(), 1e-5F, n, y.data());
      std::vector<float> s = gate;
      s.push_back(kPoison);
      v.silu_mul(s.data(), up.data(), n);
      for (std::size_t i = 0; i < n; ++i) {
        const double normed = static_cast<double>(x[i]) * inverse * static_cast<double>(weight[i]);
        ASSERT_NEAR(y[i], normed, 1e-6 * std::fabs(normed) + 1e-30) << v.target << n;
        const double g = static_cast<double>(gate[i]);
        const double silu = g / (1 + std::exp(-g)) * static_cast<double>(up[i]);
        ASSERT_NEAR(s[i], silu, 3e-7 * std::fabs(silu) + 1e-30) << v.target << " " << g;
      }
      ASSERT_EQ(y[n], kPoison);
      ASSERT_EQ(s[n], kPoison);
    }
  }
}

TEST(Loops, EveryPositionOfANonFiniteValueIsSeen) {
  const float bad[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                       -std::numeric_limits<float>::infinity()};
  for (const simd::Kernels& v : variants()) {
    for (std::size_t n = 1; n < 40; ++n) {
      std::vector<float> x(n, std::numeric_limits<float>::max());
      x.push_back(bad[0]);  // past the end
      EXPECT_TRUE(v.all_finite(x.data(), n)) << v.target;
      for (std::size_t i = 0; i < n; ++i) {
        const float keep = x[i];
        x[i] = bad[i % 3];
        EXPECT_FALSE(v.all_finite(x.data(), n)) << v.target << " " << i << " of " << n;
        x[i] = keep;
      }
    }
  }
}

TEST(Loops, SoftmaxStepsMatchDouble) {
  Random random(6);
  for (std::size_t n = 1; n <= 128; ++n) {
    const auto raw = random.normals(n, 5);
    auto sigma = random.normals(n);
    for (float& s : sigma) s = std::fabs(s);
    for (const simd::Kernels& v : variants()) {
      for (const bool scaled : {false, true}) {
        std::vector<float> s = raw;
        s.push_back(kPoison);
        const float largest = v.scale_scores(s.data(), 0.37F, scaled ? sigma.data() : nullptr, n);
        double top = -1e300;
        for (std::size_t j = 0; j < n; ++j) {
          const float product = raw[j] * 0.37F;
          ASSERT_EQ(s[j], scaled ? product * sigma[j] : product) << v.target;
          top = std::max(top, static_cast<double>(s[j]));
        }
        ASSERT_EQ(static_cast<double>(largest), top);
        const std::vector<float> before = s;
        const float sum = v.exp_minus(s.data(), largest, n);
        double expected = 0;
        for (std::size_t j = 0; j < n; ++j) {
          const double below = top - static_cast<double>(before[j]);
          const double e = std::exp(-below);
          ASSERT_NEAR(s[j], e, (4e-7 + 6e-8 * below) * e) << v.target;  // the difference is rounded to FP32
          expected += e;
        }
        ASSERT_NEAR(sum, expected, 2e-6 * expected) << v.target;
        ASSERT_EQ(s[n], kPoison);
      }
      std::vector<float> acc = raw;
      v.rescale_add(acc.data(), 0.5F, sigma.data(), 2.0F, n);
      for (std::size_t j = 0; j < n; ++j)
        ASSERT_FLOAT_EQ(acc[j], raw[j] * 0.5F + sigma[j] * 2.0F) << v.target;
    }
  }
}

TEST(Loops, LogSumExpAndDivergenceOverTilesMatchLongDouble) {
  Random random(7);
  for (const double scale : {0.1, 3.0, 400.0}) {
    const std::size_t n = 1001;
    const auto r = random.normals(n, scale);
    auto m = r;
    for (float& x : m) x += random.normal(0.2 * scale);
    const auto log_sum = [](const std::vector<float>& x) {
      long double top = *std::max_element(x.begin(), x.end());
      long double sum = 0;
      for (const float v : x) sum += std::exp(static_cast<long double>(v) - top);
      return top + std::log(sum);
    };
    const long double lr = log_sum(r);
    const long double lm = log_sum(m);
    long double kl = 0;
    for (std::size_t i = 0; i < n; ++i) {
      kl += std::exp(static_cast<long double>(r[i]) - lr) *
            ((static_cast<long double>(r[i]) - lr) - (static_cast<long double>(m[i]) - lm));
    }
    for (const simd::Kernels& v : variants()) {
      simd::LogSumExp sum;
      simd::Divergence both;
      simd::Divergence self;
      for (std::size_t begin = 0; begin < n;) {
        const std::size_t count = std::min<std::size_t>(1 + random.below(300), n - begin);
        v.log_sum_exp(sum, r.data() + begin, count);
        v.divergence(both, r.data() + begin, m.data() + begin, count);
        v.divergence(self, r.data() + begin, r.data() + begin, count);
        begin += count;
      }
      EXPECT_NEAR(simd::value(sum), static_cast<double>(lr), 2e-6 + 1e-12 * scale) << v.target;
      EXPECT_NEAR(simd::value(both), static_cast<double>(kl), 1e-5 + 2e-6 * static_cast<double>(kl))
          << v.target << " " << scale;
      EXPECT_EQ(simd::value(self), 0.0) << v.target;
    }
  }
}

TEST(KvCache, GivesBackWhatWasPutAndKeepsItWhenItGrows) {
  Random random(8);
  for (const std::uint64_t dim : {6U, 32U, 48U, 80U}) {
    KvCache cache(1, 2, dim, 100);
    EXPECT_EQ(cache.capacity(), 128U);
    std::vector<std::vector<float>> keys, values;
    std::vector<float> scales;
    for (std::uint64_t position = 0; position < 300; ++position) {
      if (position == cache.capacity()) cache.reserve(2 * position);
      for (std::uint64_t head = 0; head < 2; ++head) {
        keys.push_back(random.normals(dim));
        values.push_back(random.normals(dim));
        scales.push_back(random.normal());
        cache.put(0, head, position, keys.back(), scales.back(), values.back(), -scales.back());
      }
    }
    for (std::uint64_t i = 0; i < keys.size(); ++i) {
      const std::uint64_t head = i % 2;
      const std::uint64_t position = i / 2;
      const std::uint64_t block = position / 128;
      const std::uint64_t row = position % 128;
      EXPECT_EQ(cache.key_scales(0, head, block)[row], scales[i]);
      EXPECT_EQ(cache.value_scales(0, head, block)[row], -scales[i]);
      for (std::uint64_t c = 0; c < dim; ++c) {
        ASSERT_EQ(cache.keys(0, head, block)[row / 32 * cache.key_panel_stride() + c * 32 + row % 32],
                  keys[i][c]);
        ASSERT_EQ(cache.values(0, head, block)[c / 32 * 128 * 32 + row * 32 + c % 32], values[i][c]);
      }
    }
    EXPECT_THROW(cache.put(0, 2, 0, keys[0], 1, values[0], 1), Error);
    EXPECT_THROW(cache.put(0, 0, cache.capacity(), keys[0], 1, values[0], 1), Error);
  }
}

}  // namespace
}  // namespace fireq::calib
