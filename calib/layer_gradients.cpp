#include "calib/layer_gradients.hpp"

#include <algorithm>
#include <cmath>
#include <functional>

#include "calib/simd.hpp"
#include "common/parallel.hpp"
#include "common/progress.hpp"
#include "libquant/activation_quantizer.hpp"
#include "libquant/blas.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::calib {
namespace {

namespace blas = libquant::blas;
using blas::Op;

// Tokens per task of the per-token work; sequences of about as many tokens as kBatchTokens at a time.
constexpr std::uint64_t kTokenBlock = 128;
constexpr std::uint64_t kBatchTokens = 2048;

void for_blocks(std::uint64_t rows, int threads,
                const std::function<void(std::uint64_t begin, std::uint64_t end)>& body) {
  parallel_for((rows + kTokenBlock - 1) / kTokenBlock, threads, [&](std::size_t block) {
    body(block * kTokenBlock, std::min((block + 1) * kTokenBlock, rows));
  });
}

void add_moments(const FloatBuffer& gradient, std::uint64_t rows, libquant::Curvature& sums, int threads) {
  libquant::add_outer_products(gradient.data(), sums.cols, sums.cols, gradient.data(), sums.cols, sums.cols,
                               rows, true, sums.square, threads);
  sums.tokens += rows;
}

}  // namespace

struct LayerGradients::Rows {
  std::uint64_t sequences = 0, length = 0, rows = 0;
  FloatBuffer x;                               // [rows, hidden] normalised: inputs of q, k, v
  FloatBuffer raw_q, raw_k;                    // before QK-norm, where there is one
  FloatBuffer q, k, v, attended;               // after RoPE
  FloatBuffer middle, y, gate, up, act;        // behind the attention; inputs of gate and up; ...
  FloatBuffer g_q, g_k, g_v, g_attended, g_x;  // gradients
};

OutputSums make_output_sums(const formats::ModelConfig& config) {
  const auto sums = [&](std::size_t i) {
    return libquant::Curvature(formats::linear_shape(config, i)[0], libquant::Curvature::Cross::without);
  };
  return {sums(kQ), sums(kK), sums(kV), sums(kO), sums(kGate), sums(kUp), sums(kDown)};
}

WeightGradients make_weight_gradients(const formats::ModelConfig& config) {
  WeightGradients out;
  for (std::size_t i = 0; i < kLinears; ++i) {
    const auto [rows, cols] = formats::linear_shape(config, i);
    out[i].assign(rows * cols, 0.0F);
  }
  return out;
}

void rms_norm_gradient(const float* x, const float* weight, double eps, std::size_t n, const float* gy,
                       float* gx) {
  double square = 0;
  double along = 0;
  for (std::size_t i = 0; i < n; ++i) {
    square += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    along += static_cast<double>(x[i]) * static_cast<double>(weight[i]) * static_cast<double>(gy[i]);
  }
  const double inverse = 1 / std::sqrt(square / static_cast<double>(n) + eps);
  const double back = along * inverse * inverse * inverse / static_cast<double>(n);
  for (std::size_t i = 0; i < n; ++i) {
    gx[i] = static_cast<float>(static_cast<double>(weight[i]) * static_cast<double>(gy[i]) * inverse -
                               static_cast<double>(x[i]) * back);
  }
}

LayerGradients::LayerGradients(const formats::ModelConfig& config, const LayerWeights& weights,
                               std::uint64_t layer, const RopeTable& rope, int threads,
                               Activations activations)
    : config_(config),
      weights_(weights),
      window_(config.sliding_window.empty() ? 0 : config.sliding_window[layer]),
      rope_(rope),
      threads_(threads),
      quantised_(activations == Activations::quantised) {}

// visit(rows, first): some sequences at a time, `first` the first of them. Buffers are kept from batch to
// batch.
template <class Visit>
void LayerGradients::in_batches(std::uint64_t count, std::uint64_t length, Visit visit) {
  const std::uint64_t at_once = std::max<std::uint64_t>(1, kBatchTokens / length);
  Rows at;
  for (std::uint64_t first = 0; first < count; first += at_once) {
    check_interrupt();
    at.sequences = std::min(at_once, count - first);
    at.length = length;
    at.rows = at.sequences * length;
    visit(at, first);
  }
}

