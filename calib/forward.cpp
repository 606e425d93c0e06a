#include "calib/forward.hpp"

#include <algorithm>
#include <cmath>
#include <exception>
#include <functional>
#include <utility>

#include "calib/attention.hpp"
#include "calib/simd.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/activation_quantizer.hpp"
#include "libquant/kv_quantizer.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::calib {
namespace {

using formats::Site;

// Tokens per task of the per-token work: large enough to reuse a panel from the first cache many times, small
// enough that a few windows feed several threads.
constexpr std::uint64_t kTokenBlock = 128;
// Query tokens per attention task.
constexpr std::uint64_t kQueryBlock = 64;

[[noreturn]] void throw_not_finite(const float* row, std::uint64_t n, const std::string& where) {
  std::uint64_t channel = 0;
  while (channel < n && std::isfinite(row[channel])) ++channel;
  const float value = channel < n ? row[channel] : std::nanf("");
  throw Error(ErrorKind::input, "an activation is not finite: " + where)
      .found((std::isnan(value) ? std::string("NaN") : std::string(value > 0 ? "Inf" : "-Inf")) +
             " at channel " + std::to_string(channel));
}

std::string token_name(const Batch& batch, std::uint64_t row) {
  return "sequence " + std::to_string(batch.first_sequence + row / batch.length) + ", token " +
         std::to_string(batch.start + row % batch.length);
}

// Rotates pairs (i, i + D/2) of one head.
void rotate(float* x, const float* cosine, const float* sine, std::uint64_t half) {
  for (std::uint64_t i = 0; i < half; ++i) {
    const float a = x[i];
    const float b = x[i + half];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + half] = b * cosine[i] + a * sine[i];
  }
}

// Runs every task; of several that fail, the first in order is reported, whatever the threads did.
void for_each_task(std::size_t n, int threads, const std::function<void(std::size_t)>& body) {
  std::vector<std::exception_ptr> failures(n);
  parallel_for(n, threads, [&](std::size_t task) {
    try {
      body(task);
    } catch (...) {
      failures[task] = std::current_exception();
    }
  });
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
}

// One thread's work area for a block of tokens.
struct BlockArea {
  FloatBuffer x, q, k, v, gate, up;
  std::vector<float> token_scale;
  std::vector<float> head;  // one value vector, quantised
};

struct QueryArea {
  FloatBuffer rows;
  AttentionArea attention;
};

// Copies of every site's activations of a batch, for an observer.
class Recorder {
 public:
  explicit Recorder(ActivationObserver* observer) : observer_(observer) {}
  void start(Site site, std::uint64_t rows, std::uint64_t channels) {
    if (observer_ == nullptr) return;
    Record& r = record(site);
    r.channels = channels;
    r.values.resize(rows * channels);
  }
  void put(Site site, std::uint64_t row, std::uint64_t channel, const float* values, std::uint64_t n) {
    if (observer_ == nullptr) return;
    Record& r = record(site);
    std::copy_n(values, n, r.values.data() + row * r.channels + channel);
  }
  void tell(Site site) {
    if (observer_ == nullptr) return;
    const Record& r = record(site);
    observer_->observe(site, r.values, r.values.size() / r.channels, r.channels);
  }

 private:
  struct Record {
    FloatBuffer values;
    std::uint64_t channels = 0;
  };
  Record& record(Site site) { return records_[static_cast<std::size_t>(site)]; }

  ActivationObserver* observer_;
  std::array<Record, formats::kSites> records_;
};

}  // namespace

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
    out.linear[i].weight = Panels(from.weight, from.rows, from.cols, threads);
    std::vector<float>().swap(from.weight);
    out.linear[i].row_scale = std::move(from.row_scale);
    out.linear[i].bias = std::move(from.bias);
  }
  out.attn_norm = std::move(weights.attn_norm);
  out.mlp_norm = std::move(weights.mlp_norm);
  out.q_norm = std::move(weights.q_norm);
  out.k_norm = std::move(weights.k_norm);
  out.k_post_rope_scale = std::move(weights.k_post_rope_scale);
  out.k_post_rope_shift = std::move(weights.k_post_rope_shift);
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

struct LayerRunner::Impl {
  Impl(formats::ModelConfig c, const Precision& p, int t) : config(std::move(c)), precision(p), threads(t) {}

