#include "calib/two_streams.hpp"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "calib/linear_quantizer.hpp"
#include "calib/simd.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"
#include "common/progress.hpp"
#include "libquant/activation_quantizer.hpp"
#include "libquant/curvature_quantizer.hpp"
#include "libquant/number_formats.hpp"
#include "libquant/trained_levels.hpp"

namespace fireq::calib {
namespace {

using formats::ModulePrecision;
using libquant::Curvature;
using libquant::QuantizedLinear;

// Tokens per batch (at least one window) and per task of the per-token work.
constexpr std::uint64_t kBatchTokens = 2048;
constexpr std::uint64_t kTokenBlock = 128;

Precision quantized_precision(const Recipe& recipe) {
  Precision p;
  p.fp8_activations = true;
  if (recipe.stream_kv && recipe.kv_cache) p.int4_k = p.int4_v = p.fp8_q = p.fp8_p = true;
  return p;
}

void for_blocks(std::uint64_t rows, int threads,
                const std::function<void(std::uint64_t begin, std::uint64_t end)>& body) {
  parallel_for((rows + kTokenBlock - 1) / kTokenBlock, threads, [&](std::size_t block) {
    body(block * kTokenBlock, std::min((block + 1) * kTokenBlock, rows));
  });
}

// What the forward pass multiplies for a packed linear.
LinearPanels operand_panels(const QuantizedLinear& q, const std::vector<float>& bias, int threads) {
  const libquant::ProductTable table(q.levels);
  LinearPanels out;
  out.weight = Panels(q.rows, q.cols);
  constexpr std::uint64_t kRows = simd::kPanel;
  parallel_for((q.rows + kRows - 1) / kRows, threads, [&](std::size_t task) {
    const std::uint64_t begin = task * kRows;
    const std::uint64_t count = std::min(kRows, q.rows - begin);
    std::vector<float> rows(count * q.cols);
    libquant::operand_rows(q, table, begin, count, rows);
    out.weight.set_rows(begin, rows);
  });
  out.row_scale = q.row_scales;
  out.bias = bias;
  return out;
}

}  // namespace

struct TwoStreams::Layer {
  std::uint64_t index = 0;
  LayerWeights weights;  // targets replace the matrices
  LayerPanels original, quantized;
  QuantizedLayer result;
  StreamReport* report = nullptr;  // null: a replay, `result` is given
  std::optional<OutputSums> outputs;
};

TwoStreams::TwoStreams(const WeightSource& source, const Windows& windows, const Recipe& recipe, int threads,
                       Progress& progress, const Modules* modules)
    : source_(source),
      windows_(windows),
      recipe_(recipe),
      threads_(threads),
      modules_(modules),
      rope_(source.config(), windows.length),
      original_runner_(source.config(), Precision{}, threads),
      quantized_runner_(source.config(), quantized_precision(recipe), threads),
      original_(windows.ids.size() * source.config().hidden) {
  source.embed(windows.ids, original_);
  quantized_ = original_;
  if (recipe.curvature && recipe.output_curvature) gradients_.emplace(source, windows, threads, progress);
}

std::uint64_t TwoStreams::bytes(const formats::ModelConfig& config, const Recipe& recipe,
                                const Windows& windows) {
  const std::uint64_t tokens = windows.ids.size();
  const std::uint64_t widest = std::max({config.hidden, config.q_rows(), config.ffn});
  // Sums (8), factor in FP64 (8), and the damped matrix with its factor (8) per element.
  return tokens * (2 * config.hidden * sizeof(float) + widest) + 24 * widest * widest +
         (recipe.output_curvature ? OutputGradients::bytes(config, windows) : 0);
}

std::vector<Batch> TwoStreams::batches() const {
  const std::uint64_t at_once = std::max<std::uint64_t>(1, kBatchTokens / windows_.length);
  std::vector<Batch> list;
  for (std::uint64_t first = 0; first < windows_.count; first += at_once) {
    list.push_back({std::min(at_once, windows_.count - first), windows_.length, 0, first});
  }
  return list;
}

QuantizedLayer TwoStreams::quantize(std::uint64_t layer, LayerWeights weights, StreamReport& report) {
  Layer work{layer, std::move(weights), {}, {}, {}, &report, {}};
  run(work);
  return std::move(work.result);
}

void TwoStreams::replay(std::uint64_t layer, LayerWeights weights, const QuantizedLayer& quantized) {
  Layer work{layer, std::move(weights), {}, {}, quantized, nullptr, {}};
  run(work);
}

void TwoStreams::run(Layer& work) {
  const formats::ModelConfig& config = source_.config();
  const bool quantizing = work.report != nullptr;
  for (std::size_t i = 0; i < kLinears; ++i) {
    const LinearWeights& w = work.weights.linear[i];
    work.original.linear[i].weight = Panels(w.weight, w.rows, w.cols, threads_);
    work.original.linear[i].bias = w.bias;
  }
  for (LayerPanels* panels : {&work.original, &work.quantized}) {
    panels->attn_norm = work.weights.attn_norm;
    panels->mlp_norm = work.weights.mlp_norm;
    panels->q_norm = work.weights.q_norm;
    panels->k_norm = work.weights.k_norm;
    panels->k_post_rope_scale = work.weights.k_post_rope_scale;
    panels->k_post_rope_shift = work.weights.k_post_rope_shift;
    panels->k_rounding = work.weights.k_rounding;
    panels->v_rounding = work.weights.v_rounding;
  }
  if (quantizing && gradients_) work.outputs = gradients_->sums(work.index, work.weights, original_);
  const auto sums_for = [&](std::uint64_t channels) {
    std::optional<Curvature> sums;
    if (quantizing) sums.emplace(channels);
    return sums;
  };
  const auto residual_for = [&](std::uint64_t channels) {
    return std::vector<float>(quantizing && recipe_.residual ? config.hidden * channels : 0, 0.0F);
  };
  // Quantised linears of a site, from their targets or as given, ready to multiply.
  const auto finish = [&](std::initializer_list<LinearIndex> which, std::optional<Curvature>& sums,
                          std::span<const float> residual, const char* site) {
    const std::vector<LinearIndex> list(which);
    if (sums) quantize_linears(work, list, *sums, residual, site);
    for (const LinearIndex i : list) {
      work.quantized.linear[i] = stored_panels(work, i);
      std::vector<float>().swap(work.weights.linear[i].weight);
    }
  };

  {
    std::optional<Curvature> sums = sums_for(config.hidden);
    if (sums) norm_inputs(work.weights.attn_norm, *sums);
    finish({kQ, kK, kV}, sums, {}, "attn_in");
  }
  {
    std::optional<Curvature> sums = sums_for(config.q_rows());
    std::vector<float> residual = residual_for(config.q_rows());
    attention_inputs(work, sums ? &*sums : nullptr, residual.empty() ? nullptr : &residual);
    finish({kO}, sums, residual, "o_in");
    advance_quantized(work.quantized.linear[kO]);
  }
  {
    std::optional<Curvature> sums = sums_for(config.hidden);
    if (sums) norm_inputs(work.weights.mlp_norm, *sums);
    finish({kGate, kUp}, sums, {}, "mlp_in");
  }
  {
    std::optional<Curvature> sums = sums_for(config.ffn);
    std::vector<float> residual = residual_for(config.ffn);
    down_inputs(work, sums ? &*sums : nullptr, residual.empty() ? nullptr : &residual);
    finish({kDown}, sums, residual, "down_in");
    advance_quantized(work.quantized.linear[kDown]);
  }
}

// Inputs of q, k, v or of gate, up: both streams' norms.
void TwoStreams::norm_inputs(const std::vector<float>& norm, Curvature& sums) {
  const std::uint64_t hidden = source_.config().hidden;
  const auto eps = static_cast<float>(source_.config().rms_eps);
  SiteBatch site;
  site.stride = padded_stride(hidden);
  inputs_ = {};
  for (const Batch& batch : batches()) {
    check_interrupt();
    const std::uint64_t rows = batch.sequences * batch.length;
    const std::uint64_t first = batch.first_sequence * batch.length;
    site.original.resize(rows * site.stride);
    site.quantized.resize(rows * site.stride);
    for_blocks(rows, threads_, [&](std::uint64_t begin, std::uint64_t end) {
      for (std::uint64_t i = begin; i < end; ++i) {
        simd::kernels().rms_norm(original_.data() + (first + i) * hidden, norm.data(), eps, hidden,
                                 site.original.data() + i * site.stride);
        simd::kernels().rms_norm(quantized_.data() + (first + i) * hidden, norm.data(), eps, hidden,
                                 site.quantized.data() + i * site.stride);
      }
    });
    quantize_inputs(batch, site, hidden);
    FloatBuffer lack;
    add(batch, site, hidden, false, lack, sums, nullptr);
  }
}

// Inputs of o: the attention's outputs. The original stream moves on behind o.
void TwoStreams::attention_inputs(Layer& work, Curvature* sums, std::vector<float>* residual) {
  const std::uint64_t hidden = source_.config().hidden;
  const std::uint64_t channels = source_.config().q_rows();
  SiteBatch site;
  site.stride = padded_stride(channels);
  inputs_ = {channels, std::vector<std::uint8_t>(windows_.ids.size() * channels),
             std::vector<float>(windows_.ids.size())};
  std::vector<float> out;
  for (const Batch& batch : batches()) {
    check_interrupt();
    const std::uint64_t rows = batch.sequences * batch.length;
    const std::uint64_t first = batch.first_sequence * batch.length;
    out.resize(rows * channels);
    const auto attend = [&](LayerRunner& runner, const LayerPanels& panels, const std::vector<float>& stream,
                            FloatBuffer& to) {
      runner.attention_outputs(panels, work.index, rope_, batch,
                               std::span(stream).subspan(first * hidden, rows * hidden), out);
      to.resize(rows * site.stride);
      for (std::uint64_t i = 0; i < rows; ++i) {
        std::copy_n(out.data() + i * channels, channels, to.data() + i * site.stride);
      }
    };
    attend(original_runner_, work.original, original_, site.original);
    attend(quantized_runner_, work.quantized, quantized_, site.quantized);
    FloatBuffer lack = residual == nullptr ? FloatBuffer() : lacking(batch);
    advance_original(work.original.linear[kO], batch, site);
    quantize_inputs(batch, site, channels);
    if (sums != nullptr) add(batch, site, channels, recipe_.token_weights, lack, *sums, residual);
  }
}

// Inputs of down. The original stream moves on behind it.
void TwoStreams::down_inputs(Layer& work, Curvature* sums, std::vector<float>* residual) {
  const std::uint64_t hidden = source_.config().hidden;
  const std::uint64_t channels = source_.config().ffn;
  const auto eps = static_cast<float>(source_.config().rms_eps);
  SiteBatch site;
  site.stride = padded_stride(channels);
  inputs_ = {channels, std::vector<std::uint8_t>(windows_.ids.size() * channels),
             std::vector<float>(windows_.ids.size())};
  for (const Batch& batch : batches()) {
    check_interrupt();
    const std::uint64_t rows = batch.sequences * batch.length;
    const std::uint64_t first = batch.first_sequence * batch.length;
    const auto activate = [&](const LayerPanels& panels, const std::vector<float>& stream, bool fp8,
                              FloatBuffer& to) {
      to.resize(rows * site.stride);
      for_blocks(rows, threads_, [&](std::uint64_t begin, std::uint64_t end) {
        Pool<FloatBuffer>::Loan x(areas_);
        Pool<FloatBuffer>::Loan up(areas_);
        const std::size_t ldx = padded_stride(hidden);
        const std::uint64_t m = end - begin;
        x->resize(m * ldx);
        up->resize(m * site.stride);
        std::vector<float> scale(fp8 ? m : 0);
        for (std::uint64_t i = 0; i < m; ++i) {
          float* row = x->data() + i * ldx;
          simd::kernels().rms_norm(stream.data() + (first + begin + i) * hidden, panels.mlp_norm.data(), eps,
                                   hidden, row);
          if (fp8) scale[i] = libquant::quantize_token_in_place({row, hidden});
        }
        const float* scales = fp8 ? scale.data() : nullptr;
        float* gate = to.data() + begin * site.stride;
        apply_linear(panels.linear[kGate], x->data(), ldx, m, scales, fp8, gate, site.stride, 1);
        apply_linear(panels.linear[kUp], x->data(), ldx, m, scales, fp8, up->data(), site.stride, 1);
        for (std::uint64_t i = 0; i < m; ++i) {
          simd::kernels().silu_mul(gate + i * site.stride, up->data() + i * site.stride, channels);
        }
      });
    };
    activate(work.original, original_, false, site.original);
    activate(work.quantized, quantized_, true, site.quantized);
    FloatBuffer lack = residual == nullptr ? FloatBuffer() : lacking(batch);
    advance_original(work.original.linear[kDown], batch, site);
    quantize_inputs(batch, site, channels);
    if (sums != nullptr) add(batch, site, channels, recipe_.token_weights, lack, *sums, residual);
  }
}

// Rounds the quantised side to FP8; the codes are kept for advance_quantized where inputs_ has room.
void TwoStreams::quantize_inputs(const Batch& batch, SiteBatch& site, std::uint64_t channels) {
  const std::uint64_t rows = batch.sequences * batch.length;
  const std::uint64_t first = batch.first_sequence * batch.length;
  for_blocks(rows, threads_, [&](std::uint64_t begin, std::uint64_t end) {
    std::vector<std::uint8_t> spare(inputs_.code.empty() ? channels : 0);
    for (std::uint64_t i = begin; i < end; ++i) {
      const std::span<float> x(site.quantized.data() + i * site.stride, channels);
      const std::span<std::uint8_t> code =
          inputs_.code.empty() ? std::span(spare)
                               : std::span(inputs_.code).subspan((first + i) * channels, channels);
      const float a = libquant::quantize_token(x, code);
      if (!inputs_.code.empty()) inputs_.scale[first + i] = a;
      libquant::decode_e4m3(code, x);
      for (float& v : x) v *= a;
    }
  });
}

// h_f - h_q, before the linear at work.
FloatBuffer TwoStreams::lacking(const Batch& batch) const {
  const std::uint64_t hidden = source_.config().hidden;
  const std::size_t begin = batch.first_sequence * batch.length * hidden;
  FloatBuffer lack(batch.sequences * batch.length * hidden);
  for (std::size_t i = 0; i < lack.size(); ++i) lack[i] = original_[begin + i] - quantized_[begin + i];
  return lack;
}

// Adds a batch to the sums. weigh: a token counts by 1 / mean h_f^2 behind the linear. Whatever reads the
// residual stream divides it by its root mean square first, so an error of one size costs a token of large
// hidden states less; without this, a few tokens with massive activations own the sums.
void TwoStreams::add(const Batch& batch, SiteBatch& site, std::uint64_t channels, bool weigh,
                     FloatBuffer& lack, Curvature& sums, std::vector<float>* residual) const {
  const std::uint64_t hidden = source_.config().hidden;
  const std::uint64_t rows = batch.sequences * batch.length;
  const std::uint64_t first = batch.first_sequence * batch.length;
  if (weigh) {
    for_blocks(rows, threads_, [&](std::uint64_t begin, std::uint64_t end) {
      for (std::uint64_t i = begin; i < end; ++i) {
        double square = 0;
        for (const float h : std::span(original_).subspan((first + i) * hidden, hidden)) {
          square += static_cast<double>(h) * static_cast<double>(h);
        }
        const auto factor = static_cast<float>(
            1 / std::sqrt(square / static_cast<double>(hidden) + source_.config().rms_eps));
        for (float& x : std::span(site.quantized).subspan(i * site.stride, channels)) x *= factor;
        for (float& x : std::span(site.original).subspan(i * site.stride, channels)) x *= factor;
        if (lack.empty()) continue;
        for (float& x : std::span(lack).subspan(i * hidden, hidden)) x *= factor;
      }
    });
  }
  if (residual != nullptr) {
    libquant::add_outer_products(lack.data(), hidden, hidden, site.quantized.data(), site.stride, channels,
                                 rows, false, *residual, threads_);
  }
  sums.add(site.quantized.data(), site.original.data(), site.stride, rows, threads_);
}

void TwoStreams::quantize_linears(Layer& work, std::span<const LinearIndex> which, Curvature& sums,
                                  std::span<const float> residual, const char* site) {
  const auto stays = [&](LinearIndex i) { return precision(work, i) == ModulePrecision::original; };
  if (std::all_of(which.begin(), which.end(), stays)) return;
  if (recipe_.compensate) {
    const libquant::TargetSolver solver(sums, recipe_.target_ridge, threads_);
    for (const LinearIndex i : which) {
      if (stays(i)) continue;
      check_interrupt();
      LinearWeights& w = work.weights.linear[i];
      solver.compensate(w.weight, w.rows, residual, threads_);
    }
  }
  const libquant::CurvatureFactor factor =
      libquant::factor_curvature(sums, recipe_.curvature_damping, threads_);
  work.report->dead_channels += factor.dead;
  if (factor.raised) work.report->raised.emplace_back(site);
  libquant::CurvatureQuantizerOptions options;
  options.row_scale = libquant::RowScale::row;
  options.passes = static_cast<unsigned>(recipe_.descent_passes);
  options.pin_top_scale = recipe_.weights.pin_top_scale;
  check_interrupt();
  const auto quantize = [&](LinearIndex i) {
    if (stays(i)) return;
    const LinearWeights& w = work.weights.linear[i];
    const ModuleChoice choice = chosen(work, i);
    libquant::CurvatureQuantizerOptions own = options;
    own.search_low = choice.weights.search_low;
    own.search_high = choice.weights.search_high;
    try {
      if (choice.precision == ModulePrecision::fp8) {
        work.result.fp8[i] = quantize_fp8(w.weight, w.rows, w.cols, threads_);
        return;
      }
      std::optional<libquant::CurvatureFactor> outputs;
      if (work.outputs) {
        outputs = libquant::factor_curvature((*work.outputs)[i], recipe_.output_damping, threads_);
        std::vector<float>().swap((*work.outputs)[i].square);
      }
      libquant::Levels levels = choice.weights.levels;
      if (choice.train_levels) {
        std::vector<float> worth(outputs ? w.rows : 0);  // of each row
        for (std::uint64_t r = 0; r < worth.size(); ++r) worth[r] = outputs->matrix[r * w.rows + r];
        levels = libquant::train_levels(w.weight, w.rows, factor, worth, own, levels, {}, threads_);
      }
      work.result[i] = libquant::make_quantized_linear(w.rows, w.cols, levels, false);
      const libquant::CurvatureError error = libquant::quantize_with_curvature(
          w.weight, factor, own, threads_, work.result[i], outputs ? &*outputs : nullptr);
      work.report->error[i] = error.reference > 0 ? std::sqrt(error.final / error.reference) : 0;
    } catch (Error& error) {
      throw error.tensor_if_unset(w.name + ".weight").path_if_unset(source_.reader().folder());
    }
  };
  // With output curvature a linear is mostly one long chain of steps: linears of one input side by side.
  if (work.outputs) {
    parallel_for(which.size(), threads_, [&](std::size_t i) { quantize(which[i]); });
  } else {
    std::for_each(which.begin(), which.end(), quantize);
  }
}

ModuleChoice TwoStreams::chosen(const Layer& work, std::size_t linear) const {
  if (modules_ != nullptr) return modules_->linear(work.index, linear);
  return {ModulePrecision::int4, recipe_.weights, recipe_.weighted_search, recipe_.keep_means,
          recipe_.train_levels};
}

ModulePrecision TwoStreams::precision(const Layer& work, std::size_t linear) const {
  return chosen(work, linear).precision;
}

LinearPanels TwoStreams::stored_panels(const Layer& work, std::size_t linear) const {
  const LinearWeights& w = work.weights.linear[linear];
  if (precision(work, linear) == ModulePrecision::int4) {
    return operand_panels(work.result[linear], w.bias, threads_);
  }
  LinearPanels out;
  out.bias = w.bias;
  if (precision(work, linear) == ModulePrecision::original) {
    out.weight = Panels(w.weight, w.rows, w.cols, threads_);
    return out;
  }
  const libquant::Fp8Linear& q = work.result.fp8[linear];
  std::vector<float> operands(q.codes.size());
  libquant::decode_e4m3(q.codes, operands);
  out.weight = Panels(operands, q.rows, q.cols, threads_);
  out.row_scale = q.row_scales;
  return out;
}

void TwoStreams::advance_original(const LinearPanels& linear, const Batch& batch, const SiteBatch& site) {
  const std::uint64_t hidden = source_.config().hidden;
  const std::uint64_t first = batch.first_sequence * batch.length;
  for_blocks(batch.sequences * batch.length, threads_, [&](std::uint64_t begin, std::uint64_t end) {
    Pool<FloatBuffer>::Loan y(areas_);
    const std::size_t ldy = padded_stride(hidden);
    y->resize((end - begin) * ldy);
    apply_linear(linear, site.original.data() + begin * site.stride, site.stride, end - begin, nullptr, false,
                 y->data(), ldy, 1);
    for (std::uint64_t i = begin; i < end; ++i) {
      float* h = original_.data() + (first + i) * hidden;
      const float* row = y->data() + (i - begin) * ldy;
      for (std::uint64_t c = 0; c < hidden; ++c) h[c] += row[c];
    }
  });
}

void TwoStreams::advance_quantized(const LinearPanels& linear) {
  const std::uint64_t hidden = source_.config().hidden;
  const std::size_t ldx = padded_stride(inputs_.channels);
  const std::size_t ldy = padded_stride(hidden);
  for_blocks(windows_.ids.size(), threads_, [&](std::uint64_t begin, std::uint64_t end) {
    Pool<FloatBuffer>::Loan x(areas_);
    Pool<FloatBuffer>::Loan y(areas_);
    x->resize((end - begin) * ldx);
    y->resize((end - begin) * ldy);
    for (std::uint64_t i = begin; i < end; ++i) {
      libquant::decode_e4m3(std::span(inputs_.code).subspan(i * inputs_.channels, inputs_.channels),
                            {x->data() + (i - begin) * ldx, inputs_.channels});
    }
    apply_linear(linear, x->data(), ldx, end - begin, inputs_.scale.data() + begin, true, y->data(), ldy, 1);
    for (std::uint64_t i = begin; i < end; ++i) {
      float* h = quantized_.data() + i * hidden;
      const float* row = y->data() + (i - begin) * ldy;
      for (std::uint64_t c = 0; c < hidden; ++c) h[c] += row[c];
    }
  });
}

}  // namespace fireq::calib
