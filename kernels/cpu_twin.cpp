#include "kernels/cpu_twin.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "common/checked.hpp"
#include "common/parallel.hpp"
#include "kernels/weight_access.hpp"
#include "libquant/levels.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::kernels::cpu {

namespace {

using libquant::decode_bf16;
using libquant::decode_e4m3;
using libquant::encode_bf16;
using libquant::encode_e4m3;
using libquant::round_bf16;

libquant::ProductTable product_table(const WeightRef& w) {
  libquant::Levels levels;
  levels.magnitude = w.levels;
  return libquant::ProductTable(levels);
}

// Row n's operands as FP8 bytes [Kp].
void operand_row(const WeightRef& w, const libquant::ProductTable& table, std::uint64_t n,
                 std::span<std::uint8_t> out) {
  for (std::uint64_t k = 0; k < out.size(); k += 4) {
    const auto& entry = table.byte[load_scale(w, n, k / kGroup) & 0x7fU];
    const std::uint32_t quad = load_quad(w, n, k);
    for (std::uint32_t j = 0; j < 4; ++j) {
      const std::uint32_t code = quad >> (4 * j) & 15U;
      out[k + j] = static_cast<std::uint8_t>(entry[code & 7U] | (code & 8U) << 4U);
    }
  }
}

void check_shapes(const TokensRef& x, const WeightRef& w) {
  if (x.tokens == 0 || w.rows == 0 || w.cols == 0 || x.pitch < w.cols)
    throw Error(ErrorKind::usage, "impossible shape of a linear layer")
        .found(std::to_string(x.tokens) + " tokens, weight " + std::to_string(w.rows) + " x " +
               std::to_string(w.cols));
}

// Calls emit(m, n, sum) for every output, the sum of operand products in T.
template <class T, class Emit>
void multiply(const TokensRef& x, const WeightRef& w, int threads, const Emit& emit) {
  check_shapes(x, w);
  const libquant::ProductTable table = product_table(w);
  std::vector<T> tokens(checked_mul(x.tokens, w.cols, "activations"));
  parallel_for(x.tokens, threads, [&](std::size_t m) {
    for (std::uint64_t k = 0; k < w.cols; ++k)
      tokens[m * w.cols + k] = static_cast<T>(decode_e4m3(x.x8[m * x.pitch + k]));
  });
  parallel_for(w.rows, threads, [&](std::size_t n) {
    std::vector<std::uint8_t> bytes(w.padded_cols());
    operand_row(w, table, n, bytes);
    std::vector<T> row(w.cols);
    std::transform(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(w.cols), row.begin(),
                   [](std::uint8_t b) { return static_cast<T>(decode_e4m3(b)); });
    for (std::uint64_t m = 0; m < x.tokens; ++m) {
      T sum = 0;
      for (std::uint64_t k = 0; k < w.cols; ++k) sum += tokens[m * w.cols + k] * row[k];
      emit(m, n, sum);
    }
  });
}

// bf16 values -> x8 and a.
void quantize_row(std::span<const float> v, std::uint8_t* x8, float& scale) {
  float largest = 0x1p-20F;
  for (const float value : v) largest = std::max(largest, std::fabs(value));
  scale = largest * (1.0F / 448.0F);
  for (std::size_t k = 0; k < v.size(); ++k) x8[k] = encode_e4m3(v[k] / scale);
}

}  // namespace

void gemm_w4a8(const TokensRef& x, const WeightRef& w, const OutputRef& y, const Epilogue& epilogue,
               int threads) {
  multiply<float>(x, w, threads, [&](std::uint64_t m, std::uint64_t n, float sum) {
    float v = x.scale[m] * w.row_scales[w.per_tensor ? 0 : n] * sum;
    if (epilogue.bias != nullptr) v += epilogue.bias[n];
    if (epilogue.residual != nullptr) v += decode_bf16(epilogue.residual[m * epilogue.residual_pitch + n]);
    y.data[m * y.pitch + n] = encode_bf16(v);
  });
}

void gemm_w4a8_reference(const TokensRef& x, const WeightRef& w, const Epilogue& epilogue,
                         std::span<double> out, int threads) {
  if (out.size() != checked_mul(x.tokens, w.rows, "outputs"))
    throw Error(ErrorKind::internal, "reference output of another size");
  multiply<double>(x, w, threads, [&](std::uint64_t m, std::uint64_t n, double sum) {
    double v = static_cast<double>(x.scale[m]) * w.row_scales[w.per_tensor ? 0 : n] * sum;
    if (epilogue.bias != nullptr) v += epilogue.bias[n];
    if (epilogue.residual != nullptr) v += decode_bf16(epilogue.residual[m * epilogue.residual_pitch + n]);
    out[m * w.rows + n] = v;
  });
}

void dequantize_to_fp8(const WeightRef& w, std::span<std::uint8_t> out8, int threads) {
  if (out8.size() != checked_mul(w.rows, w.padded_cols(), "operands"))
    throw Error(ErrorKind::internal, "operand buffer of another size");
  const libquant::ProductTable table = product_table(w);
  parallel_for(w.rows, threads, [&](std::size_t n) {
    operand_row(w, table, n, out8.subspan(n * w.padded_cols(), w.padded_cols()));
  });
}

void quantize_activations(const Bf16Ref& x, std::uint64_t tokens, std::uint64_t cols,
                          const QuantizedTokens& out) {
  std::vector<float> v(cols);
  for (std::uint64_t m = 0; m < tokens; ++m) {
    for (std::uint64_t k = 0; k < cols; ++k) v[k] = decode_bf16(x.data[m * x.pitch + k]);
    quantize_row(v, out.x8 + m * out.pitch, out.scale[m]);
  }
}

void rmsnorm_quantize(const NormInput& in, std::uint64_t tokens, std::uint64_t cols,
                      const QuantizedTokens& out) {
  std::vector<float> v(cols);
  for (std::uint64_t m = 0; m < tokens; ++m) {
    double squares = 0;
    for (std::uint64_t k = 0; k < cols; ++k) {
      v[k] = decode_bf16(in.x.data[m * in.x.pitch + k]);
      if (in.addend.data != nullptr)
        v[k] = round_bf16(v[k] + decode_bf16(in.addend.data[m * in.addend.pitch + k]));
      squares += static_cast<double>(v[k]) * v[k];
    }
    const auto mean = static_cast<float>(squares / static_cast<double>(cols));
    const auto inverse = static_cast<float>(1.0 / std::sqrt(static_cast<double>(mean + in.epsilon)));
    for (std::uint64_t k = 0; k < cols; ++k) {
      if (in.sum != nullptr) in.sum[m * in.x.pitch + k] = encode_bf16(v[k]);
      v[k] = round_bf16(v[k] * inverse * in.weight[k]);
    }
    quantize_row(v, out.x8 + m * out.pitch, out.scale[m]);
  }
}

void silu_mul_quantize(const Bf16Ref& gate_up, std::uint64_t tokens, std::uint64_t cols,
                       const QuantizedTokens& out) {
  std::vector<float> v(cols);
  for (std::uint64_t m = 0; m < tokens; ++m) {
    for (std::uint64_t k = 0; k < cols; ++k) {
      const float gate = decode_bf16(gate_up.data[m * gate_up.pitch + k]);
      const float up = decode_bf16(gate_up.data[m * gate_up.pitch + cols + k]);
      v[k] = round_bf16(gate / (1.0F + std::exp(-gate)) * up);
    }
    quantize_row(v, out.x8 + m * out.pitch, out.scale[m]);
  }
}

}  // namespace fireq::kernels::cpu