  const formats::ModelConfig config;
  const Precision precision;
  const int threads;
  Pool<BlockArea> blocks;
  Pool<QueryArea> queries;
  FloatBuffer query, query_scale, attention;  // [rows, q_rows], [rows, heads], [rows, q_rows]
  KvCache own_cache;

  KvCache& cache_for(const Batch& batch) {
    if (own_cache.sequences() != batch.sequences || own_cache.capacity() < batch.length) {
      own_cache = KvCache(batch.sequences, config.kv_heads, config.head_dim, batch.length);
    }
    return own_cache;
  }

  // What one call works on.
  struct Call {
    const LayerPanels& weights;
    std::uint64_t layer;
    const RopeTable& rope;
    const Batch& batch;
    KvCache& cache;
    float* hidden;  // written by finish() alone
    Recorder& recorder;
    std::uint64_t rows;
  };

  static void check(const Call& call, Site site, std::uint64_t row, const float* values, std::uint64_t n) {
    if (simd::kernels().all_finite(values, n)) return;
    throw_not_finite(values, n,
                     "layer " + std::to_string(call.layer) + ", " + std::string(formats::site_name(site)) +
                         ", " + token_name(call.batch, row));
  }

  // Input of a linear: recorded, checked and, when asked, quantised per token.
  void take_input(const Call& call, Site site, std::uint64_t row, float* x, std::uint64_t n,
                  float& token_scale) const {
    check(call, site, row, x, n);
    call.recorder.put(site, row, 0, x, n);
    if (precision.fp8_activations) token_scale = libquant::quantize_token_in_place({x, n});
  }

  void linear(const Call& call, LinearIndex which, const BlockArea& area, std::size_t ldx, std::size_t m,
              float* y, std::size_t ldy) const {
    apply_linear(call.weights.linear[which], area.x.data(), ldx, m,
                 precision.fp8_activations ? area.token_scale.data() : nullptr, precision.fp8_activations, y,
                 ldy, threads);
  }

  void project(const Call& call, std::uint64_t begin, std::uint64_t end, BlockArea& area);
  void store_query(const Call& call, std::uint64_t row, float* q);
  void store_key_value(const Call& call, std::uint64_t row, float* k, const float* v,
                       std::vector<float>& head);
  void attend_queries(const Call& call, std::uint64_t sequence, std::uint64_t kv_head, std::uint64_t begin,
                      std::uint64_t end);
  void finish(const Call& call, std::uint64_t begin, std::uint64_t end, BlockArea& area);
  void attend_all(const Call& call);
  void run(const Call& call);
};

// Norm, q, k, v, QK-norm, RoPE, smoothing and quantisation of rows [begin, end).
void LayerRunner::Impl::project(const Call& call, std::uint64_t begin, std::uint64_t end, BlockArea& area) {
  const std::uint64_t m = end - begin;
  const std::size_t ldx = padded_stride(config.hidden);
  const std::size_t ldq = padded_stride(config.q_rows());
  const std::size_t ldk = padded_stride(config.kv_rows());
  area.x.resize(m * ldx);
  area.q.resize(m * ldq);
  area.k.resize(m * ldk);
  area.v.resize(m * ldk);
  area.token_scale.resize(m);
  for (std::uint64_t i = 0; i < m; ++i) {
    float* x = area.x.data() + i * ldx;
    simd::kernels().rms_norm(call.hidden + (begin + i) * config.hidden, call.weights.attn_norm.data(),
                             static_cast<float>(config.rms_eps), config.hidden, x);
    take_input(call, Site::attn_in, begin + i, x, config.hidden, area.token_scale[i]);
  }
  linear(call, kQ, area, ldx, m, area.q.data(), ldq);
  linear(call, kK, area, ldx, m, area.k.data(), ldk);
  linear(call, kV, area, ldx, m, area.v.data(), ldk);
  for (std::uint64_t i = 0; i < m; ++i) {
    store_query(call, begin + i, area.q.data() + i * ldq);
    store_key_value(call, begin + i, area.k.data() + i * ldk, area.v.data() + i * ldk, area.head);
  }
}