void LayerGradients::run(std::uint64_t count, std::uint64_t length, std::span<const float> hidden,
                         std::span<float> gradient, OutputSums* sums, WeightGradients* linears) {
  const std::uint64_t width = config_.hidden;
  in_batches(count, length, [&](Rows& at, std::uint64_t first) {
    const float* h = hidden.data() + first * length * width;
    float* g = gradient.data() + first * length * width;
    forward(at, h);
    mlp_gradient(at, g, sums, linears);  // g: behind the attention's residual
    FloatBuffer& g_o = at.y;
    std::copy_n(g, at.rows * width, g_o.data());
    if (sums != nullptr) add_moments(g_o, at.rows, (*sums)[kO], threads_);
    add_gradient(kO, g_o, at.attended, at.rows, linears);
    back(kO, g_o, at.g_attended, false, at.rows);
    attention(at, true);
    heads_gradient(at.g_q, at.raw_q, config_.heads, weights_.q_norm, at);
    heads_gradient(at.g_k, at.raw_k, config_.kv_heads, weights_.k_norm, at);
    if (sums != nullptr) {
      add_moments(at.g_q, at.rows, (*sums)[kQ], threads_);
      add_moments(at.g_k, at.rows, (*sums)[kK], threads_);
      add_moments(at.g_v, at.rows, (*sums)[kV], threads_);
    }
    add_gradient(kQ, at.g_q, at.x, at.rows, linears);
    add_gradient(kK, at.g_k, at.x, at.rows, linears);
    add_gradient(kV, at.g_v, at.x, at.rows, linears);
    back(kQ, at.g_q, at.g_x, false, at.rows);
    back(kK, at.g_k, at.g_x, true, at.rows);
    back(kV, at.g_v, at.g_x, true, at.rows);
    for_blocks(at.rows, threads_, [&](std::uint64_t begin, std::uint64_t end) {
      std::vector<float> through(width);
      for (std::uint64_t i = begin; i < end; ++i) {
        rms_norm_gradient(h + i * width, weights_.attn_norm.data(), config_.rms_eps, width,
                          at.g_x.data() + i * width, through.data());
        for (std::uint64_t c = 0; c < width; ++c) g[i * width + c] += through[c];
      }
    });
  });
}

void LayerGradients::advance(std::uint64_t count, std::uint64_t length, std::span<float> hidden) {
  const std::uint64_t width = config_.hidden;
  in_batches(count, length, [&](Rows& at, std::uint64_t first) {
    float* h = hidden.data() + first * length * width;
    forward(at, h);
    activate(at);
    project(kDown, at.act, at.y, at.rows);
    for (std::uint64_t i = 0; i < at.rows * width; ++i) h[i] = at.middle[i] + at.y[i];
  });
}

void LayerGradients::add_gradient(LinearIndex which, const FloatBuffer& gradient, const FloatBuffer& x,
                                  std::uint64_t rows, WeightGradients* linears) const {
  if (linears == nullptr) return;
  const LinearWeights& w = weights_.linear[which];
  libquant::add_outer_products(gradient.data(), w.rows, w.rows, x.data(), w.cols, w.cols, rows, false,
                               (*linears)[which], threads_);
}

void LayerGradients::round_inputs(FloatBuffer& x, std::uint64_t channels, std::uint64_t rows) const {
  if (!quantised_) return;
  for_blocks(rows, threads_, [&](std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t i = begin; i < end; ++i) {
      const std::span<float> token(x.data() + i * channels, channels);
      const float a = libquant::quantize_token_in_place(token);
      for (float& v : token) v *= a;
    }
  });
}

// y = x W^T + bias.
void LayerGradients::project(LinearIndex which, const FloatBuffer& x, FloatBuffer& y, std::uint64_t rows) {
  const LinearWeights& w = weights_.linear[which];
  y.resize(rows * w.rows);
  for_blocks(rows, threads_, [&](std::uint64_t begin, std::uint64_t end) {
    blas::gemm(Op::none, Op::transpose, end - begin, w.rows, w.cols, 1.0F,
               {x.data() + begin * w.cols, w.cols}, {w.weight.data(), w.cols}, 0.0F,
               {y.data() + begin * w.rows, w.rows});
    for (std::uint64_t i = begin; i < end && !w.bias.empty(); ++i) {
      for (std::uint64_t c = 0; c < w.rows; ++c) y[i * w.rows + c] += w.bias[c];
    }
    float* const outputs = y.data() + begin * w.rows;
    if (quantised_) std::transform(outputs, outputs + (end - begin) * w.rows, outputs, libquant::round_bf16);
  });
}

// gx = gy W, or added to.
void LayerGradients::back(LinearIndex which, const FloatBuffer& gy, FloatBuffer& gx, bool add,
                          std::uint64_t rows) {
  const LinearWeights& w = weights_.linear[which];
  gx.resize(rows * w.cols);
  for_blocks(rows, threads_, [&](std::uint64_t begin, std::uint64_t end) {
    blas::gemm(Op::none, Op::none, end - begin, w.cols, w.rows, 1.0F, {gy.data() + begin * w.rows, w.rows},
               {w.weight.data(), w.cols}, add ? 1.0F : 0.0F, {gx.data() + begin * w.cols, w.cols});
  });
}

