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
#include "libquant/kv_rounding.hpp"
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
  FloatBuffer plain;  // x in bf16 but not FP8, where a linear wants it
  bool keep_plain = false;
  // With a backend: x in bf16, dense, and what the backend gives back.
  std::vector<std::uint16_t> x16, y16[3];
};

// One linear of those that read the same input, and where its outputs go.
struct LinearOutput {
  LinearIndex which;
  float* y;
  std::size_t ldy;
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

struct LayerRunner::Impl {
  Impl(formats::ModelConfig c, const Precision& p, int t, LinearBackend* b)
      : config(std::move(c)), precision(p), threads(t), backend(b) {}

  const formats::ModelConfig config;
  const Precision precision;
  const int threads;
  LinearBackend* const backend;
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

  // Input of a linear, row i of the area: recorded, checked and, when asked, quantised per token (with a
  // backend: rounded to bf16, which is what its quantiser takes).
  void take_input(const Call& call, Site site, std::uint64_t row, float* x, std::uint64_t n, BlockArea& area,
                  std::uint64_t i) const {
    check(call, site, row, x, n);
    call.recorder.put(site, row, 0, x, n);
    if (backend != nullptr) {
      libquant::round_token({x, n}, std::span(area.x16).subspan(i * n, n));
    } else if (precision.fp8_activations) {
      if (area.keep_plain) {
        float* const plain = area.plain.data() + i * padded_stride(n);
        std::transform(x, x + n, plain, libquant::round_bf16);
      }
      area.token_scale[i] = libquant::quantize_token_in_place({x, n});
    }
  }
  // For m inputs of n values of the linears `readers`.
  void prepare_inputs(const Call& call, std::initializer_list<LinearIndex> readers, std::uint64_t m,
                      std::uint64_t n, BlockArea& area) const {
    area.token_scale.resize(m);
    if (backend != nullptr) area.x16.resize(m * n);
    area.keep_plain = precision.fp8_activations && backend == nullptr &&
                      std::any_of(readers.begin(), readers.end(),
                                  [&](LinearIndex i) { return call.weights.linear[i].plain_input; });
    if (area.keep_plain) area.plain.resize(m * padded_stride(n));
  }

  // Calls body(first, last) for the rows of a block: all of them here, or, when a backend has the whole batch
  // in one block, cut over the threads.
  void each_rows(std::uint64_t m, const std::function<void(std::uint64_t, std::uint64_t)>& body) const {
    if (backend == nullptr) return body(0, m);
    for_each_task((m + kTokenBlock - 1) / kTokenBlock, threads, [&](std::size_t block) {
      body(block * kTokenBlock, std::min((block + 1) * kTokenBlock, m));
    });
  }
  // The same for a whole batch: blocks of tokens over the threads, or one block for a backend.
  void each_block(std::uint64_t rows,
                  const std::function<void(std::uint64_t, std::uint64_t, BlockArea&)>& body) {
    const std::uint64_t step = backend == nullptr ? kTokenBlock : rows;
    const auto task = [&](std::size_t block) {
      Pool<BlockArea>::Loan area(blocks);
      body(block * step, std::min((block + 1) * step, rows), *area);
    };
    if (backend != nullptr) return task(0);  // on this thread, so that each_rows may use the others
    for_each_task((rows + step - 1) / step, threads, task);
  }

  void linear(const Call& call, LinearIndex which, const BlockArea& area, std::size_t ldx, std::size_t m,
              float* y, std::size_t ldy) const {
    const LinearPanels& panels = call.weights.linear[which];
    const bool fp8 = precision.fp8_activations && !panels.plain_input;
    const bool kept = precision.fp8_activations && panels.plain_input;
    apply_linear(panels, kept ? area.plain.data() : area.x.data(), ldx, m,
                 fp8 ? area.token_scale.data() : nullptr, precision.fp8_activations, y, ldy, threads);
  }
  // The linears `outputs` of the m inputs in the area, rows of n values; the area's x may be changed.
  void linears(const Call& call, std::span<const LinearOutput> outputs, BlockArea& area, std::uint64_t n,
               std::size_t ldx, std::uint64_t m) const {
    if (backend == nullptr) {
      for (const LinearOutput& o : outputs) linear(call, o.which, area, ldx, m, o.y, o.ldy);
    } else {
      linears_elsewhere(call, outputs, area, n, ldx, m);
    }
  }
  void linears_elsewhere(const Call& call, std::span<const LinearOutput> outputs, BlockArea& area,
                         std::uint64_t n, std::size_t ldx, std::uint64_t m) const;

