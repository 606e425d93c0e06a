// Smoothing factors against the formulas of docs/numerics.md, and folding leaves the function unchanged.
#include "libquant/smoothing.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <set>
#include <vector>

#include "common/error.hpp"

namespace fireq::libquant {
namespace {

std::mt19937_64& random_source() {
  static std::mt19937_64 source(std::random_device{}());
  return source;
}
std::vector<float> random_vector(std::size_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(random_source());
  return x;
}
std::vector<double> times(const std::vector<float>& w, std::uint64_t rows, const std::vector<double>& x) {
  std::vector<double> y(rows, 0.0);
  for (std::uint64_t o = 0; o < rows; ++o) {
    for (std::uint64_t j = 0; j < x.size(); ++j) y[o] += static_cast<double>(w[o * x.size() + j]) * x[j];
  }
  return y;
}

TEST(Lambda, IsTheConstantOverTheMean) {
  const std::uint64_t cols = 37;
  const std::vector<float> up = random_vector(11 * cols), gate = random_vector(29 * cols);
  const std::vector<ConstMatrixRef> readers{{up, 11, cols}, {gate, 29, cols}};
  const ChannelScales s = channel_scales(readers, 0.0096);
  ASSERT_EQ(s.lambda.size(), cols);
  EXPECT_EQ(s.clamped, 0U);
  EXPECT_EQ(s.zero, 0U);
  for (std::uint64_t j = 0; j < cols; ++j) {
    double sum = 0;
    for (std::uint64_t o = 0; o < 11; ++o) sum += std::fabs(static_cast<double>(up[o * cols + j]));
    for (std::uint64_t o = 0; o < 29; ++o) sum += std::fabs(static_cast<double>(gate[o * cols + j]));
    EXPECT_NEAR(static_cast<double>(s.lambda[j]), 0.0096 / (sum / 40), 1e-6 * 0.0096 / (sum / 40));
  }
}

TEST(Lambda, ZeroColumnsStayAndExtremesAreClamped) {
  // Means 1, 1, 1, 0, 2^-9, 2^9, 2^-8, 2^8 and c = 2: lambda 2, 2, 2, 1, 2^10, 2^-8, 2^9, 2^-7; the median of
  // the seven that exist is 2, the limits 2^-7 and 2^9.
  const std::vector<float> w{1, -1, 1, 0, 0x1p-9F, -0x1p9F, 0x1p-8F, 0x1p8F};
  const std::vector<ConstMatrixRef> readers{{w, 1, 8}};
  const ChannelScales s = channel_scales(readers, 2);
  EXPECT_EQ(s.lambda, (std::vector<float>{2, 2, 2, 1, 512, 0x1p-7F, 512, 0x1p-7F}));
  EXPECT_EQ(s.clamped, 2U);
  EXPECT_EQ(s.zero, 1U);
  const std::vector<float> zeros(6, 0.0F);
  const std::vector<ConstMatrixRef> nothing{{zeros, 2, 3}};
  EXPECT_EQ(channel_scales(nothing, 1).lambda, std::vector<float>(3, 1.0F));
  EXPECT_EQ(channel_scales(nothing, 1).zero, 3U);
}

TEST(Lambda, RefusesWhatCannotBe) {
  std::vector<float> w(6, 1.0F);
  const std::vector<ConstMatrixRef> good{{w, 2, 3}}, wrong{{w, 2, 2}}, mixed{{w, 2, 3}, {w, 3, 2}};
  EXPECT_THROW(channel_scales({}, 1), Error);
  EXPECT_THROW(channel_scales(wrong, 1), Error);
  EXPECT_THROW(channel_scales(mixed, 1), Error);
  EXPECT_THROW(channel_scales(good, 0), Error);
  EXPECT_THROW(channel_scales(good, NAN), Error);
  w[4] = NAN;
  try {
    channel_scales(good, 1);
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::input);
    EXPECT_THAT(e.what(), testing::HasSubstr("input channel 1"));
  }
}

TEST(Lambda, ValueChannelsFollowTheirHeads) {
  const std::uint64_t heads = 6, kv_heads = 2, dim = 4, rows = 5;
  const std::vector<float> o = random_vector(rows * heads * dim);
  const ChannelScales s = value_channel_scales({o, rows, heads * dim}, heads, kv_heads, dim, 0.5);
  const std::vector<float> spread = expand_value_channels(s.lambda, heads, kv_heads, dim);
  for (std::uint64_t g = 0; g < kv_heads; ++g) {
    for (std::uint64_t d = 0; d < dim; ++d) {
      double sum = 0;
      for (std::uint64_t r = 0; r < 3; ++r) {
        const std::uint64_t column = (g * 3 + r) * dim + d;
        EXPECT_EQ(spread[column], s.lambda[g * dim + d]);
        for (std::uint64_t n = 0; n < rows; ++n)
          sum += std::fabs(static_cast<double>(o[n * heads * dim + column]));
      }
      EXPECT_NEAR(static_cast<double>(s.lambda[g * dim + d]), 0.5 / (sum / (3 * rows)), 1e-5);
    }
  }
  EXPECT_EQ(uniform_value_scales(2, 3), std::vector<float>(6, static_cast<float>(1 / 0.9)));
  EXPECT_THROW(uniform_value_scales(2, 3, 0), Error);
  EXPECT_THROW(expand_value_channels(s.lambda, 5, 2, 4), Error);
  EXPECT_THROW(value_channel_scales({o, rows, heads * dim}, 4, 2, 4, 1), Error);
}

TEST(Folding, LeavesTheFunctionUnchanged) {
  // down(up(x)) with Lambda_3 folded into both, and the bias of up with its rows.
  const std::uint64_t in = 13, hidden = 17, out = 7;
  std::vector<float> up = random_vector(hidden * in), down = random_vector(out * hidden),
                     bias = random_vector(hidden);
  std::vector<double> x(in);
  for (double& v : x) v = static_cast<double>(random_vector(1)[0]);
  const auto forward = [&] {
    std::vector<double> h = times(up, hidden, x);
    for (std::uint64_t j = 0; j < hidden; ++j) h[j] += static_cast<double>(bias[j]);
    return times(down, out, h);
  };
  const std::vector<double> before = forward();
  const std::vector<float> down_before = down;
  const std::vector<ConstMatrixRef> readers{{down, out, hidden}};
  const ChannelScales s = channel_scales(readers, 0.015);
  scale_columns({down, out, hidden}, s.lambda);
  divide_rows({up, hidden, in}, s.lambda);
  divide(bias, s.lambda);
  EXPECT_NE(down, down_before);
  const std::vector<double> after = forward();
  for (std::uint64_t o = 0; o < out; ++o) EXPECT_NEAR(after[o], before[o], 1e-5 * (1 + std::fabs(before[o])));
  // The inverse operations.
  scale_rows({up, hidden, in}, s.lambda);
  scale(bias, s.lambda);
  const std::vector<float> inverse = [&] {
    std::vector<float> v = s.lambda;
    for (float& f : v) f = 1 / f;
    return v;
  }();
  scale_columns({down, out, hidden}, inverse);
  for (std::uint64_t i = 0; i < down.size(); ++i) EXPECT_NEAR(down[i], down_before[i], 1e-6F);
  EXPECT_THROW(scale_columns({down, out, hidden}, bias.empty() ? bias : std::vector<float>(3)), Error);
  EXPECT_THROW(divide_rows({up, hidden, in}, std::vector<float>(3)), Error);
  EXPECT_THROW(divide(bias, std::vector<float>(3)), Error);
}

// The definition, as sets.
KeySmoothing reference_keys(const std::vector<float>& r, const std::vector<float>& m, std::uint64_t heads,
                            std::uint64_t dim, const KeySmoothingOptions& o) {
  KeySmoothing k{std::vector<float>(heads * dim, 1.0F), std::vector<float>(heads * dim, 1.0F)};
  std::set<std::pair<std::uint64_t, std::uint64_t>> touched;  // (head, pair)
  const auto top_k = o.top_k != 0
                         ? o.top_k
                         : std::max<std::uint64_t>(
                               1, static_cast<std::uint64_t>(std::lround(static_cast<double>(dim) / 16)));
  if (o.use_s) {
    for (std::uint64_t h = 0; h < heads; ++h) {
      for (std::uint64_t j = 0; j < dim; ++j) {
        std::uint64_t ahead = 0;  // channels that come before j
        for (std::uint64_t i = 0; i < dim; ++i) {
          const float mi = m[h * dim + i], mj = m[h * dim + j];
          ahead += mi > mj || (mi == mj && i < j) ? 1 : 0;
        }
        if (ahead < top_k) touched.insert({h, j % (dim / 2)});
      }
    }
    for (const auto& [h, pair] : touched) {
      for (const std::uint64_t j : {pair, pair + dim / 2}) {
        const auto value = static_cast<double>(m[h * dim + j]);
        if (value > 0) k.s[h * dim + j] = static_cast<float>(std::pow(o.beta / value, o.s_exponent));
      }
    }
  }
  if (!o.use_n) return k;
  for (std::uint64_t h = 0; h < heads; ++h) {
    for (std::uint64_t i = 0; i < dim / 2; ++i) {
      bool off = false;
      double radius = 0;
      for (std::uint64_t other = 0; other < heads; ++other) {
        if (other != h && !o.shared_heads) continue;
        off = off || touched.contains({other, i});
        radius = std::max(radius, static_cast<double>(r[other * dim / 2 + i]));
      }
      if (off || radius == 0) continue;
      k.n[h * dim + i] = k.n[h * dim + i + dim / 2] =
          static_cast<float>(std::pow(o.alpha / radius, o.n_exponent));
    }
  }
  return k;
}

TEST(Keys, FactorsAreTheDefinition) {
  rc::check("N and S", [] {
    const auto heads = *rc::gen::inRange<std::uint64_t>(1, 5);
    const auto dim = 2 * *rc::gen::inRange<std::uint64_t>(1, 40);
    KeySmoothingOptions options;
    options.use_n = *rc::gen::arbitrary<bool>();
    options.use_s = *rc::gen::arbitrary<bool>();
    options.shared_heads = *rc::gen::arbitrary<bool>();
    options.n_exponent = *rc::gen::element(1.0, 0.5);
    options.s_exponent = *rc::gen::element(1.0, 0.5);
    options.top_k = *rc::gen::inRange<std::uint64_t>(0, dim + 3);
    // Few distinct values: ties and zeros happen.
    std::vector<float> r(heads * dim / 2), m(heads * dim);
    for (float& v : r) v = 0.25F * static_cast<float>(random_source()() % 40);
    for (float& v : m) v = 0.25F * static_cast<float>(random_source()() % 40);
    const KeySmoothing expected = reference_keys(r, m, heads, dim, options);
    const KeySmoothing found = key_smoothing(r, m, heads, dim, options);
    RC_ASSERT(found.n == expected.n);
    RC_ASSERT(found.s == expected.s);
  });
}

TEST(Keys, PaperConstantsAtHeadDim128) {
  std::vector<float> r(64, 2.0F), m(128, 1.0F);
  for (std::uint64_t j = 0; j < 7; ++j) m[10 + j] = 16.0F;  // seven outliers and, by the tie rule, channel 0
  const KeySmoothing k = key_smoothing(r, m, 1, 128, {});
  for (std::uint64_t j = 0; j < 128; ++j) {
    const std::uint64_t pair = j % 64;
    const bool touched = pair == 0 || (pair >= 10 && pair < 17);
    EXPECT_EQ(k.s[j], !touched ? 1.0F : j >= 10 && j < 17 ? 0.5F : 8.0F) << j;
    EXPECT_EQ(k.n[j], touched ? 1.0F : 4.0F) << j;
  }
}

TEST(Keys, SharedHeadsTakeTheLargestRadiusAndAnyHeadResets) {
  // Two heads, D = 4: head 0 touches pair 0, head 1 touches pair 1... with top_k 1; a third pair would stay.
  const std::vector<float> r{1, 2, 4, /**/ 8, 1, 2}, m{9, 1, 1, 1, 1, 1, /**/ 1, 9, 1, 1, 1, 1};
  KeySmoothingOptions options;
  options.top_k = 1;
  options.shared_heads = true;
  const KeySmoothing k = key_smoothing(r, m, 2, 6, options);
  EXPECT_EQ(k.n, (std::vector<float>{1, 1, 2, 1, 1, 2, 1, 1, 2, 1, 1, 2}));
  options.shared_heads = false;
  EXPECT_EQ(key_smoothing(r, m, 2, 6, options).n, (std::vector<float>{1, 4, 2, 1, 4, 2, 1, 1, 4, 1, 1, 4}));
}

TEST(Keys, FoldedNCommutesWithRopeAndCancelsInTheScores) {
  const std::uint64_t dim = 8;
  const std::vector<float> k = random_vector(dim), q = random_vector(dim);
  std::vector<float> r(dim / 2, 0.0F), m(dim, 0.0F);
  for (std::uint64_t i = 0; i < dim / 2; ++i) r[i] = std::hypot(k[i], k[i + dim / 2]);
  const auto rope = [&](const std::vector<float>& x) {
    std::vector<float> y(dim);
    for (std::uint64_t i = 0; i < dim / 2; ++i) {
      const float angle = 0.7F * static_cast<float>(i + 1);
      y[i] = x[i] * std::cos(angle) - x[i + dim / 2] * std::sin(angle);
      y[i + dim / 2] = x[i] * std::sin(angle) + x[i + dim / 2] * std::cos(angle);
    }
    return y;
  };
  const std::vector<float> rotated = rope(k);
  for (std::uint64_t j = 0; j < dim; ++j) m[j] = std::fabs(rotated[j]);
  const KeySmoothing s = key_smoothing(r, m, 1, dim, {});
  const auto dot = [](const std::vector<float>& a, const std::vector<float>& b) {
    double sum = 0;
    for (std::size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    return sum;
  };
  std::vector<float> k2 = k, q2 = q;
  scale(k2, s.n);  // offline
  divide(q2, s.n);
  k2 = rope(k2);
  q2 = rope(q2);
  scale(k2, s.s);  // online
  divide(q2, s.s);
  EXPECT_NEAR(dot(k2, q2), dot(rotated, rope(q)), 1e-5);
  // What smoothing is for: pairs left to N have radius alpha, touched channels have maximum beta.
  for (std::uint64_t i = 0; i < dim / 2; ++i) {
    if (s.s[i] == 1.0F) {
      EXPECT_NEAR(std::hypot(k2[i], k2[i + dim / 2]), 8.0F, 1e-4F);
    } else {
      EXPECT_NEAR(std::fabs(k2[i]), 8.0F, 1e-4F);
    }
  }
}

TEST(Keys, RefusesWhatCannotBe) {
  const std::vector<float> r(4, 1.0F), m(8, 1.0F), infinite(4, HUGE_VALF), negative(8, -1.0F);
  EXPECT_NO_THROW(key_smoothing(r, m, 1, 8, {}));
  EXPECT_THROW(key_smoothing(r, m, 2, 8, {}), Error);
  EXPECT_THROW(key_smoothing(r, m, 1, 7, {}), Error);
  EXPECT_THROW(key_smoothing(r, m, 0, 0, {}), Error);
  EXPECT_THROW(key_smoothing(infinite, m, 1, 8, {}), Error);
  EXPECT_THROW(key_smoothing(r, negative, 1, 8, {}), Error);
  KeySmoothingOptions options;
  options.alpha = 0;
  EXPECT_THROW(key_smoothing(r, m, 1, 8, options), Error);
  // A statistic so small that FP32 cannot hold the factor counts as zero.
  const std::vector<float> tiny(4, 1e-45F);
  options.alpha = 8;
  options.use_s = false;
  EXPECT_EQ(key_smoothing(tiny, m, 1, 8, options).n, std::vector<float>(8, 1.0F));
}

std::vector<double> random_sizes(std::size_t n) {
  std::vector<double> x(n);
  for (double& v : x) v = 0.05 + std::fabs(static_cast<double>(random_vector(1)[0]));
  return x;
}

// The expected error that the factors are made to lessen: mean square of the scale, bounded by the fourth
// moments, times the queries' weight on each channel's error.
double expected_error(const std::vector<double>& q, const std::vector<double>& k,
                      const std::vector<double>& s) {
  double scale = 0, weight = 0;
  for (std::size_t j = 0; j < s.size(); ++j) {
    scale += std::pow(k[j] * s[j], 4);
    weight += q[j] * q[j] / (s[j] * s[j]);
  }
  return std::sqrt(scale) * weight;
}

TEST(KeysBySize, ExponentTwoThirdsHasTheLeastExpectedError) {
  constexpr std::uint64_t kDim = 16;
  const std::vector<double> q = random_sizes(kDim), k = random_sizes(kDim);
  KeySmoothingOptions options;
  options.n_exponent = options.s_exponent = 2.0 / 3.0;
  options.top_k = kDim / 2;  // every channel has its own factor
  const KeySmoothing keys = key_smoothing_by_size(q, k, 1, kDim, options);
  EXPECT_EQ(keys.n, std::vector<float>(kDim, 1.0F));
  const std::vector<double> found(keys.s.begin(), keys.s.end());
  const double least = expected_error(q, k, found);
  for (std::size_t j = 0; j < kDim; ++j) {
    for (const double step : {0.9, 1.1}) {
      std::vector<double> moved = found;
      moved[j] *= step;
      EXPECT_GT(expected_error(q, k, moved), least * (1 + 1e-6)) << j << " by " << step;
    }
  }
  EXPECT_GT(expected_error(q, k, std::vector<double>(kDim, 1.0)), least);
}

TEST(KeysBySize, PairsShareTheirFactorAndTheMostUnequalAreLeftToS) {
  constexpr std::uint64_t kHeads = 3, kDim = 12, kHalf = 6;
  std::vector<double> q = random_sizes(kHeads * kDim), k = random_sizes(kHeads * kDim);
  // Heads that share their factors are compared with one another too: they may not differ more than the
  // pairs.
  for (double& v : q) v = 1 + v / 10;
  for (double& v : k) v = 1 + v / 10;
  for (std::uint64_t h = 0; h < kHeads; ++h) {
    for (std::uint64_t i = 0; i < kHalf; ++i) {  // pair h is unequal in head h, the others nearly equal
      q[h * kDim + i + kHalf] = q[h * kDim + i];
      k[h * kDim + i + kHalf] = k[h * kDim + i] * (i == h ? 20 : 1.01);
    }
  }
  for (const bool shared : {false, true}) {
    KeySmoothingOptions options;
    options.alpha = 5;
    options.n_exponent = options.s_exponent = 0.75;
    options.top_k = shared ? 3 : 1;
    options.shared_heads = shared;
    const KeySmoothing keys = key_smoothing_by_size(q, k, kHeads, kDim, options);
    for (std::uint64_t h = 0; h < kHeads; ++h) {
      double largest = 0;
      for (std::uint64_t j = 0; j < kDim; ++j) {
        const std::uint64_t at = h * kDim + j, pair = j % kHalf;
        const bool touched = shared ? pair < 3 : pair == h;
        EXPECT_EQ(keys.n[at] == 1.0F, touched) << shared << h << j;
        EXPECT_EQ(keys.s[at] == 1.0F, !touched) << shared << h << j;
        EXPECT_EQ(keys.n[at], keys.n[h * kDim + (j + kHalf) % kDim]);
        if (shared) {
          EXPECT_EQ(keys.n[at], keys.n[j]);
        }
        largest = std::max(largest, k[at] * static_cast<double>(keys.n[at] * keys.s[at]));
      }
      if (shared) {
        EXPECT_LT(largest, 5.0 * (1 + 1e-6));
      } else {
        EXPECT_NEAR(largest, 5.0, 1e-5);
      }
      // Two channels of S: in proportion to q^(1/4) / k^(3/4).
      const std::uint64_t a = h * kDim + (shared ? 0 : h), b = a + kHalf;
      const double wanted = std::pow(q[a] / q[b], 0.25) * std::pow(k[b] / k[a], 0.75);
      EXPECT_NEAR(static_cast<double>(keys.s[a] / keys.s[b]), wanted, 1e-5 * wanted);
    }
  }
}

TEST(KeysBySize, SilentChannelsAndImpossibleSizes) {
  std::vector<double> q(8, 1.0), k(8, 1.0);
  q[3] = k[3] = k[5] = 0;
  for (const float f : key_smoothing_by_size(q, k, 1, 8, {}).n) EXPECT_TRUE(std::isnormal(f));
  const KeySmoothing none =
      key_smoothing_by_size(std::vector<double>(8, 0), std::vector<double>(8, 0), 1, 8, {});
  for (std::size_t j = 0; j < 8; ++j) EXPECT_TRUE(std::isnormal(none.n[j] * none.s[j]));
  EXPECT_THROW(key_smoothing_by_size(q, k, 2, 8, {}), Error);
  EXPECT_THROW(key_smoothing_by_size(q, k, 1, 7, {}), Error);
  k[2] = -1;
  EXPECT_THROW(key_smoothing_by_size(q, k, 1, 8, {}), Error);
  k[2] = std::nan("");
  EXPECT_THROW(key_smoothing_by_size(q, k, 1, 8, {}), Error);
}

TEST(Values, RotationIsOrthogonalAndCancels) {
  for (const std::uint64_t dim : {1U, 2U, 48U, 64U}) {
    const std::vector<double> r = spreading_rotation(dim);
    for (std::uint64_t a = 0; a < dim; ++a) {
      for (std::uint64_t b = 0; b < dim; ++b) {
        double sum = 0;
        for (std::uint64_t d = 0; d < dim; ++d) sum += r[d * dim + a] * r[d * dim + b];
        EXPECT_NEAR(sum, a == b ? 1.0 : 0.0, 1e-12);
      }
    }
  }
  constexpr std::uint64_t kHeads = 4, kKvHeads = 2, kDim = 8, kIn = 5, kOut = 7;
  std::vector<float> v = random_vector(kKvHeads * kDim * kIn), o = random_vector(kOut * kHeads * kDim);
  std::vector<float> bias = random_vector(kKvHeads * kDim);
  const std::vector<float> v0 = v, o0 = o, bias0 = bias;
  rotate_values({v, kKvHeads * kDim, kIn}, bias, {o, kOut, kHeads * kDim}, kHeads, kKvHeads, kDim);
  EXPECT_NE(v, v0);
  const auto output = [&](const std::vector<float>& wv, const std::vector<float>& b,
                          const std::vector<float>& wo, const std::vector<double>& x) {
    std::vector<double> value = times(wv, kKvHeads * kDim, x), spread(kHeads * kDim);
    for (std::size_t i = 0; i < value.size(); ++i) value[i] += static_cast<double>(b[i]);
    for (std::uint64_t c = 0; c < spread.size(); ++c) spread[c] = value[c / kDim / 2 * kDim + c % kDim];
    return times(wo, kOut, spread);
  };
  const std::vector<double> x = random_sizes(kIn);
  const std::vector<double> before = output(v0, bias0, o0, x), after = output(v, bias, o, x);
  for (std::size_t i = 0; i < kOut; ++i) EXPECT_NEAR(after[i], before[i], 2e-5);
  std::vector<float> narrow(3);
  EXPECT_THROW(
      rotate_values({v, kKvHeads * kDim, kIn}, narrow, {o, kOut, kHeads * kDim}, kHeads, kKvHeads, kDim),
      Error);
}

}  // namespace
}  // namespace fireq::libquant
