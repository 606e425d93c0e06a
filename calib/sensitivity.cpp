#include "calib/sensitivity.hpp"

#include <algorithm>
#include <functional>
#include <utility>

#include "calib/evaluate.hpp"
#include "calib/folding.hpp"
#include "calib/forward.hpp"
#include "calib/scoring.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::calib {
namespace {

using formats::ModulePrecision;

constexpr std::uint64_t kKeptHeadBytes = std::uint64_t{1} << 30U;

// FP8 weights of rows, r * w8, in place.
void through_fp8(std::span<float> rows, std::uint64_t cols) {
  const std::uint64_t count = rows.size() / cols;
  libquant::Fp8Linear q = libquant::make_fp8_linear(count, cols);
  libquant::quantize_fp8_rows(rows, 0, count, q);
  libquant::decode_e4m3(q.codes, rows);
  for (std::uint64_t i = 0; i < count; ++i) {
    for (float& value : rows.subspan(i * cols, cols)) value *= q.row_scales[i];
  }
}

struct FoldedLayer {
  LayerWeights weights;
  FoldReport report;
};

FoldedLayer folded_layer(const PlannedRun& run, std::uint64_t layer) {
  FoldedLayer out{run.source.load_layer(layer, run.threads), {}};
  out.report =
      fold_layer(run.source.config(), run.recipe,
                 run.statistics == nullptr ? nullptr : &run.statistics->layers.at(layer), out.weights);
  return out;
}

// A linear as it would be stored: operands, row scales, and which inputs it multiplies.
LinearWeights stored_linear(const PlannedRun& run, const FoldedLayer& folded, std::uint64_t layer,
                            std::size_t i, ModulePrecision precision) {
  const LinearWeights& original = folded.weights.linear[i];
  LinearWeights out;
  out.name = original.name;
  out.rows = original.rows;
  out.cols = original.cols;
  out.bias = original.bias;
  try {
    switch (precision) {
      case ModulePrecision::original:
        out.weight = original.weight;
        out.plain_input = true;
        break;
      case ModulePrecision::fp8: {
        libquant::Fp8Linear q = quantize_fp8(original.weight, out.rows, out.cols, run.threads);
        out.weight.resize(q.codes.size());
        libquant::decode_e4m3(q.codes, out.weight);
        out.row_scale = std::move(q.row_scales);
        break;
      }
      case ModulePrecision::int4: {
        std::uint64_t saturated = 0;
        const libquant::QuantizedLinear q = quantize_folded(
            original, run.modules.linear(layer, i),
            {folded.report.input_mean[i], folded.report.input_mean_square[i]}, run.threads, saturated);
        const libquant::ProductTable table(q.levels);
        out.weight.resize(q.rows * q.cols);
        parallel_for(q.rows, run.threads, [&](std::size_t r) {
          libquant::operand_rows(q, table, r, 1, std::span(out.weight).subspan(r * q.cols, q.cols));
        });
        out.row_scale = q.row_scales;
        break;
      }
    }
  } catch (Error& error) {
    throw error.tensor_if_unset(out.name + ".weight").path_if_unset(run.source.reader().folder());
  }
  return out;
}

LinearPanels panels_of(LinearWeights w, int threads) {
  LinearPanels out;
  out.weight = Panels(w.weight, w.rows, w.cols, threads);
  out.row_scale = std::move(w.row_scale);
  out.bias = std::move(w.bias);
  out.plain_input = w.plain_input;
  return out;
}

Precision stored_precision() {
  return {.fp8_activations = true};
}

// The hidden states of the original model and of its variants, side by side, a layer at a time.
class Variants {
 public:
  Variants(const PlannedRun& run, const Windows& windows)
      : run_(run),
        windows_(windows),
        rope_(run.source.config(), windows.length),
        original_runner_(run.source.config(), Precision{}, run.threads),
        stored_runner_(run.source.config(), stored_precision(), run.threads),
        size_(windows.ids.size() * run.source.config().hidden) {}

