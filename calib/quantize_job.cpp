#include "calib/quantize_job.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <filesystem>
#include <set>
#include <utility>

#include "calib/code_tuner.hpp"
#include "calib/evaluate.hpp"
#include "calib/folding.hpp"
#include "calib/int4_weights.hpp"
#include "calib/linear_quantizer.hpp"
#include "calib/measured_cost.hpp"
#include "calib/model_card.hpp"
#include "calib/own_text.hpp"
#include "calib/packed_tensors.hpp"
#include "calib/plain_tensors.hpp"
#include "calib/two_streams.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/kv_rounding.hpp"
#include "libquant/number_formats.hpp"
#include "libquant/packing.hpp"

namespace fireq::calib {
namespace {

using formats::FireqWriter;
using formats::ModulePrecision;
using libquant::QuantizedLinear;
using libquant::RowScale;
using StagedTensor = FireqWriter::Tensor;

constexpr std::string_view kStatisticsFile = "calibration.h5";

std::string layer_unit(std::uint64_t layer) {
  const std::string digits = std::to_string(layer);
  return "layer-" + std::string(digits.size() < 5 ? 5 - digits.size() : 0, '0') + digits;
}

// A layer whose codes were tuned with all others'.
std::string tuned_unit(std::uint64_t layer) {
  return "tuned-" + layer_unit(layer);
}

std::string layer_prefix(std::uint64_t layer) {
  return "model.layers." + std::to_string(layer) + ".";
}

StagedTensor owned_f32(std::string name, const std::vector<float>& values, std::vector<std::uint64_t> shape) {
  return owned_tensor(std::move(name), Dtype::f32, std::move(shape), to_bytes(values));
}

// Values that BF16 holds.
StagedTensor owned_bf16(std::string name, const std::vector<float>& values,
                        std::vector<std::uint64_t> shape) {
  std::vector<std::uint16_t> half(values.size());
  libquant::encode_bf16(values, half);
  return owned_tensor(std::move(name), Dtype::bf16, std::move(shape), to_bytes(half));
}

StagedTensor copied(const TensorView& view) {
  return {{view.name, view.dtype, view.shape}, {}, view.data};
}

void sort_by_name(std::vector<StagedTensor>& tensors) {
  std::sort(tensors.begin(), tensors.end(),
            [](const StagedTensor& a, const StagedTensor& b) { return a.plan.name < b.plan.name; });
}

class Job {
 public:
  Job(const WeightSource& source, const QuantizeOptions& options, formats::FileSystem& fs, Progress& progress)
      : source_(source),
        options_(options),
        fs_(fs),
        progress_(progress),
        reader_(source.reader()),
        config_(source.config()),
        modules_(modules_of(source, options.recipe)) {}

  QuantizeResult run();

 private:
  void obtain_statistics(FireqWriter& writer);
  void stage_layer(FireqWriter& writer, std::uint64_t layer);
  void stage_tuned_layers(FireqWriter& writer);
  std::vector<StagedTensor> layer_tensors(std::uint64_t layer, const FoldReport& report,
                                          LayerWeights* weights, QuantizedLayer* packed);
  void stage_rest(FireqWriter& writer);
  std::vector<StagedTensor> imported_head() const;
  QuantizedLinear quantize_linear(const std::string& name, std::uint64_t layer, std::size_t i,
                                  const FoldReport& report, const LayerWeights* weights);
  StagedTensor plain_linear(const std::string& name, std::uint64_t layer, std::size_t i,
                            const FoldReport& report, const LayerWeights* weights) const;
  std::vector<StagedTensor> weight_tensors(const std::string& name, std::uint64_t layer, std::size_t i,
                                           const FoldReport& report, const LayerWeights* weights,
                                           const QuantizedLayer* together);
  std::vector<StagedTensor> linear_tensors(std::uint64_t layer, std::size_t i, const FoldReport& report,
                                           const LayerWeights* weights, const QuantizedLayer* together);
  QuantizedLayer quantize_in_streams(std::uint64_t layer, const LayerWeights& weights);
  QuantizedLayer staged_layer(const FireqWriter& writer, const std::string& unit, std::uint64_t layer) const;
  void replay_layer(FireqWriter& writer, std::uint64_t layer);
  std::array<std::string, 3> fingerprints();
  formats::QuantizationConfig quantization_config() const;
  void publish(FireqWriter& writer, const QuantizePlan& plan, const std::vector<std::string>& units);