  void project(const Call& call, std::uint64_t begin, std::uint64_t end, BlockArea& area);
  void store_query(const Call& call, std::uint64_t row, float* q);
  void store_key_value(const Call& call, std::uint64_t row, float* k, const float* v,
                       std::vector<float>& head);  // head: room for one value vector
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
  prepare_inputs(call, {kQ, kK, kV}, m, config.hidden, area);
  each_rows(m, [&](std::uint64_t first, std::uint64_t last) {
    for (std::uint64_t i = first; i < last; ++i) {
      float* x = area.x.data() + i * ldx;
      simd::kernels().rms_norm(call.hidden + (begin + i) * config.hidden, call.weights.attn_norm.data(),
                               static_cast<float>(config.rms_eps), config.hidden, x);
      take_input(call, Site::attn_in, begin + i, x, config.hidden, area, i);
    }
  });
  linears(call,
          std::array<LinearOutput, 3>{
              {{kQ, area.q.data(), ldq}, {kK, area.k.data(), ldk}, {kV, area.v.data(), ldk}}},
          area, config.hidden, ldx, m);
  each_rows(m, [&](std::uint64_t first, std::uint64_t last) {
    std::vector<float> head;
    for (std::uint64_t i = first; i < last; ++i) {
      store_query(call, begin + i, area.q.data() + i * ldq);
      store_key_value(call, begin + i, area.k.data() + i * ldk, area.v.data() + i * ldk, head);
    }
  });
}

// What a backend has runs there on all m rows; what the folder leaves unquantised runs here, in blocks.
void LayerRunner::Impl::linears_elsewhere(const Call& call, std::span<const LinearOutput> outputs,
                                          BlockArea& area, std::uint64_t n, std::size_t ldx,
                                          std::uint64_t m) const {
  std::vector<LinearIndex> there;
  std::vector<std::span<std::uint16_t>> results;
  std::vector<LinearOutput> here;
  for (const LinearOutput& o : outputs) {
    if (call.weights.linear[o.which].weight.rows() != 0) {
      here.push_back(o);
      continue;
    }
    std::vector<std::uint16_t>& y = area.y16[there.size()];
    y.resize(m * formats::linear_shape(config, o.which)[0]);
    there.push_back(o.which);
    results.emplace_back(y);
  }
  if (!there.empty()) backend->multiply(call.layer, there, area.x16, m, results);
  std::size_t next = 0;
  for (const LinearOutput& o : outputs) {
    if (call.weights.linear[o.which].weight.rows() != 0) continue;
    const std::span<const std::uint16_t> from = results[next++];
    const std::uint64_t width = from.size() / m;
    each_rows(m, [&](std::uint64_t first, std::uint64_t last) {
      for (std::uint64_t i = first; i < last; ++i)
        libquant::decode_bf16(from.subspan(i * width, width), std::span(o.y + i * o.ldy, width));
    });
  }
  if (here.empty()) return;
  each_rows(m, [&](std::uint64_t first, std::uint64_t last) {
    float* const x = area.x.data() + first * ldx;
    const auto multiply_here = [&](bool plain, const float* token_scale) {
      for (const LinearOutput& o : here) {
        const LinearPanels& panels = call.weights.linear[o.which];
        if (panels.plain_input != plain) continue;
        apply_linear(panels, x, ldx, last - first, token_scale, true, o.y + first * o.ldy, o.ldy, threads);
      }
    };
    for (std::uint64_t i = first; i < last; ++i) {
      float* const row = area.x.data() + i * ldx;
      std::transform(row, row + n, row, libquant::round_bf16);
    }
    multiply_here(true, nullptr);
    for (std::uint64_t i = first; i < last; ++i)
      area.token_scale[i] = libquant::quantize_token_in_place({area.x.data() + i * ldx, n});
    multiply_here(false, area.token_scale.data() + first);
  });
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
    call.rope.rotate(x, position, false);
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

namespace {

using libquant::KvPart;

// A key or value of KV head g becomes its codes; returns its scale. rounding: of all heads, or empty.
float to_codes(std::span<float> x, std::span<const float> rounding, std::uint64_t g, KvPart part) {
  if (rounding.empty()) return libquant::quantize_kv_in_place(x);
  const std::uint64_t size = libquant::kv_rounding_size(x.size());
  return libquant::quantize_kv_together(x, rounding.subspan(g * size, size), part);
}

}  // namespace

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
    call.rope.rotate(x, position, false);
    if (!shift.empty()) {
      for (std::uint64_t c = 0; c < dim; ++c) x[c] -= shift[g * dim + c];
    }
    if (!smoothing.empty()) {
      for (std::uint64_t c = 0; c < dim; ++c) x[c] *= smoothing[g * dim + c];
    }
    call.recorder.put(Site::k_post_rope, row, g * dim, x, dim);
    std::copy_n(v + g * dim, dim, head.data());
    const float key_scale =
        precision.int4_k ? to_codes({x, dim}, call.weights.k_rounding, g, KvPart::key) : 1.0F;
    const float value_scale =
        precision.int4_v ? to_codes(head, call.weights.v_rounding, g, KvPart::value) : 1.0F;
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
  const auto add_residual = [&] {
    each_rows(m, [&](std::uint64_t first, std::uint64_t last) {
      for (std::uint64_t i = first; i < last; ++i) {
        float* h = call.hidden + (begin + i) * config.hidden;
        const float* y = area.q.data() + i * ldx;
        for (std::uint64_t c = 0; c < config.hidden; ++c) h[c] += y[c];
      }
    });
  };
  prepare_inputs(call, {kO}, m, config.q_rows(), area);
  each_rows(m, [&](std::uint64_t first, std::uint64_t last) {
    for (std::uint64_t i = first; i < last; ++i) {
      float* x = area.x.data() + i * ldo;
      std::copy_n(attention.data() + (begin + i) * config.q_rows(), config.q_rows(), x);
      take_input(call, Site::o_in, begin + i, x, config.q_rows(), area, i);
    }
  });
  linears(call, std::array<LinearOutput, 1>{{{kO, area.q.data(), ldx}}}, area, config.q_rows(), ldo, m);
  add_residual();
  prepare_inputs(call, {kGate, kUp}, m, config.hidden, area);
  each_rows(m, [&](std::uint64_t first, std::uint64_t last) {
    for (std::uint64_t i = first; i < last; ++i) {
      float* x = area.x.data() + i * ldx;
      simd::kernels().rms_norm(call.hidden + (begin + i) * config.hidden, call.weights.mlp_norm.data(),
                               static_cast<float>(config.rms_eps), config.hidden, x);
      take_input(call, Site::mlp_in, begin + i, x, config.hidden, area, i);
    }
  });
  linears(call, std::array<LinearOutput, 2>{{{kGate, area.gate.data(), ldf}, {kUp, area.up.data(), ldf}}},
          area, config.hidden, ldx, m);
  prepare_inputs(call, {kDown}, m, config.ffn, area);
  each_rows(m, [&](std::uint64_t first, std::uint64_t last) {
    for (std::uint64_t i = first; i < last; ++i) {
      float* x = area.gate.data() + i * ldf;
      simd::kernels().silu_mul(x, area.up.data() + i * ldf, config.ffn);
      take_input(call, Site::down_in, begin + i, x, config.ffn, area, i);
    }
  });
  area.x.swap(area.gate);
  linears(call, std::array<LinearOutput, 1>{{{kDown, area.q.data(), ldx}}}, area, config.ffn, ldf, m);
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
  each_block(
      rows, [&](std::uint64_t begin, std::uint64_t end, BlockArea& area) { finish(call, begin, end, area); });
  for (std::size_t site = 0; site < formats::kSites; ++site) call.recorder.tell(static_cast<Site>(site));
}

// From the layer's input to the attention's output, before o_proj.
void LayerRunner::Impl::attend_all(const Call& call) {
  const std::uint64_t rows = call.rows;
  query.resize(rows * config.q_rows());
  query_scale.resize(rows * config.heads);
  attention.resize(rows * config.q_rows());
  each_block(rows, [&](std::uint64_t begin, std::uint64_t end, BlockArea& area) {
    project(call, begin, end, area);
  });
  const std::uint64_t query_blocks = (call.batch.length + kQueryBlock - 1) / kQueryBlock;
  for_each_task(call.batch.sequences * config.kv_heads * query_blocks, threads, [&](std::size_t task) {
    const std::uint64_t begin = task % query_blocks * kQueryBlock;
    const std::uint64_t head = task / query_blocks;
    attend_queries(call, head / config.kv_heads, head % config.kv_heads, begin,
                   std::min(begin + kQueryBlock, call.batch.length));
  });
}

LayerRunner::LayerRunner(const formats::ModelConfig& config, const Precision& precision, int threads,
                         LinearBackend* backend)
    : impl_(std::make_unique<Impl>(config, precision, threads, backend)) {}
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