  // KL [unit][precision]; units in the order of their layers. step: a layer or a variant's score is done.
  std::vector<std::vector<double>> run(std::span<const PrecisionUnit> units,
                                       std::span<const ModulePrecision> precisions,
                                       const std::function<void()>& step) {
    const std::uint64_t layers = run_.source.config().layers;
    std::vector<float> base(size_);
    run_.source.embed(windows_.ids, base);
    std::vector<std::vector<float>> variants;
    std::size_t next = 0;
    for (std::uint64_t layer = 0; layer < layers; ++layer) {
      check_interrupt();
      FoldedLayer folded = folded_layer(run_, layer);
      const std::size_t before = variants.size();
      // Variants of this layer start from the original's states.
      std::vector<LinearPanels> replaced;
      std::vector<std::pair<std::size_t, std::size_t>> places;  // unit, precision
      for (; next < units.size() && units[next].layer == layer; ++next) {
        for (const ModulePrecision precision : precisions) {
          places.emplace_back(next, replaced.size());
          for (const std::size_t i : units[next].linears) {
            replaced.push_back(panels_of(stored_linear(run_, folded, layer, i, precision), run_.threads));
          }
        }
      }
      LayerPanels panels = pack_layer(std::move(folded.weights), run_.threads);
      for (LinearPanels& l : panels.linear) l.plain_input = true;
      for (const auto& place : places) {
        check_interrupt();
        const auto swap = [&] {
          std::size_t from = place.second;
          for (const std::size_t i : units[place.first].linears) {
            std::swap(panels.linear[i], replaced[from++]);
          }
        };
        swap();
        variants.push_back(base);
        advance(stored_runner_, panels, layer, variants.back());
        swap();
      }
      for (std::size_t v = 0; v < before; ++v) advance(original_runner_, panels, layer, variants[v]);
      advance(original_runner_, panels, layer, base);
      step();
    }
    return score(base, variants, precisions.size(), step);
  }

 private:
  void advance(LayerRunner& runner, const LayerPanels& panels, std::uint64_t layer,
               std::vector<float>& hidden) {
    runner.run(panels, layer, rope_, {windows_.count, windows_.length, 0, 0}, hidden, nullptr);
  }

  std::vector<std::vector<double>> score(const std::vector<float>& base,
                                         const std::vector<std::vector<float>>& variants,
                                         std::size_t precisions, const std::function<void()>& step) {
    const formats::ModelConfig& config = run_.source.config();
    const bool keep = config.vocab * config.hidden * sizeof(float) <= kKeptHeadBytes;
    OutputHead head(run_.source, keep, OutputHead::part_rows_for(config.hidden), run_.threads);
    std::vector<std::vector<double>> kl;
    std::size_t v = 0;
    while (v < variants.size()) {
      check_interrupt();
      const auto together = std::span(variants).subspan(v, std::min(kScoredTogether, variants.size() - v));
      for (const double mean : mean_divergences(head, together, base, run_.threads)) {
        if (v++ % precisions == 0) kl.emplace_back();
        kl.back().push_back(mean);
        step();
      }
    }
    return kl;
  }

  const PlannedRun& run_;
  const Windows& windows_;
  RopeTable rope_;
  LayerRunner original_runner_, stored_runner_;
  const std::size_t size_;
};

}  // namespace

LayerWeights PlannedWeights::load_layer(std::uint64_t layer, int threads) const {
  PlannedRun run = run_;
  run.threads = threads;
  FoldedLayer folded = folded_layer(run, layer);
  for (std::size_t i = 0; i < kLinears; ++i) {
    folded.weights.linear[i] = stored_linear(run, folded, layer, i, run_.modules.linear(layer, i).precision);
  }
  return std::move(folded.weights);
}

void PlannedWeights::embed(std::span<const std::int32_t> ids, std::span<float> out) const {
  run_.source.embed(ids, out);
  if (run_.modules.embeddings() == ModulePrecision::fp8) through_fp8(out, config().hidden);
}