void LayerGradients::forward(Rows& at, const float* hidden) {
  const std::uint64_t width = config_.hidden;
  const auto eps = static_cast<float>(config_.rms_eps);
  const auto norm = [&](const float* from, const std::vector<float>& weight, FloatBuffer& to) {
    to.resize(at.rows * width);
    for_blocks(at.rows, threads_, [&](std::uint64_t begin, std::uint64_t end) {
      for (std::uint64_t i = begin; i < end; ++i) {
        simd::kernels().rms_norm(from + i * width, weight.data(), eps, width, to.data() + i * width);
      }
    });
  };
  norm(hidden, weights_.attn_norm, at.x);
  round_inputs(at.x, width, at.rows);
  project(kQ, at.x, at.q, at.rows);
  project(kK, at.x, at.k, at.rows);
  project(kV, at.x, at.v, at.rows);
  if (config_.qk_norm) {
    at.raw_q = at.q;
    at.raw_k = at.k;
  }
  heads(at.q, config_.heads, weights_.q_norm, at);
  heads(at.k, config_.kv_heads, weights_.k_norm, at);
  at.attended.resize(at.rows * config_.q_rows());
  attention(at, false);
  round_inputs(at.attended, config_.q_rows(), at.rows);
  project(kO, at.attended, at.middle, at.rows);
  for (std::uint64_t i = 0; i < at.rows * width; ++i) at.middle[i] += hidden[i];
  norm(at.middle.data(), weights_.mlp_norm, at.y);
  round_inputs(at.y, width, at.rows);
  project(kGate, at.y, at.gate, at.rows);
  project(kUp, at.y, at.up, at.rows);
}

// Inputs of down.
void LayerGradients::activate(Rows& at) {
  at.act = at.gate;
  for_blocks(at.rows, threads_, [&](std::uint64_t begin, std::uint64_t end) {
    const std::uint64_t ffn = config_.ffn;
    simd::kernels().silu_mul(at.act.data() + begin * ffn, at.up.data() + begin * ffn, (end - begin) * ffn);
  });
  round_inputs(at.act, config_.ffn, at.rows);
}

// gradient: behind the layer, then behind the attention. gate and up become the gradients of theirs.
void LayerGradients::mlp_gradient(Rows& at, float* gradient, OutputSums* sums, WeightGradients* linears) {
  const std::uint64_t width = config_.hidden;
  const std::uint64_t ffn = config_.ffn;
  FloatBuffer& g_down = at.g_x;
  g_down.resize(at.rows * width);
  std::copy_n(gradient, at.rows * width, g_down.data());
  if (sums != nullptr) add_moments(g_down, at.rows, (*sums)[kDown], threads_);
  if (linears != nullptr) {
    activate(at);
    add_gradient(kDown, g_down, at.act, at.rows, linears);
  }
  back(kDown, g_down, at.act, false, at.rows);
  for_blocks(at.rows, threads_, [&](std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t i = begin * ffn; i < end * ffn; ++i) {
      const float x = at.gate[i];
      const float sigmoid = 1 / (1 + std::exp(-x));
      const float g = at.act[i];
      at.gate[i] = g * at.up[i] * sigmoid * (1 + x * (1 - sigmoid));
      at.up[i] = g * x * sigmoid;
    }
  });
  if (sums != nullptr) {
    add_moments(at.gate, at.rows, (*sums)[kGate], threads_);
    add_moments(at.up, at.rows, (*sums)[kUp], threads_);
  }
  add_gradient(kGate, at.gate, at.y, at.rows, linears);
  add_gradient(kUp, at.up, at.y, at.rows, linears);
  back(kGate, at.gate, at.g_x, false, at.rows);
  back(kUp, at.up, at.g_x, true, at.rows);
  for_blocks(at.rows, threads_, [&](std::uint64_t begin, std::uint64_t end) {
    std::vector<float> through(width);
    for (std::uint64_t i = begin; i < end; ++i) {
      rms_norm_gradient(at.middle.data() + i * width, weights_.mlp_norm.data(), config_.rms_eps, width,
                        at.g_x.data() + i * width, through.data());
      for (std::uint64_t c = 0; c < width; ++c) gradient[i * width + c] += through[c];
    }
  });
}

// QK-norm and RoPE of queries or keys.
void LayerGradients::heads(FloatBuffer& x, std::uint64_t count, const std::vector<float>& norm, Rows& at) {
  const std::uint64_t dim = config_.head_dim;
  for_blocks(at.rows, threads_, [&](std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t i = begin; i < end; ++i) {
      for (std::uint64_t h = 0; h < count; ++h) {
        float* head = x.data() + (i * count + h) * dim;
        if (!norm.empty()) {
          simd::kernels().rms_norm(head, norm.data(), static_cast<float>(config_.rms_eps), dim, head);
        }
        rope_.rotate(head, i % at.length, false);
      }
    }
  });
}

