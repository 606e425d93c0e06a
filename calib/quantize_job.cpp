#include "calib/quantize_job.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <filesystem>
#include <set>
#include <utility>

#include "calib/evaluate.hpp"
#include "calib/folding.hpp"
#include "calib/model_card.hpp"
#include "calib/packed_tensors.hpp"
#include "calib/two_streams.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/packing.hpp"

namespace fireq::calib {
namespace {

using formats::FireqWriter;
using formats::WeightLayout;
using libquant::QuantizedLinear;
using libquant::RowScale;
using StagedTensor = FireqWriter::Tensor;

constexpr std::uint64_t kFixedMemory = 200'000'000;
constexpr std::uint64_t kRowsPerTask = 32;
constexpr std::string_view kStatisticsFile = "calibration.h5";

std::string layer_unit(std::uint64_t layer) {
  const std::string digits = std::to_string(layer);
  return "layer-" + std::string(digits.size() < 5 ? 5 - digits.size() : 0, '0') + digits;
}

std::string layer_prefix(std::uint64_t layer) {
  return "model.layers." + std::to_string(layer) + ".";
}

StagedTensor owned_f32(std::string name, const std::vector<float>& values, std::vector<std::uint64_t> shape) {
  return owned_tensor(std::move(name), Dtype::f32, std::move(shape), to_bytes(values));
}

StagedTensor copied(const TensorView& view) {
  return {{view.name, view.dtype, view.shape}, {}, view.data};
}

void sort_by_name(std::vector<StagedTensor>& tensors) {
  std::sort(tensors.begin(), tensors.end(),
            [](const StagedTensor& a, const StagedTensor& b) { return a.plan.name < b.plan.name; });
}

// The per-tensor search; add(search, begin, count) feeds it rows. Sums are integers: any cut gives the same
// s.
template <typename Add>
libquant::TensorScaleSearch search_tensor_scale(const Recipe& recipe, std::uint64_t rows, int threads,
                                                const Add& add) {
  constexpr std::uint64_t kRows = 256;
  const libquant::TensorScaleSearch empty(recipe.weights.tensor_search_threshold);
  std::vector<libquant::TensorScaleSearch> part((rows + kRows - 1) / kRows, empty);
  parallel_for(part.size(), threads,
               [&](std::size_t t) { add(part[t], t * kRows, std::min(kRows, rows - t * kRows)); });
  libquant::TensorScaleSearch total = empty;
  for (const auto& p : part) total.merge(p);
  return total;
}

// One linear from FP32 rows. Rows are independent, so any split over threads gives the same bytes.
// saturated_groups: see TensorScaleSearch.
QuantizedLinear quantize_folded(const LinearWeights& w, const Recipe& recipe,
                                std::span<const float> input_mean_square, int threads,
                                std::uint64_t& saturated_groups) {
  const bool per_tensor = recipe.weights.row_scale == RowScale::tensor;
  QuantizedLinear q = libquant::make_quantized_linear(w.rows, w.cols, recipe.weights.levels, per_tensor);
  const std::uint64_t tasks = (w.rows + kRowsPerTask - 1) / kRowsPerTask;
  const std::span<const float> all(w.weight);
  if (per_tensor) {
    const auto add = [&](auto& search, std::uint64_t begin, std::uint64_t count) {
      search.add_rows(all.subspan(begin * w.cols, count * w.cols), count, w.cols);
    };
    const libquant::TensorScaleSearch found = search_tensor_scale(recipe, w.rows, threads, add);
    q.row_scales[0] = 1.0F / found.scale();
    saturated_groups = found.saturated_groups();
  }
  parallel_for(tasks, threads, [&](std::size_t t) {
    const std::uint64_t begin = t * kRowsPerTask;
    const std::uint64_t count = std::min(kRowsPerTask, w.rows - begin);
    libquant::quantize_rows(all.subspan(begin * w.cols, count * w.cols), begin, count, recipe.weights,
                            recipe.weighted_search ? input_mean_square : std::span<const float>{}, q);
  });
  return q;
}

// One linear straight from the checkpoint's bytes, when nothing is folded into it.
QuantizedLinear quantize_raw(const TensorView& view, const Recipe& recipe,
                             std::span<const float> input_mean_square, int threads,
                             std::uint64_t& saturated_groups) {
  const std::uint64_t rows = view.shape[0];
  const std::uint64_t cols = view.shape[1];
  const bool per_tensor = recipe.weights.row_scale == RowScale::tensor;
  QuantizedLinear q = libquant::make_quantized_linear(rows, cols, recipe.weights.levels, per_tensor);
  const std::uint64_t row_bytes = cols * dtype_size(view.dtype);
  const std::uint64_t tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  if (per_tensor) {
    const auto add = [&](auto& search, std::uint64_t begin, std::uint64_t count) {
      search.add_rows_raw(view.data.subspan(begin * row_bytes, count * row_bytes), view.dtype, count, cols);
    };
    const libquant::TensorScaleSearch found = search_tensor_scale(recipe, rows, threads, add);
    q.row_scales[0] = 1.0F / found.scale();
    saturated_groups = found.saturated_groups();
  }
  parallel_for(tasks, threads, [&](std::size_t t) {
    const std::uint64_t begin = t * kRowsPerTask;
    const std::uint64_t count = std::min(kRowsPerTask, rows - begin);
    libquant::quantize_rows_raw(view.data.subspan(begin * row_bytes, count * row_bytes), view.dtype, begin,
                                count, recipe.weights,
                                recipe.weighted_search ? input_mean_square : std::span<const float>{}, q);
  });
  return q;
}

class Job {
 public:
  Job(const WeightSource& source, const QuantizeOptions& options, formats::FileSystem& fs, Progress& progress)
      : source_(source),
        options_(options),
        fs_(fs),
        progress_(progress),
        reader_(source.reader()),
        config_(source.config()) {}