void LayerRunner::Impl::store_query(const Call& call, std::uint64_t row, float* q) {
  const std::uint64_t dim = config.head_dim;
  const std::uint64_t group = config.heads / config.kv_heads;
  const std::uint64_t position = call.batch.start + row % call.batch.length;
  const std::vector<float>& smoothing = call.weights.k_post_rope_scale;
  check(call, Site::q, row, q, config.q_rows());
  const auto softmax_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)));
  for (std::uint64_t h = 0; h < config.heads; ++h) {
    float* x = q + h * dim;
    if (!call.weights.q_norm.empty()) {
      simd::kernels().rms_norm(x, call.weights.q_norm.data(), static_cast<float>(config.rms_eps), dim, x);
    }
    rotate(x, call.rope.cosine.data() + position * call.rope.half,
           call.rope.sine.data() + position * call.rope.half, call.rope.half);
    if (!smoothing.empty()) {
      for (std::uint64_t c = 0; c < dim; ++c) x[c] /= smoothing[h / group * dim + c];
    }
    call.recorder.put(Site::q, row, h * dim, x, dim);
    float scale = softmax_scale;
    if (precision.fp8_q) scale *= libquant::quantize_query_in_place({x, dim});
    query_scale[row * config.heads + h] = scale;
  }
  std::copy_n(q, config.q_rows(), query.data() + row * config.q_rows());
}

void LayerRunner::Impl::store_key_value(const Call& call, std::uint64_t row, float* k, const float* v,
                                        std::vector<float>& head) {
  const std::uint64_t dim = config.head_dim;
  const std::uint64_t position = call.batch.start + row % call.batch.length;
  const std::vector<float>& smoothing = call.weights.k_post_rope_scale;
  const std::vector<float>& shift = call.weights.k_post_rope_shift;
  check(call, Site::k_pre_rope, row, k, config.kv_rows());
  check(call, Site::v, row, v, config.kv_rows());
  call.recorder.put(Site::v, row, 0, v, config.kv_rows());
  head.resize(dim);
  for (std::uint64_t g = 0; g < config.kv_heads; ++g) {
    float* x = k + g * dim;
    if (!call.weights.k_norm.empty()) {
      simd::kernels().rms_norm(x, call.weights.k_norm.data(), static_cast<float>(config.rms_eps), dim, x);
    }
    call.recorder.put(Site::k_pre_rope, row, g * dim, x, dim);
    rotate(x, call.rope.cosine.data() + position * call.rope.half,
           call.rope.sine.data() + position * call.rope.half, call.rope.half);
    if (!shift.empty()) {
      for (std::uint64_t c = 0; c < dim; ++c) x[c] -= shift[g * dim + c];
    }
    if (!smoothing.empty()) {
      for (std::uint64_t c = 0; c < dim; ++c) x[c] *= smoothing[g * dim + c];
    }
    call.recorder.put(Site::k_post_rope, row, g * dim, x, dim);
    std::copy_n(v + g * dim, dim, head.data());
    const float key_scale = precision.int4_k ? libquant::quantize_kv_in_place({x, dim}) : 1.0F;
    const float value_scale = precision.int4_v ? libquant::quantize_kv_in_place(head) : 1.0F;
    call.cache.put(row / call.batch.length, g, position, {x, dim}, key_scale, head, value_scale);
  }
}

// Queries [begin, end) of one sequence, all query heads of one KV head.
void LayerRunner::Impl::attend_queries(const Call& call, std::uint64_t sequence, std::uint64_t kv_head,
                                       std::uint64_t begin, std::uint64_t end) {
  const std::uint64_t dim = config.head_dim;
  const std::uint64_t group = config.heads / config.kv_heads;
  const std::size_t stride = padded_stride(dim);
  const AttentionMode mode{config.sliding_window.empty() ? 0 : config.sliding_window[call.layer],
                           precision.int4_k, precision.int4_v, precision.fp8_p};
  Pool<QueryArea>::Loan area(queries);
  area->rows.resize(QueryRows::kMost * stride);
  QueryRows rows;
  rows.q = area->rows.data();
  rows.stride = stride;
  float* out[QueryRows::kMost] = {};
  FloatBuffer& result = area->attention.result;
  result.resize(QueryRows::kMost * dim);
  const auto flush = [&] {
    if (rows.count == 0) return;
    attend(call.cache, sequence, kv_head, rows, mode, area->attention, result.data(), dim);
    for (std::size_t i = 0; i < rows.count; ++i) std::copy_n(result.data() + i * dim, dim, out[i]);
    rows.count = 0;
  };
  const auto add = [&](std::uint64_t token, std::uint64_t head) {
    const std::uint64_t row = sequence * call.batch.length + token;
    const std::size_t i = rows.count++;
    std::copy_n(query.data() + row * config.q_rows() + head * dim, dim, area->rows.data() + i * stride);
    rows.scale[i] = query_scale[row * config.heads + head];
    rows.position[i] = call.batch.start + token;
    out[i] = attention.data() + row * config.q_rows() + head * dim;
    if (rows.count == QueryRows::kMost) flush();
  };
  if (end - begin == 1) {  // one token: its heads share the keys
    for (std::uint64_t r = 0; r < group; ++r) add(begin, kv_head * group + r);
    flush();
    return;
  }
  for (std::uint64_t r = 0; r < group; ++r) {
    for (std::uint64_t token = begin; token < end; ++token) add(token, kv_head * group + r);
    flush();
  }
}

