// Per-token FP8 quantisation, alone and behind RMSNorm or SiLU * up. One CTA a token: the row's bf16 values
// stay in registers between the maximum and the rounding, so memory is read once (row_kernel; rows that are
// not aligned or longer than 32768 take activation_kernel, which computes what it cannot keep twice).
#include <cuda_fp8.h>

#include "kernels/activations.hpp"
#include "kernels/cuda/activation_rows.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/runtime.hpp"

namespace fireq::kernels {

namespace {

constexpr std::uint32_t kThreads = 256;
constexpr std::uint32_t kKept = 4;  // vectors that a thread keeps in registers: rows up to 8192

__device__ __forceinline__ float round_bf16(float v) {
  return low_half(ptx::pack_bf16(v, 0.0F));
}

template <class Op>
__device__ float reduce(float v, Op op, float* scratch) {
  for (int d = 16; d > 0; d /= 2) v = op(v, __shfl_xor_sync(0xffffffffU, v, d));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = scratch[0];
  for (std::uint32_t i = 1; i < kThreads / 32; ++i) v = op(v, scratch[i]);
  return v;
}

__device__ __forceinline__ void load_vector(const std::uint16_t* row, std::uint32_t k, std::uint32_t cols,
                                            bool vectors, float (&v)[kVector]) {
  if (vectors) {
    const uint4 u = __ldcg(reinterpret_cast<const uint4*>(row + k));
    const std::uint32_t w[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (std::uint32_t i = 0; i < 4; ++i) {
      v[2 * i] = low_half(w[i]);
      v[2 * i + 1] = high_half(w[i]);
    }
  } else {
#pragma unroll
    for (std::uint32_t i = 0; i < kVector; ++i)
      v[i] = k + i < cols ? __uint_as_float(static_cast<std::uint32_t>(__ldcg(row + k + i)) << 16U) : 0.0F;
  }
}

// The row's values before quantisation, from column k on; for norm these are h, not yet scaled.
template <Kind kKind>
__device__ __forceinline__ void row_values(const ActivationParams& p, std::uint64_t m, std::uint32_t k,
                                           float (&v)[kVector]) {
  load_vector(p.x + m * p.pitch, k, p.cols, p.vectors, v);
  if constexpr (kKind == Kind::silu) {
    float up[kVector];
    load_vector(p.second + m * p.second_pitch, k, p.cols, p.vectors, up);
#pragma unroll
    for (std::uint32_t i = 0; i < kVector; ++i)
      v[i] = round_bf16(__fmul_rn(__fdividef(v[i], 1.0F + __expf(-v[i])), up[i]));
  }
  if constexpr (kKind == Kind::add_norm) {
    float addend[kVector];
    load_vector(p.second + m * p.second_pitch, k, p.cols, p.vectors, addend);
#pragma unroll
    for (std::uint32_t i = 0; i < kVector; ++i) v[i] = round_bf16(v[i] + addend[i]);
  }
}

__device__ __forceinline__ void store_sum(const ActivationParams& p, std::uint64_t m, std::uint32_t k,
                                          const float (&v)[kVector]) {
  std::uint16_t* out = p.sum + m * p.pitch + k;
  std::uint32_t w[4];
#pragma unroll
  for (std::uint32_t i = 0; i < 4; ++i)  // exact: v holds bf16 numbers
    w[i] = __float_as_uint(v[2 * i]) >> 16U | (__float_as_uint(v[2 * i + 1]) & 0xffff0000U);
  if (p.vectors) {
    *reinterpret_cast<uint4*>(out) = make_uint4(w[0], w[1], w[2], w[3]);
  } else {
    for (std::uint32_t i = 0; i < kVector && k + i < p.cols; ++i)
      out[i] = static_cast<std::uint16_t>(w[i / 2] >> (16 * (i % 2)));
  }
}

__device__ __forceinline__ void normalize(const ActivationParams& p, std::uint32_t k, float inverse,
                                          float (&v)[kVector]) {
#pragma unroll
  for (std::uint32_t i = 0; i < kVector; ++i)
    v[i] = k + i < p.cols ? round_bf16(__fmul_rn(__fmul_rn(v[i], inverse), __ldg(p.weight + k + i))) : 0.0F;
}

__device__ __forceinline__ void store_x8(const ActivationParams& p, std::uint64_t m, std::uint32_t k, float a,
                                         const float (&v)[kVector]) {
  std::uint32_t w[2] = {0, 0};
#pragma unroll
  for (std::uint32_t i = 0; i < kVector; i += 2) {
    const float2 q = make_float2(__fdiv_rn(v[i], a), __fdiv_rn(v[i + 1], a));
    w[i / 4] |= static_cast<std::uint32_t>(__nv_cvt_float2_to_fp8x2(q, __NV_SATFINITE, __NV_E4M3))
                << (8 * (i % 4));
  }
  std::uint8_t* out = p.x8 + m * p.out_pitch + k;
  if (p.vectors) {
    *reinterpret_cast<uint2*>(out) = make_uint2(w[0], w[1]);
  } else {
    for (std::uint32_t i = 0; i < kVector && k + i < p.cols; ++i)
      out[i] = static_cast<std::uint8_t>(w[i / 4] >> (8 * (i % 4)));
  }
}

template <Kind kKind>
__global__ void __launch_bounds__(kThreads) activation_kernel(const __grid_constant__ ActivationParams p) {
  __shared__ float scratch[kThreads / 32];
#if __CUDA_ARCH__ >= 900
  ptx::launch_next_kernel();
  ptx::wait_for_previous_kernel();
#endif
  const std::uint64_t m = blockIdx.x;
  const std::uint32_t vectors = (p.cols + kVector - 1) / kVector;
  float kept[kKept][kVector];
  float inverse = 1.0F;
  if constexpr (kNorm<kKind>) {
    float squares = 0.0F;
    for (std::uint32_t i = 0; i * kThreads < vectors; ++i) {
      const std::uint32_t k = (i * kThreads + threadIdx.x) * kVector;
      if (k >= p.cols) break;
      float v[kVector];
      row_values<kKind>(p, m, k, v);
      if (p.sum != nullptr) store_sum(p, m, k, v);
#pragma unroll
      for (std::uint32_t j = 0; j < kVector; ++j) squares = __fmaf_rn(v[j], v[j], squares);
#pragma unroll
      for (std::uint32_t c = 0; c < kKept; ++c)
        if (c == i)
#pragma unroll
          for (std::uint32_t j = 0; j < kVector; ++j) kept[c][j] = v[j];
    }
    squares = reduce(
        squares, [](float a, float b) { return a + b; }, scratch);
    inverse = __frsqrt_rn(__fdiv_rn(squares, static_cast<float>(p.cols)) + p.epsilon);
  }
  float largest = 0x1p-20F;
  for (std::uint32_t i = 0; i * kThreads < vectors; ++i) {
    const std::uint32_t k = (i * kThreads + threadIdx.x) * kVector;
    if (k >= p.cols) break;
    float v[kVector];
    bool have = false;
    if constexpr (kNorm<kKind>) {
#pragma unroll
      for (std::uint32_t c = 0; c < kKept; ++c)
        if (c == i) {
          have = true;
#pragma unroll
          for (std::uint32_t j = 0; j < kVector; ++j) v[j] = kept[c][j];
        }
    }
    if (!have) {
      // With h written over x, longer rows read back h itself.
      if (kNorm<kKind> && p.sum != nullptr)
        load_vector(p.sum + m * p.pitch, k, p.cols, p.vectors, v);
      else
        row_values<kKind>(p, m, k, v);
    }
    if constexpr (kNorm<kKind>) normalize(p, k, inverse, v);
#pragma unroll
    for (std::uint32_t j = 0; j < kVector; ++j) largest = fmaxf(largest, fabsf(v[j]));
#pragma unroll
    for (std::uint32_t c = 0; c < kKept; ++c)
      if (c == i)
#pragma unroll
        for (std::uint32_t j = 0; j < kVector; ++j) kept[c][j] = v[j];
  }
  largest = reduce(
      largest, [](float a, float b) { return fmaxf(a, b); }, scratch);
  const float a = __fmul_rn(largest, 1.0F / 448.0F);
  if (threadIdx.x == 0) p.scale[m] = a;
  for (std::uint32_t i = 0; i * kThreads < vectors; ++i) {
    const std::uint32_t k = (i * kThreads + threadIdx.x) * kVector;
    if (k >= p.cols) break;
    float v[kVector];
    bool have = false;
#pragma unroll
    for (std::uint32_t c = 0; c < kKept; ++c)
      if (c == i) {
        have = true;
#pragma unroll
        for (std::uint32_t j = 0; j < kVector; ++j) v[j] = kept[c][j];
      }
    if (!have) {
      if (kNorm<kKind> && p.sum != nullptr)
        load_vector(p.sum + m * p.pitch, k, p.cols, p.vectors, v);
      else
        row_values<kKind>(p, m, k, v);
      if constexpr (kNorm<kKind>) normalize(p, k, inverse, v);
    }
    store_x8(p, m, k, a, v);
  }
}

// ---- rows that stay in registers
// ----------------------------------------------------------------------------------------------
// The same as activation_kernel for 16-byte aligned rows of up to blockDim.x * kVectors vectors: every value
// is loaded once and kept as bf16. With kCluster a row is a cluster's, an even part of it a CTA's: a few long
// rows on many multiprocessors (not for norm, which would exchange its sum too).
template <Kind kKind, std::uint32_t kVectors, bool kCluster>
__global__ void __launch_bounds__(kVectors > (kNorm<kKind> ? 2 : 4) ? 512 : 1024)
    row_kernel(const __grid_constant__ ActivationParams p) {
  static_assert(!kCluster || !kNorm<kKind>);
  __shared__ float scratch[2][32];
  __shared__ ClusterMaximum maximum;
#if __CUDA_ARCH__ >= 900
  ptx::launch_next_kernel();
#endif
  std::uint64_t m = blockIdx.x;
  std::uint32_t begin = 0;
  std::uint32_t vectors = p.cols / kVector;  // where this CTA's end
#if __CUDA_ARCH__ >= 900
  if constexpr (kCluster) {
    maximum.prepare(p.cluster);
    m = blockIdx.x / p.cluster;
    const std::uint32_t part = (vectors + p.cluster - 1) / p.cluster;
    begin = min(vectors, ptx::cluster_rank() * part);
    vectors = min(vectors, begin + part);
  }
#endif
  float weight[kNorm<kKind> ? kVectors : 1][kVector];
  if constexpr (kNorm<kKind>) {  // no result of the kernel before
#pragma unroll
    for (std::uint32_t i = 0; i < kVectors; ++i) {
      const std::uint32_t at = i * blockDim.x + threadIdx.x;
      if (at < vectors) load_weights(p, at, weight[i]);
    }
  }
#if __CUDA_ARCH__ >= 900
  ptx::wait_for_previous_kernel();
#endif
  Row<kKind, kVectors> row;
  row.load(p, m, begin, vectors);
  if constexpr (kKind == Kind::silu) {
#pragma unroll
    for (std::uint32_t i = 0; i < kVectors; ++i)
#pragma unroll
      for (std::uint32_t j = 0; j < 4; ++j) {
        const std::uint32_t gate = words(row.x[i])[j];
        const std::uint32_t up = words(row.second[i])[j];
        const float g0 = low_half(gate);
        const float g1 = high_half(gate);
        words(row.x[i])[j] = ptx::pack_bf16(__fmul_rn(__fdividef(g0, 1.0F + __expf(-g0)), low_half(up)),
                                            __fmul_rn(__fdividef(g1, 1.0F + __expf(-g1)), high_half(up)));
      }
  }
  if constexpr (kNorm<kKind>) {
    float squares = 0.0F;
#pragma unroll
    for (std::uint32_t i = 0; i < kVectors; ++i) {
      const std::uint32_t at = i * blockDim.x + threadIdx.x;
      if constexpr (kKind == Kind::add_norm) {
#pragma unroll
        for (std::uint32_t j = 0; j < 4; ++j) {
          std::uint32_t& h = words(row.x[i])[j];
          h = ptx::pack_bf16(low_half(h) + low_half(words(row.second[i])[j]),
                             high_half(h) + high_half(words(row.second[i])[j]));
        }
      }
      add_squares(row.x[i], squares);
      if (p.sum != nullptr && at < vectors) reinterpret_cast<uint4*>(p.sum + m * p.pitch)[at] = row.x[i];
    }
    squares = reduce_block(
        squares, [](float a, float b) { return a + b; }, scratch[0]);
    const float inverse = inverse_norm(p, squares);
#pragma unroll
    for (std::uint32_t i = 0; i < kVectors; ++i)
      if (i * blockDim.x + threadIdx.x < vectors) normalize_vector(row.x[i], inverse, weight[i]);
  }
  LargestPair pair;
#pragma unroll
  for (std::uint32_t i = 0; i < kVectors; ++i) pair.meet(row.x[i]);
  float largest = reduce_block(
      pair.largest(), [](float a, float b) { return fmaxf(a, b); }, scratch[1]);
#if __CUDA_ARCH__ >= 900
  if constexpr (kCluster) largest = maximum.exchange(largest, p.cluster);
#endif
  const TokenScale scale(largest);
  if (threadIdx.x == 0 && begin == 0) p.scale[m] = scale.a;
#pragma unroll
  for (std::uint32_t i = 0; i < kVectors; ++i) {
    const std::uint32_t at = begin + i * blockDim.x + threadIdx.x;
    if (at < vectors) reinterpret_cast<uint2*>(p.x8 + m * p.out_pitch)[at] = scale.quantize(row.x[i]);
  }
}

// Norm of many rows, weights loaded late: fewer registers, so that more rows are on their way.
template <std::uint32_t kVectors>
__global__ void __launch_bounds__(512) norm_kernel(const __grid_constant__ ActivationParams p) {
  __shared__ float scratch[2][32];
#if __CUDA_ARCH__ >= 900
  ptx::launch_next_kernel();
  ptx::wait_for_previous_kernel();
#endif
  const std::uint64_t m = blockIdx.x;
  const std::uint32_t vectors = p.cols / kVector;
  Row<Kind::norm, kVectors> row;
  row.load(p, m, 0, vectors);
  float squares = 0.0F;
#pragma unroll
  for (std::uint32_t i = 0; i < kVectors; ++i) add_squares(row.x[i], squares);
  const float inverse = inverse_norm(p, reduce_block(
                                            squares, [](float a, float b) { return a + b; }, scratch[0]));
  LargestPair pair;
#pragma unroll
  for (std::uint32_t i = 0; i < kVectors; ++i) {
    const std::uint32_t at = i * blockDim.x + threadIdx.x;
    if (at >= vectors) continue;
    if (p.sum != nullptr) reinterpret_cast<uint4*>(p.sum + m * p.pitch)[at] = row.x[i];
    float weight[kVector];
    load_weights(p, at, weight);
    normalize_vector(row.x[i], inverse, weight);
    pair.meet(row.x[i]);
  }
  const TokenScale scale(reduce_block(
      pair.largest(), [](float a, float b) { return fmaxf(a, b); }, scratch[1]));
  if (threadIdx.x == 0) p.scale[m] = scale.a;
#pragma unroll
  for (std::uint32_t i = 0; i < kVectors; ++i) {
    const std::uint32_t at = i * blockDim.x + threadIdx.x;
    if (at < vectors) reinterpret_cast<uint2*>(p.x8 + m * p.out_pitch)[at] = scale.quantize(row.x[i]);
  }
}

// Few long rows are spread over clusters, where the device has them.
std::uint32_t ctas_a_row(std::uint64_t tokens, std::uint32_t vectors) {
  constexpr std::uint32_t kMost = 8;
  int device = 0, clusters = 0;
  check_cuda(cudaGetDevice(&device), "device query");
  check_cuda(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device), "device query");
  std::uint32_t ctas = 1;
  while (clusters != 0 && ctas < kMost && tokens * ctas <= 64 && vectors / (ctas * 2) >= 128) ctas *= 2;
  return vectors <= 1024 * ctas ? ctas : 1;
}

template <Kind kKind>
void launch_rows(ActivationParams p, std::uint64_t tokens, const ActivationOptions& options,
                 const char* what) {
  const std::uint32_t vectors = p.cols / kVector;
  const auto go = [&](auto kernel, std::uint32_t kept) {
    const std::uint32_t shares = p.cluster * kept;
    const std::uint32_t threads = ((vectors + shares - 1) / shares + 31) / 32 * 32;
    launch(kernel,
           {static_cast<std::uint32_t>(tokens) * p.cluster, threads, 0, p.cluster, options.programmatic,
            options.stream},
           what, p);
  };
  // With rows enough to fill the device, few threads a row: each meets the others of its row twice.
  const bool many = tokens >= 2048;
  p.cluster = 1;
  if constexpr (kNorm<kKind>) {
    if (vectors <= (tokens <= 128 ? 1024 : 256)) return go(row_kernel<kKind, 1, false>, 1);
    if constexpr (kKind == Kind::norm) {
      if (many) return go(norm_kernel<4>, 4);
    }
    go(row_kernel<kKind, 2, false>, 2);
  } else {
    p.cluster = ctas_a_row(tokens, vectors);
    if (p.cluster > 1) return go(row_kernel<kKind, 1, true>, 1);
    if (vectors <= 256) return go(row_kernel<kKind, 1, false>, 1);
    if (vectors > 1024 && many) return go(row_kernel<kKind, 8, false>, 8);
    if (vectors > 1024 || many) return go(row_kernel<kKind, 4, false>, 4);
    go(row_kernel<kKind, 2, false>, 2);
  }
}

template <Kind kKind>
void run(ActivationParams p, std::uint64_t tokens, std::uint64_t cols, const QuantizedTokens& out,
         const ActivationOptions& options, const char* what) {
  if (tokens == 0 || cols == 0 || tokens > 0x7fffffffU || cols > 0x7fffffffU || out.pitch < cols ||
      out.pitch % 16 != 0 || p.pitch < cols)
    throw Error(ErrorKind::usage, std::string(what) + ": impossible shape")
        .expected("at least one token and channel, pitches of K or more, x8's a multiple of 16")
        .found(std::to_string(tokens) + " tokens, " + std::to_string(cols) + " channels, x8 pitch " +
               std::to_string(out.pitch));
  const auto aligned = [](const void* q) { return reinterpret_cast<std::uintptr_t>(q) % 16 == 0; };
  p.cols = static_cast<std::uint32_t>(cols);
  p.x8 = out.x8;
  p.out_pitch = out.pitch;
  p.scale = out.scale;
  p.vectors = cols % kVector == 0 && p.pitch % kVector == 0 && p.second_pitch % kVector == 0 &&
              aligned(p.x) && aligned(p.second) && aligned(p.sum) && aligned(p.x8);
  constexpr std::uint32_t kMostKept = 1024 * (kNorm<kKind> ? 2 : 4);  // vectors of a row
  const bool weights_fit = reinterpret_cast<std::uintptr_t>(p.weight) % 16 == 0;
  if (p.vectors && weights_fit && cols / kVector <= kMostKept)
    return launch_rows<kKind>(p, tokens, options, what);
  launch(activation_kernel<kKind>,
         {static_cast<std::uint32_t>(tokens), kThreads, 0, 1, options.programmatic, options.stream}, what, p);
}

}  // namespace

void quantize_activations(const Bf16Ref& x, std::uint64_t tokens, std::uint64_t cols,
                          const QuantizedTokens& out, const ActivationOptions& options) {
  ActivationParams p{};
  p.x = x.data;
  p.pitch = x.pitch;
  run<Kind::plain>(p, tokens, cols, out, options, "activation quantiser");
}

void rmsnorm_quantize(const NormInput& in, std::uint64_t tokens, std::uint64_t cols,
                      const QuantizedTokens& out, const ActivationOptions& options) {
  ActivationParams p{};
  p.x = in.x.data;
  p.pitch = in.x.pitch;
  p.second = in.addend.data;
  p.second_pitch = in.addend.data == nullptr ? 0 : in.addend.pitch;
  p.sum = in.sum;
  p.weight = in.weight;
  p.epsilon = in.epsilon;
  if (p.second == nullptr)
    run<Kind::norm>(p, tokens, cols, out, options, "RMSNorm and quantiser");
  else
    run<Kind::add_norm>(p, tokens, cols, out, options, "sum, RMSNorm and quantiser");
}

void silu_mul_quantize(const Bf16Ref& gate_up, std::uint64_t tokens, std::uint64_t cols,
                       const QuantizedTokens& out, const ActivationOptions& options) {
  ActivationParams p{};
  p.x = gate_up.data;
  p.pitch = gate_up.pitch;
  p.second = gate_up.data + cols;
  p.second_pitch = gate_up.pitch;
  run<Kind::silu>(p, tokens, cols, out, options, "SiLU, product and quantiser");
}

}  // namespace fireq::kernels
