// Highway's dispatch compiles this file once per target. AVX2 and AVX-512 are enough to be fast and keep the
// build short; older CPUs run the plain loops. Scalable vectors cannot be kept in arrays, so they use the
// fixed-size ones.
#include <hwy/detect_targets.h>
#undef HWY_DISABLED_TARGETS
#ifdef HWY_AVX3_ZEN4
#define FIREQ_NEWER_TARGETS (HWY_AVX3_DL | HWY_AVX3_ZEN4)
#else
#define FIREQ_NEWER_TARGETS HWY_AVX3_DL
#endif
#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_SSE4 | FIREQ_NEWER_TARGETS | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "calib/simd_highway.cpp"
#include <hwy/foreach_target.h>
// foreach_target first: it re-includes what follows for each target.
#include <hwy/highway.h>
// highway first: math needs its macros.
#include <hwy/contrib/math/math-inl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "calib/simd.hpp"

HWY_BEFORE_NAMESPACE();
namespace fireq::calib::simd::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;
constexpr D d;
constexpr std::size_t kLanes = hn::MaxLanes(D{});
static_assert(kPanel % (2 * kLanes) == 0);

// Accumulators of the inner tile: rows x 2 vectors. With 32 registers 16 accumulators hide the latency of
// multiply-add and leave loads at 10 per 16; with 16 registers 8 are what fits.
constexpr std::size_t kRows = HWY_TARGET == HWY_AVX3 || HWY_ARCH_ARM_A64 ? 8 : 4;
// k per pass: a panel's part (32 KiB) stays in the first cache while the rows stream past it.
constexpr std::size_t kDepth = 256;

template <bool kAccumulate>
HWY_NOINLINE void tile(const float* const* HWY_RESTRICT rows, const float* HWY_RESTRICT b, std::size_t k,
                       float* HWY_RESTRICT c, std::size_t ldc) {
  V acc[kRows][2];
  const float* r[kRows];
  for (std::size_t i = 0; i < kRows; ++i) {
    r[i] = rows[i];
    acc[i][0] = kAccumulate ? hn::LoadU(d, c + i * ldc) : hn::Zero(d);
    acc[i][1] = kAccumulate ? hn::LoadU(d, c + i * ldc + kLanes) : hn::Zero(d);
  }
  for (std::size_t kk = 0; kk < k; ++kk, b += kPanel) {
    const V b0 = hn::LoadU(d, b);
    const V b1 = hn::LoadU(d, b + kLanes);
    for (std::size_t i = 0; i < kRows; ++i) {
      const V x = hn::Set(d, r[i][kk]);
      acc[i][0] = hn::MulAdd(x, b0, acc[i][0]);
      acc[i][1] = hn::MulAdd(x, b1, acc[i][1]);
    }
  }
  for (std::size_t i = 0; i < kRows; ++i) {
    hn::StoreU(acc[i][0], d, c + i * ldc);
    hn::StoreU(acc[i][1], d, c + i * ldc + kLanes);
  }
}

// A tile at the edge: rows past the end repeat the last one, columns past the end go to a scratch tile.
HWY_NOINLINE void edge_tile(const float* const* rows, std::size_t count, const float* b, std::size_t columns,
                            std::size_t k, float* c, std::size_t ldc, bool accumulate) {
  HWY_ALIGN float scratch[kRows * 2 * kLanes];
  if (accumulate) {
    std::fill(scratch, scratch + kRows * 2 * kLanes, 0.0F);
    for (std::size_t i = 0; i < count; ++i) {
      std::copy(c + i * ldc, c + i * ldc + columns, scratch + i * 2 * kLanes);
    }
  }
  (accumulate ? tile<true> : tile<false>)(rows, b, k, scratch, 2 * kLanes);
  for (std::size_t i = 0; i < count; ++i) {
    std::copy(scratch + i * 2 * kLanes, scratch + i * 2 * kLanes + columns, c + i * ldc);
  }
}