  const WeightSource& source_;
  const QuantizeOptions& options_;
  formats::FileSystem& fs_;
  Progress& progress_;
  const formats::CheckpointReader& reader_;
  const formats::ModelConfig& config_;
  const Modules modules_;
  std::string model_fingerprint_, text_fingerprint_;
  std::optional<formats::CalibrationStatistics> statistics_;
  Windows stream_windows_;             // calibration, and what the model wrote
  std::optional<TwoStreams> streams_;  // where the recipe rounds under curvature
  std::uint64_t last_open_layer_ = 0;  // of those that were not done when this run began
  QuantizeResult result_;
};

std::array<std::string, 3> Job::fingerprints() {
  model_fingerprint_ = reader_.fingerprint(options_.threads);
  if (options_.statistics_path) {
    statistics_ = statistics_of_model(*options_.statistics_path, config_, model_fingerprint_);
    text_fingerprint_ = statistics_->meta.text_fingerprint;
  } else if (options_.calibration) {
    if (options_.recipe.needs_statistics()) statistics_ = options_.statistics;
    text_fingerprint_ = fingerprint_of_windows(*options_.calibration);
  }
  return {model_fingerprint_, text_fingerprint_, recipe_to_json(options_.recipe)};
}

void Job::obtain_statistics(FireqWriter& writer) {
  if (!options_.recipe.needs_statistics()) return;
  const std::string path = writer.side_file(std::string(kStatisticsFile));
  if (!statistics_ && std::filesystem::exists(path)) {
    statistics_ =
        formats::read_statistics(path);  // a resumed run: same model and text, checked by the fingerprints
    return;
  }
  const auto begin = std::chrono::steady_clock::now();
  if (!statistics_) {
    if (!options_.calibration) {
      throw Error(ErrorKind::usage, "preset '" + options_.recipe.preset + "' needs calibration text")
          .hint("give --text FILE or --stats FILE, or use --preset rtn");
    }
    statistics_ = calibrate(source_, *options_.calibration, options_.threads, progress_);
    statistics_->meta.model_fingerprint = model_fingerprint_;
    statistics_->meta.text_fingerprint = text_fingerprint_;
    statistics_->meta.seed = options_.seed;
  }
  formats::write_statistics(fs_, path, *statistics_);
  result_.calibration_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

QuantizedLinear Job::quantize_linear(const std::string& name, std::uint64_t layer, std::size_t i,
                                     const FoldReport& report, const LayerWeights* weights) {
  const InputMoments inputs{report.input_mean[i], report.input_mean_square[i]};
  const ModuleChoice& choice = modules_.linear(layer, i);
  std::uint64_t saturated = 0;
  QuantizedLinear q =
      weights == nullptr
          ? quantize_raw(reader_.tensor(name + ".weight"), choice, inputs, options_.threads, saturated)
          : quantize_folded(weights->linear[i], choice, inputs, options_.threads, saturated);
  if (saturated > 0) {
    progress_.warning(name + ".weight: " + std::to_string(saturated) +
                      " groups hold weights beyond 448, which a per-tensor scale cuts off; row scales "
                      "(presets rtn, fast, best) keep them");
  }
  result_.saturated_groups += saturated;
  return q;
}

// A linear that stays in the source's type: its own bytes, or what was folded or cut out of a fused tensor.
StagedTensor Job::plain_linear(const std::string& name, std::uint64_t layer, std::size_t i,
                               const FoldReport& report, const LayerWeights* weights) const {
  const std::string tensor = name + ".weight";
  if (!report.weight_changed[i] && reader_.contains(tensor)) return copied(reader_.tensor(tensor));
  if (weights == nullptr) throw Error(ErrorKind::internal, "a folded linear is missing").tensor(tensor);
  const LinearWeights& w = weights->linear[i];
  return plain_tensor(
      tensor, linear_dtype(reader_, layer, i), {w.rows, w.cols},
      [&](std::uint64_t begin, std::span<float> out) {
        std::copy_n(w.weight.begin() + static_cast<std::ptrdiff_t>(begin), out.size(), out.begin());
      },
      reader_.folder(), options_.threads);
}

// together: the layer as the streams quantised it, or null.
std::vector<StagedTensor> Job::weight_tensors(const std::string& name, std::uint64_t layer, std::size_t i,
                                              const FoldReport& report, const LayerWeights* weights,
                                              const QuantizedLayer* together) {
  const ModuleChoice& choice = modules_.linear(layer, i);
  try {
    if (choice.precision == ModulePrecision::original) {
      return {plain_linear(name, layer, i, report, weights)};
    }
    if (choice.precision == ModulePrecision::fp8) {
      if (together != nullptr) return fp8_tensors(name, together->fp8[i]);
      if (weights == nullptr) {
        return fp8_tensors(name, quantize_fp8(reader_.tensor(name + ".weight"), options_.threads));
      }
      const LinearWeights& w = weights->linear[i];
      return fp8_tensors(name, quantize_fp8(w.weight, w.rows, w.cols, options_.threads));
    }
    if (together != nullptr) {
      return packed_tensors(name, (*together)[i], options_.layout, choice.own_levels);
    }
    return packed_tensors(name, quantize_linear(name, layer, i, report, weights), options_.layout,
                          choice.own_levels);
  } catch (Error& e) {
    e.tensor_if_unset(name + ".weight");
    e.path_if_unset(reader_.contains(name + ".weight") ? reader_.file_of(name + ".weight")
                                                       : reader_.folder());
    throw;
  }
}

std::vector<StagedTensor> Job::linear_tensors(std::uint64_t layer, std::size_t i, const FoldReport& report,
                                              const LayerWeights* weights, const QuantizedLayer* together) {
  const std::string name = formats::linear_names(layer)[i];
  std::vector<StagedTensor> list = weight_tensors(name, layer, i, report, weights, together);
  if (!formats::linear_has_bias(config_, i)) return list;
  const std::string bias = name + ".bias";
  if (!report.bias_changed[i] && reader_.contains(bias)) {
    list.push_back(copied(reader_.tensor(bias)));
  } else {
    // A folded bias is kept exact; a bias cut from a fused tensor is in FP32 too.
    if (weights == nullptr) throw Error(ErrorKind::internal, "bias of a raw linear is missing").tensor(bias);
    list.push_back(owned_f32(bias, weights->linear[i].bias, {weights->linear[i].rows}));
  }
  return list;
}

QuantizedLayer Job::quantize_in_streams(std::uint64_t layer, const LayerWeights& weights) {
  StreamReport report;
  QuantizedLayer quantized = streams_->quantize(layer, weights, report);
  result_.dead_channels += report.dead_channels;
  for (const std::string& site : report.raised) {
    progress_.warning("layer " + std::to_string(layer) + ", " + site +
                      ": the inputs are so alike that the damping was raised; more text would help");
  }
  return quantized;
}

QuantizedLayer Job::staged_layer(const FireqWriter& writer, const std::string& unit,
                                 std::uint64_t layer) const {
  const formats::SafetensorsFile file = writer.open_unit(unit);
  const std::array<std::string, kLinears> names = formats::linear_names(layer);
  QuantizedLayer quantized;
  for (std::size_t i = 0; i < kLinears; ++i) {
    const auto [rows, cols] = formats::linear_shape(config_, i);
    const ModuleChoice& choice = modules_.linear(layer, i);
    if (choice.precision == ModulePrecision::int4) {
      quantized[i] = libquant::make_quantized_linear(rows, cols, choice.weights.levels, false);
      read_packed(file, names[i], options_.layout, quantized[i]);
    } else if (choice.precision == ModulePrecision::fp8) {
      quantized.fp8[i] = libquant::make_fp8_linear(rows, cols);
      read_fp8(file, names[i], quantized.fp8[i]);
    }
  }
  return quantized;
}

// A layer that an earlier run staged: the streams pass through it as they did then.
void Job::replay_layer(FireqWriter& writer, std::uint64_t layer) {
  LayerWeights weights = source_.load_layer(layer, options_.threads);
  fold_layer(config_, options_.recipe, statistics_ ? &statistics_->layers[layer] : nullptr, weights);
  streams_->replay(layer, std::move(weights), staged_layer(writer, layer_unit(layer), layer));
}

void Job::stage_layer(FireqWriter& writer, std::uint64_t layer) {
  const std::string unit = layer_unit(layer);
  if (writer.unit_done(unit)) {
    ++result_.resumed_layers;
    if (streams_ && layer < last_open_layer_) replay_layer(writer, layer);
    return;
  }
  const std::array<std::string, kLinears> names = formats::linear_names(layer);
  FoldReport report = planned_changes(config_, options_.recipe);
  const bool folds =
      std::any_of(report.weight_changed.begin(), report.weight_changed.end(), [](bool b) { return b; }) ||
      report.qk_norm_changed || options_.recipe.key_s || options_.recipe.key_centre ||
      options_.recipe.keys_together || options_.recipe.values_together;
  const bool all_separate = std::all_of(
      names.begin(), names.end(), [&](const std::string& n) { return reader_.contains(n + ".weight"); });
  std::optional<LayerWeights> weights;
  if (folds || options_.recipe.weighted_search || options_.recipe.keep_means ||
      options_.recipe.override_needs_statistics || !all_separate || streams_) {
    weights = source_.load_layer(layer, options_.threads);
    report =
        fold_layer(config_, options_.recipe, statistics_ ? &statistics_->layers[layer] : nullptr, *weights);
    result_.clamped += report.clamped;
    result_.zero_channels += report.zero_channels;
  }
  QuantizedLayer together;
  if (streams_) together = quantize_in_streams(layer, *weights);
  std::vector<StagedTensor> tensors =
      layer_tensors(layer, report, weights ? &*weights : nullptr, streams_ ? &together : nullptr);
  writer.stage(unit, tensors);
  for (const std::string& n : names) {
    if (reader_.contains(n + ".weight")) reader_.release(n + ".weight");
  }
}

// Frees matrices on the way. packed: the layer as it was quantised together, or null.
std::vector<StagedTensor> Job::layer_tensors(std::uint64_t layer, const FoldReport& report,
                                             LayerWeights* weights, QuantizedLayer* packed) {
  std::vector<StagedTensor> tensors;
  for (std::size_t i = 0; i < kLinears; ++i) {
    check_interrupt();
    for (StagedTensor& t : linear_tensors(layer, i, report, weights, packed)) tensors.push_back(std::move(t));
    if (packed != nullptr) (*packed)[i] = {};
    if (weights != nullptr) weights->linear[i] = {};
  }
  const std::string prefix = layer_prefix(layer);
  const auto norm = [&](const std::string& name, bool changed, const std::vector<float>* folded) {
    if (changed) {
      tensors.push_back(owned_f32(prefix + name, *folded, {folded->size()}));
    } else {
      tensors.push_back(copied(reader_.tensor(prefix + name)));
    }
  };
  norm("input_layernorm.weight", false, nullptr);
  norm("post_attention_layernorm.weight", report.mlp_norm_changed,
       weights != nullptr ? &weights->mlp_norm : nullptr);
  if (config_.qk_norm) {
    norm("self_attn.q_norm.weight", report.qk_norm_changed, weights != nullptr ? &weights->q_norm : nullptr);
    norm("self_attn.k_norm.weight", report.qk_norm_changed, weights != nullptr ? &weights->k_norm : nullptr);
  }
  if (options_.recipe.key_s) {
    tensors.push_back(owned_f32(prefix + "self_attn.k_post_rope_scale", weights->k_post_rope_scale,
                                {config_.kv_heads, config_.head_dim}));
  }
  if (options_.recipe.key_centre) {
    tensors.push_back(owned_f32(prefix + "self_attn.k_post_rope_shift", weights->k_post_rope_shift,
                                {config_.kv_heads, config_.head_dim}));
  }
  const std::uint64_t triangle = libquant::kv_rounding_size(config_.head_dim);
  if (options_.recipe.keys_together) {
    tensors.push_back(
        owned_bf16(prefix + "self_attn.k_rounding", weights->k_rounding, {config_.kv_heads, triangle}));
  }
  if (options_.recipe.values_together) {
    tensors.push_back(
        owned_bf16(prefix + "self_attn.v_rounding", weights->v_rounding, {config_.kv_heads, triangle}));
  }
  sort_by_name(tensors);
  return tensors;
}

void Job::stage_tuned_layers(FireqWriter& writer) {
  std::vector<TunedLayer> layers;
  std::vector<FoldReport> reports;
  for (std::uint64_t layer = 0; layer < config_.layers; ++layer) {
    LayerWeights weights = source_.load_layer(layer, options_.threads);
    reports.push_back(
        fold_layer(config_, options_.recipe, statistics_ ? &statistics_->layers[layer] : nullptr, weights));
    layers.push_back({std::move(weights), staged_layer(writer, layer_unit(layer), layer)});
  }
  const TuningReport report =
      tune_codes(source_, stream_windows_, options_.recipe, modules_, layers, options_.threads, progress_);
  if (!report.kept()) {
    progress_.warning(
        "codes stay as each layer was rounded: tuned together they came no nearer to the "
        "original on text held back (more text would help)");
  }
  for (std::uint64_t layer = 0; layer < config_.layers; ++layer) {
    if (writer.unit_done(tuned_unit(layer))) {
      // Layers of two tunings do not fit together.
      const QuantizedLayer earlier = staged_layer(writer, tuned_unit(layer), layer);
      for (std::size_t i = 0; i < kLinears; ++i) {
        if (earlier[i].codes == layers[layer].quantized[i].codes) continue;
        throw Error(ErrorKind::usage, "codes tuned anew are not those of the run that stopped")
            .tensor(formats::linear_names(layer)[i])
            .hint("finish it on the kind of processor that it began on, or start again with --restart");
      }
      continue;
    }
    writer.stage(tuned_unit(layer),
                 layer_tensors(layer, reports[layer], &layers[layer].weights, &layers[layer].quantized));
  }
}

// An output head that another program quantised: dequantised in the type of its scales, or in FP8.
std::vector<StagedTensor> Job::imported_head() const {
  const std::uint64_t rows = config_.vocab, cols = config_.hidden;
  if (modules_.head() == ModulePrecision::original) {
    const auto values = [&](std::uint64_t begin, std::span<float> out) {
      source_.head_rows(begin / cols, out.size() / cols, out);
    };
    return {plain_tensor("lm_head.weight", *int4_scale_dtype(reader_, formats::kHeadModule), {rows, cols},
                         values, reader_.folder(), options_.threads)};
  }
  libquant::Fp8Linear fp8 = libquant::make_fp8_linear(rows, cols);
  constexpr std::uint64_t kRows = 64;
  parallel_for((rows + kRows - 1) / kRows, options_.threads, [&](std::size_t task) {
    const std::uint64_t begin = task * kRows, count = std::min(kRows, rows - begin);
    std::vector<float> values(count * cols);
    source_.head_rows(begin, count, values);
    libquant::quantize_fp8_rows(values, begin, count, fp8);
  });
  return fp8_tensors(formats::kHeadModule, fp8);
}

// Tensors outside the layers go through byte for byte, unless they are to be in FP8; of those inside, only
// what the layer staging names is used.
void Job::stage_rest(FireqWriter& writer) {
  if (writer.unit_done("rest")) return;
  std::vector<StagedTensor> tensors;
  const std::vector<std::string> head = int4_parts(reader_, formats::kHeadModule);
  if (!head.empty()) tensors = imported_head();
  std::vector<std::string> used = head;
  for (const std::string& name : reader_.names()) {
    if (name.starts_with("model.layers.") || std::find(head.begin(), head.end(), name) != head.end())
      continue;
    used.push_back(name);
    const bool fp8 = (name == "model.embed_tokens.weight" && modules_.embeddings() == ModulePrecision::fp8) ||
                     (name == "lm_head.weight" && modules_.head() == ModulePrecision::fp8);
    if (!fp8) {
      tensors.push_back(copied(reader_.tensor(name)));
      continue;
    }
    try {
      for (StagedTensor& t : fp8_tensors(name.substr(0, name.rfind('.')),
                                         quantize_fp8(reader_.tensor(name), options_.threads))) {
        tensors.push_back(std::move(t));
      }
    } catch (Error& e) {
      throw e.tensor_if_unset(name).path_if_unset(reader_.file_of(name));
    }
  }
  sort_by_name(tensors);
  writer.stage("rest", tensors);
  for (const std::string& name : used) reader_.release(name);
}

formats::QuantizationConfig Job::quantization_config() const {
  formats::QuantizationConfig quantization;
  const libquant::Levels& levels = options_.recipe.weights.levels;
  quantization.levels_int4 = levels.is_int4();
  quantization.levels = levels.magnitude;
  quantization.row_scale_per_row = options_.recipe.weights.row_scale == RowScale::row;
  quantization.layout = options_.layout;
  quantization.kv_cache = options_.recipe.kv_cache;
  quantization.ignore = modules_.ignored();
  quantization.fp8 = modules_.fp8();
  quantization.recipe_json = recipe_to_json(options_.recipe);
  quantization.source_fingerprint = model_fingerprint_;
  if (statistics_) {
    quantization.calibration_fingerprint = statistics_->meta.text_fingerprint;
    quantization.calibration_tokens = statistics_->meta.tokens;
    quantization.calibration_seed = statistics_->meta.seed;
  } else if (options_.recipe.needs_text()) {
    quantization.calibration_fingerprint = text_fingerprint_;
    quantization.calibration_tokens = options_.calibration->ids.size();
    quantization.calibration_seed = options_.seed;
  }
  quantization.tool_version = options_.tool_version;
  return quantization;
}

// The folder as it will be, except for its cost, is measured before it appears.
void Job::publish(FireqWriter& writer, const QuantizePlan& plan, const std::vector<std::string>& units) {
  formats::QuantizationConfig quantization = quantization_config();
  const std::string source_config = formats::read_text_file(reader_.folder() + "/config.json");
  const Windows* const calibration = options_.calibration ? &*options_.calibration : nullptr;
  const auto write_card = [&] {
    formats::write_file_atomically(fs_, writer.side_file("README.md"),
                                   model_card(config_, plan, options_.recipe, quantization, calibration));
    return formats::make_config_json(source_config, quantization);
  };
  FireqWriter::Revise revise;
  if (options_.held_back) {
    revise = [&](const std::string& folder) {
      const auto begin = std::chrono::steady_clock::now();
      const auto packed = open_weights(folder, formats::CheckpointReader::Output::being_written);
      quantization.measured =
          measure_cost(*packed, source_, *options_.held_back, options_.threads, progress_);
      result_.measured = quantization.measured;
      result_.measuring_seconds =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      return write_card();
    };
  }
  for (const auto& [name, text] : options_.side_files) {
    formats::write_file_atomically(fs_, writer.side_file(name), text);
  }
  writer.publish(units, write_card(), options_.shard_size, revise);
}

QuantizeResult Job::run() {
  const auto begin = std::chrono::steady_clock::now();
  const QuantizePlan plan = plan_quantization(source_, options_);
  for (const auto& [tensor, why] : plan.kept) {
    if (why.starts_with("dropped")) progress_.warning(std::string(tensor).append(": ").append(why));
  }
  if (options_.recipe.needs_text() && !options_.calibration) {
    throw Error(ErrorKind::usage, "preset '" + options_.recipe.preset + "' needs calibration text")
        .hint("give --text FILE; statistics alone do not hold what it needs");
  }
  FireqWriter writer(fs_, options_.out, reader_.folder(), options_.mode, options_.force, fingerprints());
  obtain_statistics(writer);
  bool tunes = false;
  if (options_.recipe.curvature) {
    const Windows text = with_room_for_own_text(config_, *options_.calibration, options_.recipe.own_text);
    tunes = tunes_codes(config_, options_.recipe, text);
    if (!tunes && wants_tuned_codes(config_, options_.recipe, text)) {
      progress_.warning(
          "codes stay as each layer was rounded: tuning them together would hold more than 4 GiB "
          "(docs/recipes.md, curvature.tune_passes)");
    }
  }
  bool open = false;
  bool untuned = false;
  for (std::uint64_t layer = 0; layer < config_.layers; ++layer) {
    if (tunes && !writer.unit_done(tuned_unit(layer))) untuned = true;
    if (writer.unit_done(layer_unit(layer))) continue;
    last_open_layer_ = layer;
    open = true;
  }
  if (options_.recipe.curvature && (open || untuned)) {
    if (options_.recipe.own_text > 0 && !writes_own_text(config_)) {
      progress_.warning(
          "rounded on the given text alone: layers and head take more than 4 GiB in FP32, too much to write "
          "text with (docs/recipes.md, curvature.own_text)");
    }
    stream_windows_ =
        with_own_text(source_, *options_.calibration, options_.recipe.own_text, options_.threads, progress_);
    if (open) {
      streams_.emplace(source_, stream_windows_, options_.recipe, options_.threads, progress_, &modules_);
    }
  }
  progress_.begin("quantize", config_.layers);
  std::vector<std::string> units{"rest"};
  check_interrupt();
  for (std::uint64_t layer = 0; layer < config_.layers; ++layer) {
    check_interrupt();
    stage_layer(writer, layer);
    units.push_back(tunes ? tuned_unit(layer) : layer_unit(layer));
    progress_.advance(layer + 1);
  }
  progress_.end();
  check_interrupt();
  streams_.reset();
  if (untuned) stage_tuned_layers(writer);
  stage_rest(writer);

  publish(writer, plan, units);

  result_.bytes_before = plan.bytes_before;
  result_.bytes_after = plan.bytes_after;
  for (const LinearPlan& l : plan.linears) {
    ++(l.precision == ModulePrecision::int4  ? result_.linears
       : l.precision == ModulePrecision::fp8 ? result_.fp8_linears
                                             : result_.plain_linears);
  }
  result_.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return result_;
}

}  // namespace

formats::CalibrationStatistics statistics_of_model(const std::string& path,
                                                   const formats::ModelConfig& config,
                                                   const std::string& fingerprint) {
  formats::CalibrationStatistics statistics = formats::read_statistics(path);
  if (statistics.meta.model_fingerprint != fingerprint) {
    throw Error(ErrorKind::input, "statistics were collected on another model")
        .path(path)
        .expected("model fingerprint " + fingerprint)
        .found(statistics.meta.model_fingerprint)
        .hint("run fireq calibrate on this model");
  }
  if (statistics.layers.size() != config.layers) {
    throw Error(ErrorKind::input, "statistics do not cover the model's layers")
        .path(path)
        .expected(std::to_string(config.layers))
        .found(std::to_string(statistics.layers.size()));
  }
  return statistics;
}

QuantizeResult quantize_model(const WeightSource& source, const QuantizeOptions& options,
                              formats::FileSystem& fs, Progress& progress) {
  return Job(source, options, fs, progress).run();
}

}  // namespace fireq::calib