// o_proj and the MLP with their residuals for rows [begin, end).
void LayerRunner::Impl::finish(const Call& call, std::uint64_t begin, std::uint64_t end, BlockArea& area) {
  const std::uint64_t m = end - begin;
  const std::size_t ldo = padded_stride(config.q_rows());
  const std::size_t ldx = padded_stride(config.hidden);
  const std::size_t ldf = padded_stride(config.ffn);
  area.x.resize(m * std::max({ldo, ldx, ldf}));
  area.q.resize(m * ldx);
  area.gate.resize(m * ldf);
  area.up.resize(m * ldf);
  area.token_scale.resize(m);
  const auto add_residual = [&] {
    for (std::uint64_t i = 0; i < m; ++i) {
      float* h = call.hidden + (begin + i) * config.hidden;
      const float* y = area.q.data() + i * ldx;
      for (std::uint64_t c = 0; c < config.hidden; ++c) h[c] += y[c];
    }
  };
  for (std::uint64_t i = 0; i < m; ++i) {
    float* x = area.x.data() + i * ldo;
    std::copy_n(attention.data() + (begin + i) * config.q_rows(), config.q_rows(), x);
    take_input(call, Site::o_in, begin + i, x, config.q_rows(), area.token_scale[i]);
  }
  linear(call, kO, area, ldo, m, area.q.data(), ldx);
  add_residual();
  for (std::uint64_t i = 0; i < m; ++i) {
    float* x = area.x.data() + i * ldx;
    simd::kernels().rms_norm(call.hidden + (begin + i) * config.hidden, call.weights.mlp_norm.data(),
                             static_cast<float>(config.rms_eps), config.hidden, x);
    take_input(call, Site::mlp_in, begin + i, x, config.hidden, area.token_scale[i]);
  }
  linear(call, kGate, area, ldx, m, area.gate.data(), ldf);
  linear(call, kUp, area, ldx, m, area.up.data(), ldf);
  for (std::uint64_t i = 0; i < m; ++i) {
    float* x = area.gate.data() + i * ldf;
    simd::kernels().silu_mul(x, area.up.data() + i * ldf, config.ffn);
    take_input(call, Site::down_in, begin + i, x, config.ffn, area.token_scale[i]);
  }
  area.x.swap(area.gate);
  linear(call, kDown, area, ldf, m, area.q.data(), ldx);
  add_residual();
}

void LayerRunner::Impl::run(const Call& call) {
  const std::uint64_t rows = call.rows;
  call.recorder.start(Site::attn_in, rows, config.hidden);
  call.recorder.start(Site::q, rows, config.q_rows());
  call.recorder.start(Site::k_pre_rope, rows, config.kv_rows());
  call.recorder.start(Site::k_post_rope, rows, config.kv_rows());
  call.recorder.start(Site::v, rows, config.kv_rows());
  call.recorder.start(Site::o_in, rows, config.q_rows());
  call.recorder.start(Site::mlp_in, rows, config.hidden);
  call.recorder.start(Site::down_in, rows, config.ffn);

  attend_all(call);
  const std::uint64_t token_blocks = (rows + kTokenBlock - 1) / kTokenBlock;
  for_each_task(token_blocks, threads, [&](std::size_t block) {
    Pool<BlockArea>::Loan area(blocks);
    finish(call, block * kTokenBlock, std::min((block + 1) * kTokenBlock, rows), *area);
  });
  for (std::size_t site = 0; site < formats::kSites; ++site) call.recorder.tell(static_cast<Site>(site));
}