void gemm(const float* a, std::size_t lda, std::size_t m, const float* b, std::size_t panel_stride,
          std::size_t n, std::size_t k, float* c, std::size_t ldc, bool accumulate) {
  std::size_t k0 = 0;
  do {  // once for k = 0 too: it writes zeros
    const std::size_t depth = std::min(kDepth, k - k0);
    const bool add = accumulate || k0 > 0;
    for (std::size_t n0 = 0; n0 < n; n0 += 2 * kLanes) {
      const float* panel = b + n0 / kPanel * panel_stride + k0 * kPanel + n0 % kPanel;
      const std::size_t columns = std::min(2 * kLanes, n - n0);
      for (std::size_t m0 = 0; m0 < m; m0 += kRows) {
        const std::size_t count = std::min(kRows, m - m0);
        const float* rows[kRows];
        for (std::size_t i = 0; i < kRows; ++i) rows[i] = a + (m0 + std::min(i, count - 1)) * lda + k0;
        float* out = c + m0 * ldc + n0;
        if (count == kRows && columns == 2 * kLanes) {
          (add ? tile<true> : tile<false>)(rows, panel, depth, out, ldc);
        } else {
          edge_tile(rows, count, panel, columns, depth, out, ldc, add);
        }
      }
    }
    k0 += depth;
  } while (k0 < k);
}

// Panels side by side, so that eight chains are in flight: a row alone has nothing else to hide latency.
template <std::size_t kSide>
HWY_INLINE void gemv_panels(const float* a, const float* b, std::size_t panel_stride, std::size_t k,
                            float* c) {
  constexpr std::size_t kVectors = kPanel / kLanes;
  V acc[kSide * kVectors];
  for (V& v : acc) v = hn::Zero(d);
  for (std::size_t kk = 0; kk < k; ++kk, b += kPanel) {
    const V x = hn::Set(d, a[kk]);
    for (std::size_t p = 0; p < kSide; ++p) {
      for (std::size_t v = 0; v < kVectors; ++v) {
        V& sum = acc[p * kVectors + v];
        sum = hn::MulAdd(x, hn::LoadU(d, b + p * panel_stride + v * kLanes), sum);
      }
    }
  }
  for (std::size_t i = 0; i < kSide * kVectors; ++i) hn::StoreU(acc[i], d, c + i * kLanes);
}

void gemv(const float* a, const float* b, std::size_t n, std::size_t k, float* c) {
  constexpr std::size_t kSide = std::max<std::size_t>(1, kLanes / 4);
  const std::size_t stride = kPanel * k;
  std::size_t n0 = 0;
  for (; n0 + kSide * kPanel <= n; n0 += kSide * kPanel) {
    gemv_panels<kSide>(a, b + n0 / kPanel * stride, stride, k, c + n0);
  }
  for (; n0 < n; n0 += kPanel) {
    HWY_ALIGN float scratch[kPanel];
    gemv_panels<1>(a, b + n0 / kPanel * stride, stride, k, scratch);
    std::copy(scratch, scratch + std::min(kPanel, n - n0), c + n0);
  }
}

HWY_INLINE float sum_lanes(V v) {
  return hn::GetLane(hn::SumOfLanes(d, v));
}
HWY_INLINE float max_lanes(V v) {
  return hn::GetLane(hn::MaxOfLanes(d, v));
}

void rms_norm(const float* x, const float* weight, float eps, std::size_t n, float* y) {
  V s0 = hn::Zero(d);
  V s1 = hn::Zero(d);
  std::size_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const V a = hn::LoadU(d, x + i);
    const V b = hn::LoadU(d, x + i + kLanes);
    s0 = hn::MulAdd(a, a, s0);
    s1 = hn::MulAdd(b, b, s1);
  }
  float sum = sum_lanes(hn::Add(s0, s1));
  for (; i < n; ++i) sum += x[i] * x[i];
  const float inverse = 1.0F / std::sqrt(sum / static_cast<float>(n) + eps);
  const V scale = hn::Set(d, inverse);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    hn::StoreU(hn::Mul(hn::Mul(hn::LoadU(d, x + i), scale), hn::LoadU(d, weight + i)), d, y + i);
  }
  for (; i < n; ++i) y[i] = x[i] * inverse * weight[i];
}