void LayerGradients::heads_gradient(FloatBuffer& gradient, const FloatBuffer& x, std::uint64_t count,
                                    const std::vector<float>& norm, Rows& at) {
  const std::uint64_t dim = config_.head_dim;
  for_blocks(at.rows, threads_, [&](std::uint64_t begin, std::uint64_t end) {
    std::vector<float> turned(dim);
    for (std::uint64_t i = begin; i < end; ++i) {
      for (std::uint64_t h = 0; h < count; ++h) {
        float* head = gradient.data() + (i * count + h) * dim;
        rope_.rotate(head, i % at.length, true);
        if (norm.empty()) continue;
        std::copy_n(head, dim, turned.data());
        rms_norm_gradient(x.data() + (i * count + h) * dim, norm.data(), config_.rms_eps, dim, turned.data(),
                          head);
      }
    }
  });
}

void LayerGradients::attention(Rows& at, bool backward) {
  if (backward) {
    at.g_q.resize(at.rows * config_.q_rows());
    at.g_k.assign(at.rows * config_.kv_rows(), 0.0F);
    at.g_v.assign(at.rows * config_.kv_rows(), 0.0F);
  }
  parallel_for(at.sequences * config_.kv_heads, threads_, [&](std::size_t task) {
    attend(at, task / config_.kv_heads, task % config_.kv_heads, backward);
  });
}

// One KV head of one sequence with its query heads, a block of queries at a time. The probabilities are made
// anew on the way back.
void LayerGradients::attend(Rows& at, std::uint64_t sequence, std::uint64_t kv_head, bool backward) {
  const std::uint64_t dim = config_.head_dim;
  const std::uint64_t ldq = config_.q_rows();
  const std::uint64_t ldk = config_.kv_rows();
  const std::uint64_t group = config_.heads / config_.kv_heads;
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)));
  const std::uint64_t start = sequence * at.length;
  const std::size_t key_at = start * ldk + kv_head * dim;
  std::vector<float> p(kTokenBlock * at.length);
  std::vector<float> g(backward ? p.size() : 0);
  for (std::uint64_t begin = 0; begin < at.length; begin += kTokenBlock) {
    const std::uint64_t m = std::min(kTokenBlock, at.length - begin);
    const std::uint64_t keys = begin + m;
    for (std::uint64_t r = 0; r < group; ++r) {
      const std::size_t query_at = (start + begin) * ldq + (kv_head * group + r) * dim;
      blas::gemm(Op::none, Op::transpose, m, keys, dim, scale, {at.q.data() + query_at, ldq},
                 {at.k.data() + key_at, ldk}, 0.0F, {p.data(), at.length});
      for (std::uint64_t i = 0; i < m; ++i) {
        float* row = p.data() + i * at.length;
        const std::uint64_t last = begin + i + 1;
        const std::uint64_t first = window_ == 0 || last <= window_ ? 0 : last - window_;
        const float top = *std::max_element(row + first, row + last);
        const float sum = simd::kernels().exp_minus(row + first, top, last - first);
        for (std::uint64_t j = first; j < last; ++j) row[j] /= sum;
        std::fill(row, row + first, 0.0F);
        std::fill(row + last, row + keys, 0.0F);
      }
      if (!backward) {
        blas::gemm(Op::none, Op::none, m, dim, keys, 1.0F, {p.data(), at.length}, {at.v.data() + key_at, ldk},
                   0.0F, {at.attended.data() + query_at, ldq});
        continue;
      }
      const blas::View<const float> out{at.g_attended.data() + query_at, ldq};
      blas::gemm(Op::transpose, Op::none, keys, dim, m, 1.0F, {p.data(), at.length}, out, 1.0F,
                 {at.g_v.data() + key_at, ldk});
      blas::gemm(Op::none, Op::transpose, m, keys, dim, 1.0F, out, {at.v.data() + key_at, ldk}, 0.0F,
                 {g.data(), at.length});
      for (std::uint64_t i = 0; i < m; ++i) {
        float* row = g.data() + i * at.length;
        const float* weight = p.data() + i * at.length;
        double mean = 0;
        for (std::uint64_t j = 0; j < keys; ++j) {
          mean += static_cast<double>(row[j]) * static_cast<double>(weight[j]);
        }
        for (std::uint64_t j = 0; j < keys; ++j) row[j] = weight[j] * (row[j] - static_cast<float>(mean));
      }
      blas::gemm(Op::none, Op::none, m, dim, keys, scale, {g.data(), at.length}, {at.k.data() + key_at, ldk},
                 0.0F, {at.g_q.data() + query_at, ldq});
      blas::gemm(Op::transpose, Op::none, keys, dim, m, scale, {g.data(), at.length},
                 {at.q.data() + query_at, ldq}, 1.0F, {at.g_k.data() + key_at, ldk});
    }
  }
}

}  // namespace fireq::calib
