// What a layer's run looks up: rotary angles, and its weights ready to multiply.
#include <cmath>
#include <utility>

#include "calib/forward.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::calib {

RopeTable::RopeTable(const formats::ModelConfig& config, std::uint64_t positions)
    : half(config.head_dim / 2) {
  const std::vector<float> frequency = formats::rope_inverse_frequencies(config);
  cosine.resize(positions * half);
  sine.resize(positions * half);
  for (std::uint64_t p = 0; p < positions; ++p) {
    for (std::uint64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(p) * frequency[i];  // FP32, as transformers computes it
      cosine[p * half + i] = static_cast<float>(std::cos(static_cast<double>(angle)));
      sine[p * half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  }
}

void RopeTable::rotate(float* x, std::uint64_t position, bool back) const {
  const float* c = cosine.data() + position * half;
  const float* s = sine.data() + position * half;
  for (std::uint64_t i = 0; i < half; ++i) {
    const float a = x[i];
    const float b = x[i + half];
    const float turn = back ? -s[i] : s[i];
    x[i] = a * c[i] - b * turn;
    x[i + half] = b * c[i] + a * turn;
  }
}

std::uint64_t LayerPanels::bytes() const noexcept {
  std::uint64_t sum = 0;
  for (const LinearPanels& l : linear) {
    sum += l.weight.bytes() + (l.row_scale.size() + l.bias.size()) * sizeof(float);
  }
  return sum + (attn_norm.size() + mlp_norm.size()) * sizeof(float);
}

LayerPanels pack_layer(LayerWeights&& weights, int threads) {
  LayerPanels out;
  for (std::size_t i = 0; i < kLinears; ++i) {
    LinearWeights& from = weights.linear[i];
    if (!from.weight.empty()) out.linear[i].weight = Panels(from.weight, from.rows, from.cols, threads);
    std::vector<float>().swap(from.weight);
    out.linear[i].row_scale = std::move(from.row_scale);
    out.linear[i].bias = std::move(from.bias);
    out.linear[i].plain_input = from.plain_input;
  }
  out.attn_norm = std::move(weights.attn_norm);
  out.mlp_norm = std::move(weights.mlp_norm);
  out.q_norm = std::move(weights.q_norm);
  out.k_norm = std::move(weights.k_norm);
  out.k_post_rope_scale = std::move(weights.k_post_rope_scale);
  out.k_post_rope_shift = std::move(weights.k_post_rope_shift);
  out.k_rounding = std::move(weights.k_rounding);
  out.v_rounding = std::move(weights.v_rounding);
  return out;
}

void apply_linear(const LinearPanels& linear, const float* x, std::size_t ldx, std::size_t m,
                  const float* token_scale, bool round_bf16, float* y, std::size_t ldy, int threads) {
  multiply(x, ldx, m, linear.weight, y, ldy, threads);
  const std::uint64_t n = linear.weight.rows();
  const std::vector<float>& scales = linear.row_scale;
  std::vector<std::uint16_t> half(round_bf16 ? n : 0);
  for (std::size_t i = 0; i < m; ++i) {
    float* row = y + i * ldy;
    if (token_scale != nullptr || !scales.empty()) {
      const float a = token_scale == nullptr ? 1.0F : token_scale[i];
      if (scales.size() == n && n > 1) {
        for (std::uint64_t j = 0; j < n; ++j) row[j] *= a * scales[j];
      } else {
        const float factor = scales.empty() ? a : a * scales[0];
        for (std::uint64_t j = 0; j < n; ++j) row[j] *= factor;
      }
    }
    if (!linear.bias.empty()) {
      for (std::uint64_t j = 0; j < n; ++j) row[j] += linear.bias[j];
    }
    if (round_bf16) {
      libquant::encode_bf16(std::span<const float>(row, n), half);
      libquant::decode_bf16(half, std::span<float>(row, n));
    }
  }
}

}  // namespace fireq::calib