  QuantizeResult run();

 private:
  void obtain_statistics(FireqWriter& writer);
  void stage_layer(FireqWriter& writer, std::uint64_t layer);
  void stage_rest(FireqWriter& writer);
  QuantizedLinear quantize_linear(const std::string& name, std::size_t i, const FoldReport& report,
                                  LayerWeights* weights);
  std::vector<StagedTensor> linear_tensors(std::uint64_t layer, std::size_t i, const FoldReport& report,
                                           const LayerWeights* weights, const QuantizedLinear& q);
  QuantizedLayer quantize_in_streams(std::uint64_t layer, const LayerWeights& weights);
  void replay_layer(FireqWriter& writer, std::uint64_t layer);
  std::array<std::string, 3> fingerprints();

  const WeightSource& source_;
  const QuantizeOptions& options_;
  formats::FileSystem& fs_;
  Progress& progress_;
  const formats::CheckpointReader& reader_;
  const formats::ModelConfig& config_;
  std::string model_fingerprint_, text_fingerprint_;
  std::optional<formats::CalibrationStatistics> statistics_;
  std::optional<TwoStreams> streams_;  // where the recipe rounds under curvature
  std::uint64_t last_open_layer_ = 0;  // of those that were not done when this run began
  QuantizeResult result_;
};

std::array<std::string, 3> Job::fingerprints() {
  model_fingerprint_ = reader_.fingerprint(options_.threads);
  if (options_.statistics_path) {
    statistics_ = formats::read_statistics(*options_.statistics_path);
    if (statistics_->meta.model_fingerprint != model_fingerprint_) {
      throw Error(ErrorKind::input, "statistics were collected on another model")
          .path(*options_.statistics_path)
          .expected("model fingerprint " + model_fingerprint_)
          .found(statistics_->meta.model_fingerprint)
          .hint("run fireq calibrate on this model");
    }
    if (statistics_->layers.size() != config_.layers) {
      throw Error(ErrorKind::input, "statistics do not cover the model's layers")
          .path(*options_.statistics_path)
          .expected(std::to_string(config_.layers))
          .found(std::to_string(statistics_->layers.size()));
    }
    text_fingerprint_ = statistics_->meta.text_fingerprint;
  } else if (options_.calibration) {
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

QuantizedLinear Job::quantize_linear(const std::string& name, std::size_t i, const FoldReport& report,
                                     LayerWeights* weights) {
  const std::span<const float> mean_square = report.input_mean_square[i];
  try {
    std::uint64_t saturated = 0;
    QuantizedLinear q = weights == nullptr ? quantize_raw(reader_.tensor(name + ".weight"), options_.recipe,
                                                          mean_square, options_.threads, saturated)
                                           : quantize_folded(weights->linear[i], options_.recipe, mean_square,
                                                             options_.threads, saturated);
    if (saturated > 0) {
      progress_.warning(name + ".weight: " + std::to_string(saturated) +
                        " groups hold weights beyond 448, which a per-tensor scale cuts off; row scales "
                        "(presets rtn, fast, best) keep them");
    }
    result_.saturated_groups += saturated;
    return q;
  } catch (Error& e) {
    e.tensor_if_unset(name + ".weight");
    e.path_if_unset(reader_.contains(name + ".weight") ? reader_.file_of(name + ".weight")
                                                       : reader_.folder());
    throw;
  }
}

std::vector<StagedTensor> Job::linear_tensors(std::uint64_t layer, std::size_t i, const FoldReport& report,
                                              const LayerWeights* weights, const QuantizedLinear& q) {
  const std::string name = formats::linear_names(layer)[i];
  std::vector<StagedTensor> list = packed_tensors(name, q, options_.layout);
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

// A layer that an earlier run staged: the streams pass through it as they did then.
void Job::replay_layer(FireqWriter& writer, std::uint64_t layer) {
  LayerWeights weights = source_.load_layer(layer, options_.threads);
  fold_layer(config_, options_.recipe, statistics_ ? &statistics_->layers[layer] : nullptr, weights);
  const formats::SafetensorsFile file = writer.open_unit(layer_unit(layer));
  const std::array<std::string, kLinears> names = formats::linear_names(layer);
  QuantizedLayer quantized;
  for (std::size_t i = 0; i < kLinears; ++i) {
    const auto [rows, cols] = formats::linear_shape(config_, i);
    quantized[i] = libquant::make_quantized_linear(rows, cols, options_.recipe.weights.levels, false);
    read_packed(file, names[i], options_.layout, quantized[i]);
  }
  streams_->replay(layer, std::move(weights), quantized);
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
      report.qk_norm_changed || options_.recipe.key_s || options_.recipe.key_centre;
  const bool all_separate = std::all_of(
      names.begin(), names.end(), [&](const std::string& n) { return reader_.contains(n + ".weight"); });
  std::optional<LayerWeights> weights;
  if (folds || options_.recipe.weighted_search || !all_separate || streams_) {
    weights = source_.load_layer(layer, options_.threads);
    report =
        fold_layer(config_, options_.recipe, statistics_ ? &statistics_->layers[layer] : nullptr, *weights);
    result_.clamped += report.clamped;
    result_.zero_channels += report.zero_channels;
  }
  QuantizedLayer together;
  if (streams_) together = quantize_in_streams(layer, *weights);
  std::vector<StagedTensor> tensors;
  for (std::size_t i = 0; i < kLinears; ++i) {
    check_interrupt();
    LayerWeights* const loaded = weights ? &*weights : nullptr;
    const QuantizedLinear q =
        streams_ ? std::move(together[i]) : quantize_linear(names[i], i, report, loaded);
    for (StagedTensor& t : linear_tensors(layer, i, report, loaded, q)) tensors.push_back(std::move(t));
    if (weights) weights->linear[i] = {};
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
  norm("post_attention_layernorm.weight", report.mlp_norm_changed, weights ? &weights->mlp_norm : nullptr);
  if (config_.qk_norm) {
    norm("self_attn.q_norm.weight", report.qk_norm_changed, weights ? &weights->q_norm : nullptr);
    norm("self_attn.k_norm.weight", report.qk_norm_changed, weights ? &weights->k_norm : nullptr);
  }
  if (options_.recipe.key_s) {
    tensors.push_back(owned_f32(prefix + "self_attn.k_post_rope_scale", weights->k_post_rope_scale,
                                {config_.kv_heads, config_.head_dim}));
  }
  if (options_.recipe.key_centre) {
    tensors.push_back(owned_f32(prefix + "self_attn.k_post_rope_shift", weights->k_post_rope_shift,
                                {config_.kv_heads, config_.head_dim}));
  }
  sort_by_name(tensors);
  writer.stage(unit, tensors);
  for (const std::string& n : names) {
    if (reader_.contains(n + ".weight")) reader_.release(n + ".weight");
  }
}

bool belongs_to_layer(const std::string& name) {
  return name.starts_with("model.layers.");
}

// Tensors outside the layers go through byte for byte; of those inside, only what the layer staging names is
// used.
void Job::stage_rest(FireqWriter& writer) {
  if (writer.unit_done("rest")) return;
  std::vector<StagedTensor> tensors;
  for (const std::string& name : reader_.names()) {
    if (!belongs_to_layer(name)) tensors.push_back(copied(reader_.tensor(name)));
  }
  writer.stage("rest", tensors);
  for (const StagedTensor& t : tensors) reader_.release(t.plan.name);
}

QuantizeResult Job::run() {
  const auto begin = std::chrono::steady_clock::now();
  if (source_.packed()) {
    throw Error(ErrorKind::usage, "the model is a FireQ checkpoint already")
        .path(reader_.folder())
        .hint("quantise the original checkpoint");
  }
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
  for (std::uint64_t layer = 0; layer < config_.layers; ++layer) {
    if (!writer.unit_done(layer_unit(layer))) last_open_layer_ = layer;
  }
  if (options_.recipe.curvature) {
    streams_.emplace(source_, *options_.calibration, options_.recipe, options_.threads);
  }
  progress_.begin("quantize", config_.layers);
  std::vector<std::string> units{"rest"};
  check_interrupt();
  for (std::uint64_t layer = 0; layer < config_.layers; ++layer) {
    check_interrupt();
    stage_layer(writer, layer);
    units.push_back(layer_unit(layer));
    progress_.advance(layer + 1);
  }
  progress_.end();
  check_interrupt();
  stage_rest(writer);

  formats::QuantizationConfig quantization;
  const libquant::Levels& levels = options_.recipe.weights.levels;
  quantization.levels_int4 = levels.is_int4();
  quantization.levels = levels.magnitude;
  quantization.row_scale_per_row = options_.recipe.weights.row_scale == RowScale::row;
  quantization.layout = options_.layout;
  quantization.kv_cache = options_.recipe.kv_cache;
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
  formats::write_file_atomically(fs_, writer.side_file("README.md"),
                                 model_card(config_, plan, options_.recipe, quantization));
  const std::string source_config = formats::read_text_file(reader_.folder() + "/config.json");
  writer.publish(units, formats::make_config_json(source_config, quantization), options_.shard_size);

  result_.bytes_before = plan.bytes_before;
  result_.bytes_after = plan.bytes_after;
  result_.linears = plan.linears.size();
  result_.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return result_;
}

}  // namespace

MemoryPlan plan_memory(const formats::ModelConfig& config, const Recipe& recipe, std::uint64_t tokens) {
  MemoryPlan plan;
  for (std::size_t i = 0; i < kLinears; ++i) {
    const auto [rows, cols] = formats::linear_shape(config, i);
    plan.largest_layer_fp32 += rows * cols * sizeof(float);
  }
  plan.peak = 2 * plan.largest_layer_fp32;
  if (recipe.needs_text() && tokens > 0) {
    plan.calibration_bytes = TwoStreams::bytes(config, tokens);
    // The layer as it is, its targets and its panels for both streams.
    plan.peak += 2 * plan.largest_layer_fp32;
  } else if (recipe.needs_statistics()) {
    // Hidden states of all windows; a layer's working set is bounded and part of the fixed share.
    plan.calibration_bytes = tokens * config.hidden * sizeof(float);
  }
  plan.peak += plan.calibration_bytes + kFixedMemory;
  return plan;
}

QuantizePlan plan_quantization(const WeightSource& source, const QuantizeOptions& options) {
  const formats::ModelConfig& config = source.config();
  const formats::CheckpointReader& reader = source.reader();
  const FoldReport changes = planned_changes(config, options.recipe);
  QuantizePlan plan;
  plan.bytes_before = reader.total_bytes();
  const bool per_tensor = options.recipe.weights.row_scale == RowScale::tensor;
  std::set<std::string> replaced;
  for (std::uint64_t layer = 0; layer < config.layers; ++layer) {
    const auto names = formats::linear_names(layer);
    for (std::size_t i = 0; i < kLinears; ++i) {
      const auto [rows, cols] = formats::linear_shape(config, i);
      LinearPlan linear{names[i], rows, cols, 0, 0};
      const std::string tensor = names[i] + ".weight";
      const std::uint64_t groups = (cols + libquant::kGroupSize - 1) / libquant::kGroupSize;
      linear.bytes_before =
          rows * cols * (reader.contains(tensor) ? dtype_size(reader.tensor(tensor).dtype) : 2);
      linear.bytes_after =
          (options.layout == WeightLayout::sm90 ? libquant::tile_bytes(rows, cols)
                                                : rows * groups * (libquant::kGroupSize / 2 + 1)) +
          (per_tensor ? 1 : rows) * sizeof(float) + 2 * sizeof(std::int64_t);
      plan.bytes_after += linear.bytes_after;
      if (formats::linear_has_bias(config, i)) {
        // As stored, unless something is folded into it or it is cut from a fused one: then in FP32.
        const std::string bias = names[i] + ".bias";
        const bool stored = reader.contains(bias) && !changes.bias_changed[i];
        plan.bytes_after += stored ? reader.tensor(bias).data.size() : rows * sizeof(float);
      }
      replaced.insert(tensor);
      plan.linears.push_back(std::move(linear));
    }
    if (options.recipe.key_s) plan.bytes_after += config.kv_rows() * sizeof(float);
    if (options.recipe.key_centre) plan.bytes_after += config.kv_rows() * sizeof(float);
  }
  for (const std::string& name : reader.names()) {
    if (replaced.contains(name)) continue;
    const TensorView view = reader.tensor(name);
    std::string why = "copied as it is";
    bool folded_f32 = false;
    if (belongs_to_layer(name)) {
      if (name.ends_with("qkv_proj.weight") || name.ends_with("gate_up_proj.weight") ||
          name.ends_with("qkv_proj.bias") || name.ends_with("gate_up_proj.bias"))
        continue;  // cut into its linears
      if (name.ends_with("rotary_emb.inv_freq")) {
        plan.kept.emplace_back(name, "dropped: the frequencies follow from config.json");
        continue;
      }
      if (name.ends_with("norm.weight")) {
        folded_f32 =
            (changes.mlp_norm_changed && name.ends_with("post_attention_layernorm.weight")) ||
            (changes.qk_norm_changed && (name.ends_with("q_norm.weight") || name.ends_with("k_norm.weight")));
        why = folded_f32 ? "norm weight, smoothing folded in, kept in F32" : "norm weight";
      } else if (name.ends_with(".bias")) {
        plan.kept.emplace_back(name, "bias");  // counted with its linear
        continue;
      }
    } else if (name == "model.embed_tokens.weight") {
      why = "embedding: looked up, not multiplied";
    } else if (name == "lm_head.weight") {
      why = "output head: the recipe quantises the decoder layers' linears only";
    } else if (name == "model.norm.weight") {
      why = "norm weight";
    }
    plan.bytes_after += folded_f32 ? view.elements() * sizeof(float) : view.data.size();
    plan.kept.emplace_back(name, why);
  }
  const bool calibrates = options.calibration && (options.recipe.needs_text() || !options.statistics_path);
  const MemoryPlan memory =
      plan_memory(config, options.recipe, calibrates ? options.calibration->ids.size() : 0);
  plan.largest_layer_fp32 = memory.largest_layer_fp32;
  plan.calibration_bytes = memory.calibration_bytes;
  plan.peak_memory = memory.peak;
  return plan;
}

QuantizeResult quantize_model(const WeightSource& source, const QuantizeOptions& options,
                              formats::FileSystem& fs, Progress& progress) {
  return Job(source, options, fs, progress).run();
}

}  // namespace fireq::calib