// x / (1 + exp(-x)); where exp(-x) would overflow the quotient is 0 to FP32's precision.
HWY_INLINE V silu(V x) {
  const V e = hn::Exp(d, hn::Min(hn::Neg(x), hn::Set(d, 88.0F)));
  return hn::Div(x, hn::Add(hn::Set(d, 1.0F), e));
}

void silu_mul(float* gate, const float* up, std::size_t n) {
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    hn::StoreU(hn::Mul(silu(hn::LoadU(d, gate + i)), hn::LoadU(d, up + i)), d, gate + i);
  }
  if (i < n) {
    HWY_ALIGN float scratch[kLanes] = {};
    std::copy(gate + i, gate + n, scratch);
    hn::Store(silu(hn::Load(d, scratch)), d, scratch);
    for (std::size_t j = 0; i + j < n; ++j) gate[i + j] = scratch[j] * up[i + j];
  }
}

bool all_finite(const float* x, std::size_t n) {
  V acc = hn::Zero(d);  // 0 * x is 0, or NaN for what is not finite
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) acc = hn::MulAdd(hn::LoadU(d, x + i), hn::Zero(d), acc);
  float rest = sum_lanes(acc);
  for (; i < n; ++i) rest += 0.0F * x[i];
  return rest == 0.0F;
}

float scale_scores(float* s, float scale, const float* sigma, std::size_t n) {
  const V factor = hn::Set(d, scale);
  V top = hn::Set(d, -3.402823466e38F);
  std::size_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    V x = hn::Mul(hn::LoadU(d, s + j), factor);
    if (sigma != nullptr) x = hn::Mul(x, hn::LoadU(d, sigma + j));
    hn::StoreU(x, d, s + j);
    top = hn::Max(top, x);
  }
  float largest = max_lanes(top);
  for (; j < n; ++j) {
    s[j] *= scale;
    if (sigma != nullptr) s[j] *= sigma[j];
    largest = std::max(largest, s[j]);
  }
  return largest;
}

float exp_minus(float* s, float max, std::size_t n) {
  const V top = hn::Set(d, max);
  V acc = hn::Zero(d);
  std::size_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const V e = hn::Exp(d, hn::Sub(hn::LoadU(d, s + j), top));
    hn::StoreU(e, d, s + j);
    acc = hn::Add(acc, e);
  }
  if (j < n) {  // lanes past the end are exp(-inf): they add nothing, so that the sum has one order for any n
    HWY_ALIGN float scratch[kLanes];
    std::fill(scratch, scratch + kLanes, -3.0e38F);
    for (std::size_t i = j; i < n; ++i) scratch[i - j] = s[i] - max;
    const V e = hn::Exp(d, hn::Load(d, scratch));
    hn::Store(e, d, scratch);
    std::copy(scratch, scratch + (n - j), s + j);
    acc = hn::Add(acc, e);
  }
  return sum_lanes(acc);
}

void rescale_add(float* acc, float keep, const float* part, float factor, std::size_t n) {
  const V k = hn::Set(d, keep);
  const V f = hn::Set(d, factor);
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    hn::StoreU(hn::MulAdd(hn::LoadU(d, part + i), f, hn::Mul(hn::LoadU(d, acc + i), k)), d, acc + i);
  }
  for (; i < n; ++i) acc[i] = std::fma(part[i], factor, acc[i] * keep);
}

