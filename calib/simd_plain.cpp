// The same loops in plain C++: for builds without Highway and CPUs without AVX2, and as the tests' reference.
#include <algorithm>
#include <cmath>

#include "calib/simd.hpp"

namespace fireq::calib::simd {

double value(const LogSumExp& state) {
  return static_cast<double>(state.max) + std::log(state.sum);
}

double value(const Divergence& state) {
  // sum p_r * (log p_r - log p_m), the two normalisers taken out of the sum.
  return state.weighted / state.reference.sum - (value(state.reference) - value(state.model));
}

namespace plain {

constexpr std::size_t kRows = 4;
constexpr std::size_t kColumns = 8;

void tile(const float* const* rows, const float* b, std::size_t k, float (&acc)[kRows][kColumns]) {
  for (std::size_t kk = 0; kk < k; ++kk, b += kPanel) {
    for (std::size_t i = 0; i < kRows; ++i) {
      const float x = rows[i][kk];
      for (std::size_t j = 0; j < kColumns; ++j) acc[i][j] += x * b[j];
    }
  }
}

void gemm(const float* a, std::size_t lda, std::size_t m, const float* b, std::size_t panel_stride,
          std::size_t n, std::size_t k, float* c, std::size_t ldc, bool accumulate) {
  for (std::size_t n0 = 0; n0 < n; n0 += kColumns) {
    const float* panel = b + n0 / kPanel * panel_stride + n0 % kPanel;
    const std::size_t columns = std::min(kColumns, n - n0);
    for (std::size_t m0 = 0; m0 < m; m0 += kRows) {
      const std::size_t count = std::min(kRows, m - m0);
      const float* rows[kRows];
      for (std::size_t i = 0; i < kRows; ++i) rows[i] = a + (m0 + std::min(i, count - 1)) * lda;
      float acc[kRows][kColumns] = {};
      if (accumulate) {
        for (std::size_t i = 0; i < count; ++i) {
          std::copy_n(c + (m0 + i) * ldc + n0, columns, acc[i]);
        }
      }
      tile(rows, panel, k, acc);
      for (std::size_t i = 0; i < count; ++i) std::copy_n(acc[i], columns, c + (m0 + i) * ldc + n0);
    }
  }
}

void gemv(const float* a, const float* b, std::size_t n, std::size_t k, float* c) {
  for (std::size_t n0 = 0; n0 < n; n0 += kPanel, b += kPanel * k) {
    float acc[kPanel] = {};
    for (std::size_t kk = 0; kk < k; ++kk) {
      for (std::size_t j = 0; j < kPanel; ++j) acc[j] += a[kk] * b[kk * kPanel + j];
    }
    std::copy_n(acc, std::min(kPanel, n - n0), c + n0);
  }
}

void rms_norm(const float* x, const float* weight, float eps, std::size_t n, float* y) {
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const float inverse = 1.0F / std::sqrt(static_cast<float>(sum / static_cast<double>(n)) + eps);
  for (std::size_t i = 0; i < n; ++i) y[i] = x[i] * inverse * weight[i];
}

void silu_mul(float* gate, const float* up, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    gate[i] = gate[i] / (1.0F + std::exp(std::min(-gate[i], 88.0F))) * up[i];
  }
}

bool all_finite(const float* x, std::size_t n) {
  return std::all_of(x, x + n, [](float v) { return std::isfinite(v); });
}

float scale_scores(float* s, float scale, const float* sigma, std::size_t n) {
  float largest = -3.402823466e38F;
  for (std::size_t j = 0; j < n; ++j) {
    s[j] *= scale;
    if (sigma != nullptr) s[j] *= sigma[j];
    largest = std::max(largest, s[j]);
  }
  return largest;
}

float exp_minus(float* s, float max, std::size_t n) {
  float sum = 0;
  for (std::size_t j = 0; j < n; ++j) {
    s[j] = std::exp(s[j] - max);
    sum += s[j];
  }
  return sum;
}

void rescale_add(float* acc, float keep, const float* part, float factor, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) acc[i] = acc[i] * keep + part[i] * factor;
}

// Raises the running maximum; returns the factor for what was summed under the old one.
double raise(LogSumExp& state, const float* logits, std::size_t n) {
  const float largest = *std::max_element(logits, logits + n);
  if (largest <= state.max) return 1.0;
  const double factor = state.sum > 0 ? std::exp(static_cast<double>(state.max) - largest) : 0.0;
  state.max = largest;
  state.sum *= factor;
  return factor;
}

void log_sum_exp(LogSumExp& state, const float* logits, std::size_t n) {
  raise(state, logits, n);
  for (std::size_t j = 0; j < n; ++j) state.sum += std::exp(static_cast<double>(logits[j]) - state.max);
}

void divergence(Divergence& state, const float* reference, const float* model, std::size_t n) {
  log_sum_exp(state.model, model, n);
  state.weighted *= raise(state.reference, reference, n);
  for (std::size_t j = 0; j < n; ++j) {
    const double e = std::exp(static_cast<double>(reference[j]) - state.reference.max);
    state.reference.sum += e;
    state.weighted += e * (static_cast<double>(reference[j]) - static_cast<double>(model[j]));
  }
}

}  // namespace plain

const Kernels& plain_kernels() {
  static const Kernels table{
      "plain",           plain::gemm,         plain::gemv,      plain::rms_norm,    plain::silu_mul,
      plain::all_finite, plain::scale_scores, plain::exp_minus, plain::rescale_add, plain::log_sum_exp,
      plain::divergence};
  return table;
}

#ifndef FIREQ_HIGHWAY
const Kernels& kernels() {
  return plain_kernels();
}
#endif

}  // namespace fireq::calib::simd