void PlannedWeights::head_rows(std::uint64_t begin, std::uint64_t count, std::span<float> out) const {
  run_.source.head_rows(begin, count, out);
  if (run_.modules.head_as_stored() == ModulePrecision::fp8) through_fp8(out, config().hidden);
}

libquant::QuantizedLinear PlannedWeights::quantized(std::uint64_t /*layer*/, std::size_t /*linear*/) const {
  throw Error(ErrorKind::internal, "planned weights are not packed");
}

Windows sample_windows(const Windows& windows, std::uint64_t tokens) {
  Windows out;
  out.length = std::min(windows.length, std::max<std::uint64_t>(2, tokens));
  out.count = std::clamp<std::uint64_t>(tokens / out.length, 1, windows.count);
  for (std::uint64_t w = 0; w < out.count; ++w) {
    const auto begin = windows.ids.begin() + static_cast<std::ptrdiff_t>(w * windows.length);
    out.ids.insert(out.ids.end(), begin, begin + static_cast<std::ptrdiff_t>(out.length));
  }
  return out;
}

double stored_kl(const WeightSource& packed, const WeightSource& original, const Windows& windows,
                 int threads) {
  EvaluationOptions options;
  options.precision = stored_precision();
  options.threads = threads;
  options.reference = &original;
  Progress silent;
  return *evaluate(packed, windows, options, silent).kl_mean;
}

double planned_kl(const PlannedRun& run, const Windows& windows) {
  return stored_kl(PlannedWeights(run), run.source, windows, run.threads);
}

std::uint64_t unit_kl_memory(const formats::ModelConfig& config, std::uint64_t tokens, std::size_t units,
                             std::size_t precisions, std::uint64_t bytes) {
  const std::uint64_t state = tokens * config.hidden * sizeof(float);
  const std::size_t at_once = std::max<std::size_t>(1, bytes / state / precisions);
  const std::uint64_t variants = std::min(units, at_once) * precisions;
  std::uint64_t layer = 0;
  for (std::size_t i = 0; i < kLinears; ++i) {
    const auto [rows, cols] = formats::linear_shape(config, i);
    layer += rows * cols * sizeof(float);
  }
  const std::uint64_t head = config.vocab * config.hidden * sizeof(float);
  const std::uint64_t part = OutputHead::part_rows_for(config.hidden) * config.hidden * sizeof(float);
  // The original's states beside the variants'; then either layers, as read, as panels and in each precision,
  // or the head and the normalised copies of what is scored together.
  const std::uint64_t layers = (2 + precisions) * layer;
  const std::uint64_t scoring =
      (head <= kKeptHeadBytes ? head : part) + (kScoredTogether + 1) * (state + tokens * 256);
  return (variants + 1) * state + std::max(layers, scoring);
}

std::vector<std::vector<double>> unit_kl(const PlannedRun& run, const Windows& windows,
                                         std::span<const PrecisionUnit> units,
                                         std::span<const ModulePrecision> precisions, std::uint64_t bytes,
                                         Progress& progress) {
  const std::uint64_t variant = windows.ids.size() * run.source.config().hidden * sizeof(float);
  const std::size_t at_once = std::max<std::size_t>(1, bytes / variant / precisions.size());
  const std::size_t passes = (units.size() + at_once - 1) / at_once;
  std::vector<std::vector<double>> result;
  std::uint64_t done = 0;
  progress.begin("measure", passes * run.source.config().layers + units.size() * precisions.size());
  for (std::size_t first = 0; first < units.size(); first += at_once) {
    Variants variants(run, windows);
    const auto part = units.subspan(first, std::min(at_once, units.size() - first));
    for (std::vector<double>& kl : variants.run(part, precisions, [&] { progress.advance(++done); })) {
      result.push_back(std::move(kl));
    }
  }
  progress.end();
  return result;
}

}  // namespace fireq::calib