float largest_of(const float* x, std::size_t n) {
  V top = hn::Set(d, -3.402823466e38F);
  std::size_t j = 0;
  for (; j + kLanes <= n; j += kLanes) top = hn::Max(top, hn::LoadU(d, x + j));
  float largest = max_lanes(top);
  for (; j < n; ++j) largest = std::max(largest, x[j]);
  return largest;
}

// Raises the running maximum; returns the factor for what was summed under the old one.
double raise(LogSumExp& state, float largest) {
  if (largest <= state.max) return 1.0;
  const double factor = state.sum > 0 ? std::exp(static_cast<double>(state.max) - largest) : 0.0;
  state.max = largest;
  state.sum *= factor;
  return factor;
}

void log_sum_exp(LogSumExp& state, const float* logits, std::size_t n) {
  raise(state, largest_of(logits, n));
  const V top = hn::Set(d, state.max);
  V s0 = hn::Zero(d);
  V s1 = hn::Zero(d);
  std::size_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    s0 = hn::Add(s0, hn::Exp(d, hn::Sub(hn::LoadU(d, logits + j), top)));
    s1 = hn::Add(s1, hn::Exp(d, hn::Sub(hn::LoadU(d, logits + j + kLanes), top)));
  }
  auto sum = static_cast<double>(sum_lanes(hn::Add(s0, s1)));
  for (; j < n; ++j) sum += std::exp(static_cast<double>(logits[j]) - state.max);
  state.sum += sum;
}

void divergence(Divergence& state, const float* reference, const float* model, std::size_t n) {
  log_sum_exp(state.model, model, n);
  state.weighted *= raise(state.reference, largest_of(reference, n));
  const V top = hn::Set(d, state.reference.max);
  V s0 = hn::Zero(d);  // summed in log_sum_exp's order: equal rows have a divergence of exactly 0
  V s1 = hn::Zero(d);
  V weighted = hn::Zero(d);
  std::size_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    const V r0 = hn::LoadU(d, reference + j);
    const V r1 = hn::LoadU(d, reference + j + kLanes);
    const V e0 = hn::Exp(d, hn::Sub(r0, top));
    const V e1 = hn::Exp(d, hn::Sub(r1, top));
    s0 = hn::Add(s0, e0);
    s1 = hn::Add(s1, e1);
    weighted = hn::MulAdd(e0, hn::Sub(r0, hn::LoadU(d, model + j)), weighted);
    weighted = hn::MulAdd(e1, hn::Sub(r1, hn::LoadU(d, model + j + kLanes)), weighted);
  }
  auto sum = static_cast<double>(sum_lanes(hn::Add(s0, s1)));
  auto rest = static_cast<double>(sum_lanes(weighted));
  for (; j < n; ++j) {
    const double e = std::exp(static_cast<double>(reference[j]) - state.reference.max);
    sum += e;
    rest += e * (static_cast<double>(reference[j]) - static_cast<double>(model[j]));
  }
  state.reference.sum += sum;
  state.weighted += rest;
}

Kernels table() {
  return {hwy::TargetName(HWY_TARGET),
          gemm,
          gemv,
          rms_norm,
          silu_mul,
          all_finite,
          scale_scores,
          exp_minus,
          rescale_add,
          log_sum_exp,
          divergence};
}

}  // namespace fireq::calib::simd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fireq::calib::simd {
HWY_EXPORT(table);

const Kernels& kernels() {
  static const Kernels chosen = (hwy::SupportedTargets() & HWY_TARGETS & ~(HWY_EMU128 | HWY_SCALAR)) != 0
                                    ? HWY_DYNAMIC_DISPATCH(table)()
                                    : plain_kernels();
  return chosen;
}

std::vector<Kernels> all_kernels() {
  std::vector<Kernels> out{plain_kernels()};
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    out.push_back(HWY_DYNAMIC_DISPATCH(table)());
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  return out;
}
}  // namespace fireq::calib::simd
#endif
