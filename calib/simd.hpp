// The inner loops of the forward pass: one table of functions, chosen once for the CPU that runs (Highway),
// or plain C++ where the build has no Highway. docs/forward-pass.md says why these loops are our own.
//
// Panels: a [N, K] matrix (weights, keys, transposed values) as ceil(N/32) panels of [K][32] floats, the last
// one padded with zeros. An output element of gemm and gemv is one chain of multiply-adds over k in ascending
// order whatever tile it falls in: the same bits for any cut of rows, columns and threads, and for one row as
// for many.
#pragma once

#include <cstddef>
#include <vector>

namespace fireq::calib::simd {

inline constexpr std::size_t kPanel = 32;

// Running log-sum-exp of one row of logits, tile by tile.
struct LogSumExp {
  float max = -3.402823466e38F;
  double sum = 0;  // of exp(x - max)
};
double value(const LogSumExp& state);  // max + log(sum)

// Running KL(reference || model) of one row of logits, tile by tile.
struct Divergence {
  LogSumExp reference, model;
  double weighted = 0;  // sum of exp(r - reference.max) * (r - m)
};
double value(const Divergence& state);  // nats

struct Kernels {
  const char* target;  // "AVX3", "AVX2", ... or "plain"

  // c[m, n] (+)= a[m, k] * b[n, k]^T. Row strides lda, ldc; b in panels, each `panel_stride` floats after the
  // one before (32 * k when the panels are whole). Strides of a that are multiples of 4 KiB are slow.
  void (*gemm)(const float* a, std::size_t lda, std::size_t m, const float* b, std::size_t panel_stride,
               std::size_t n, std::size_t k, float* c, std::size_t ldc, bool accumulate);
  // One row: c[n] = a[k] * b[n, k]^T; whole panels.
  void (*gemv)(const float* a, const float* b, std::size_t n, std::size_t k, float* c);

  // y = x / sqrt(mean(x^2) + eps) * weight; y may be x.
  void (*rms_norm)(const float* x, const float* weight, float eps, std::size_t n, float* y);
  // gate = gate / (1 + exp(-gate)) * up.
  void (*silu_mul)(float* gate, const float* up, std::size_t n);
  bool (*all_finite)(const float* x, std::size_t n);

  // s[j] = (s[j] * scale) * sigma[j] (sigma null: ones); returns the largest, n > 0.
  float (*scale_scores)(float* s, float scale, const float* sigma, std::size_t n);
  // s[j] = exp(s[j] - max); returns the sum.
  float (*exp_minus)(float* s, float max, std::size_t n);
  // acc[d] = acc[d] * keep + part[d] * factor.
  void (*rescale_add)(float* acc, float keep, const float* part, float factor, std::size_t n);

  void (*log_sum_exp)(LogSumExp& state, const float* logits, std::size_t n);
  void (*divergence)(Divergence& state, const float* reference, const float* model, std::size_t n);
};

const Kernels& kernels();        // the best for this CPU
const Kernels& plain_kernels();  // always there
// Every variant that this CPU can run, for tests. Not while other threads work.
std::vector<Kernels> all_kernels();

}  // namespace fireq::calib::simd