// From the layer's input to the attention's output, before o_proj.
void LayerRunner::Impl::attend_all(const Call& call) {
  const std::uint64_t rows = call.rows;
  query.resize(rows * config.q_rows());
  query_scale.resize(rows * config.heads);
  attention.resize(rows * config.q_rows());
  const std::uint64_t token_blocks = (rows + kTokenBlock - 1) / kTokenBlock;
  for_each_task(token_blocks, threads, [&](std::size_t block) {
    Pool<BlockArea>::Loan area(blocks);
    project(call, block * kTokenBlock, std::min((block + 1) * kTokenBlock, rows), *area);
  });
  const std::uint64_t query_blocks = (call.batch.length + kQueryBlock - 1) / kQueryBlock;
  for_each_task(call.batch.sequences * config.kv_heads * query_blocks, threads, [&](std::size_t task) {
    const std::uint64_t begin = task % query_blocks * kQueryBlock;
    const std::uint64_t head = task / query_blocks;
    attend_queries(call, head / config.kv_heads, head % config.kv_heads, begin,
                   std::min(begin + kQueryBlock, call.batch.length));
  });
}

LayerRunner::LayerRunner(const formats::ModelConfig& config, const Precision& precision, int threads)
    : impl_(std::make_unique<Impl>(config, precision, threads)) {}
LayerRunner::~LayerRunner() = default;

void LayerRunner::run(const LayerPanels& weights, std::uint64_t layer, const RopeTable& rope,
                      const Batch& batch, KvCache& cache, std::span<float> hidden,
                      ActivationObserver* observer) {
  const std::uint64_t rows = batch.sequences * batch.length;
  if (hidden.size() != rows * impl_->config.hidden || cache.capacity() < batch.start + batch.length ||
      rope.cosine.size() < (batch.start + batch.length) * rope.half) {
    throw Error(ErrorKind::internal, "batch does not fit its buffers");
  }
  if (rows == 0) return;
  Recorder recorder(observer);
  impl_->run({weights, layer, rope, batch, cache, hidden.data(), recorder, rows});
}

void LayerRunner::run(const LayerPanels& weights, std::uint64_t layer, const RopeTable& rope,
                      const Batch& batch, std::span<float> hidden, ActivationObserver* observer) {
  run(weights, layer, rope, batch, impl_->cache_for(batch), hidden, observer);
}

void LayerRunner::attention_outputs(const LayerPanels& weights, std::uint64_t layer, const RopeTable& rope,
                                    const Batch& batch, std::span<const float> hidden, std::span<float> out) {
  const std::uint64_t rows = batch.sequences * batch.length;
  if (hidden.size() != rows * impl_->config.hidden || out.size() != rows * impl_->config.q_rows() ||
      batch.start != 0 || rope.cosine.size() < batch.length * rope.half) {
    throw Error(ErrorKind::internal, "batch does not fit its buffers");
  }
  if (rows == 0) return;
  Recorder recorder(nullptr);
  impl_->attend_all({weights, layer, rope, batch, impl_->cache_for(batch), const_cast<float*>(hidden.data()),
                     recorder, rows});
  std::copy_n(impl_->attention.data(), out.size(), out.data());
}

void run_layer(const formats::ModelConfig& config, LayerWeights weights, std::uint64_t layer,
               const RopeTable& rope, const Precision& precision, std::span<float> hidden,
               std::uint64_t windows, std::uint64_t length, int threads, ActivationObserver* observer) {
  const LayerPanels panels = pack_layer(std::move(weights), threads);
  LayerRunner runner(config, precision, threads);
  runner.run(panels, layer, rope, {windows, length, 0, 0}, hidden, observer);
}

void check_final_hidden(std::span<const float> hidden, std::uint64_t width, const Batch& batch) {
  for (std::uint64_t row = 0; (row + 1) * width <= hidden.size(); ++row) {
    const float* values = hidden.data() + row * width;
    if (!simd::kernels().all_finite(values, width)) {
      throw_not_finite(values, width, "output of the last layer, " + token_name(batch, row));
    }
  }
}

}  // namespace fireq::calib
