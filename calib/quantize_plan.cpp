// What a run will write, and what it needs, known without running it.
#include <algorithm>
#include <set>
#include <utility>

#include "calib/code_tuner.hpp"
#include "calib/folding.hpp"
#include "calib/int4_weights.hpp"
#include "calib/measured_cost.hpp"
#include "calib/modules.hpp"
#include "calib/own_text.hpp"
#include "calib/quantize_job.hpp"
#include "calib/two_streams.hpp"
#include "common/error.hpp"
#include "libquant/kv_rounding.hpp"
#include "libquant/packing.hpp"

namespace fireq::calib {
namespace {

using formats::ModulePrecision;
using formats::WeightLayout;
using libquant::RowScale;

std::uint64_t fp8_bytes(std::uint64_t rows, std::uint64_t cols) {
  return rows * (cols + sizeof(float));
}

}  // namespace

std::uint64_t linear_bytes(const WeightSource& source, const QuantizeOptions& options, std::uint64_t layer,
                           std::size_t linear, const ModuleChoice& choice) {
  const auto [rows, cols] = formats::linear_shape(source.config(), linear);
  if (choice.precision == ModulePrecision::fp8) return fp8_bytes(rows, cols);
  if (choice.precision == ModulePrecision::original) {
    return rows * cols * dtype_size(linear_dtype(source.reader(), layer, linear));
  }
  const bool per_tensor = options.recipe.weights.row_scale == RowScale::tensor;
  const std::uint64_t groups = (cols + libquant::kGroupSize - 1) / libquant::kGroupSize;
  return (options.layout == WeightLayout::sm90 ? libquant::tile_bytes(rows, cols)
                                               : rows * groups * (libquant::kGroupSize / 2 + 1)) +
         (per_tensor ? 1 : rows) * sizeof(float) + 2 * sizeof(std::int64_t) +
         (choice.own_levels ? sizeof(choice.weights.levels.magnitude) : 0);
}

MemoryPlan plan_memory(const formats::ModelConfig& config, const Recipe& recipe, const Windows* windows) {
  MemoryPlan plan;
  for (std::size_t i = 0; i < kLinears; ++i) {
    const auto [rows, cols] = formats::linear_shape(config, i);
    plan.largest_layer_fp32 += rows * cols * sizeof(float);
  }
  plan.peak = 2 * plan.largest_layer_fp32;
  if (recipe.needs_text() && windows != nullptr) {
    const Windows streams = with_room_for_own_text(config, *windows, recipe.own_text);
    // Text is written before the streams begin, codes are tuned behind them.
    plan.calibration_bytes = std::max(
        {TwoStreams::bytes(config, recipe, streams), own_text_bytes(config, *windows, recipe.own_text),
         tunes_codes(config, recipe, streams) ? tuning_bytes(config, streams, recipe) : 0});
    // The layer as it is, its targets and its panels for both streams.
    plan.peak += 2 * plan.largest_layer_fp32;
  } else if (recipe.needs_statistics() && windows != nullptr) {
    // Hidden states of all windows; a layer's working set is bounded and part of the fixed share.
    plan.calibration_bytes = windows->ids.size() * config.hidden * sizeof(float);
  }
  plan.peak += plan.calibration_bytes + kFixedMemory;
  return plan;
}

QuantizePlan plan_quantization(const WeightSource& source, const QuantizeOptions& options) {
  const formats::ModelConfig& config = source.config();
  const formats::CheckpointReader& reader = source.reader();
  if (source.packed()) {
    throw Error(ErrorKind::usage, "the model is a FireQ checkpoint already")
        .path(reader.folder())
        .hint("quantise the original checkpoint");
  }
  const FoldReport changes = planned_changes(config, options.recipe);
  const Modules modules = modules_of(source, options.recipe);
  QuantizePlan plan;
  plan.bytes_before = reader.total_bytes();
  std::set<std::string> replaced;
  for (std::uint64_t layer = 0; layer < config.layers; ++layer) {
    const auto names = formats::linear_names(layer);
    for (std::size_t i = 0; i < kLinears; ++i) {
      const auto [rows, cols] = formats::linear_shape(config, i);
      const ModuleChoice& choice = modules.linear(layer, i);
      LinearPlan linear{names[i], rows, cols, 0, 0, choice.precision};
      const std::string tensor = names[i] + ".weight";
      linear.bytes_before = rows * cols * dtype_size(linear_dtype(reader, layer, i));
      // Of a source that another program quantised the parts are read, not copied.
      if (const auto parts = int4_parts(reader, names[i]); !reader.contains(tensor) && !parts.empty()) {
        linear.bytes_before = 0;
        for (const std::string& part : parts) linear.bytes_before += reader.tensor(part).data.size();
        replaced.insert(parts.begin(), parts.end());
      }
      linear.bytes_after = linear_bytes(source, options, layer, i, choice);
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
    const std::uint64_t factor = config.kv_heads * libquant::kv_rounding_size(config.head_dim) * 2;  // BF16
    if (options.recipe.keys_together) plan.bytes_after += factor;
    if (options.recipe.values_together) plan.bytes_after += factor;
  }
  if (const auto parts = int4_parts(reader, formats::kHeadModule); !parts.empty()) {
    const bool fp8 = modules.head() == ModulePrecision::fp8;
    plan.bytes_after +=
        fp8 ? fp8_bytes(config.vocab, config.hidden)
            : config.vocab * config.hidden * dtype_size(*int4_scale_dtype(reader, formats::kHeadModule));
    plan.kept.emplace_back("lm_head.weight", fp8 ? "output head, in FP8" : "output head, dequantised");
    replaced.insert(parts.begin(), parts.end());
  }
  for (const std::string& name : reader.names()) {
    if (replaced.contains(name)) continue;
    const TensorView view = reader.tensor(name);
    std::string why = "copied as it is";
    std::uint64_t bytes = view.data.size();
    if (name.starts_with("model.layers.")) {
      if (name.ends_with("qkv_proj.weight") || name.ends_with("gate_up_proj.weight") ||
          name.ends_with("qkv_proj.bias") || name.ends_with("gate_up_proj.bias"))
        continue;  // cut into its linears
      if (name.ends_with("rotary_emb.inv_freq")) {
        plan.kept.emplace_back(name, "dropped: the frequencies follow from config.json");
        continue;
      }
      if (name.ends_with("norm.weight")) {
        const bool folded_f32 =
            (changes.mlp_norm_changed && name.ends_with("post_attention_layernorm.weight")) ||
            (changes.qk_norm_changed && (name.ends_with("q_norm.weight") || name.ends_with("k_norm.weight")));
        if (folded_f32) bytes = view.elements() * sizeof(float);
        why = folded_f32 ? "norm weight, smoothing folded in, kept in F32" : "norm weight";
      } else if (name.ends_with(".bias")) {
        plan.kept.emplace_back(name, "bias");  // counted with its linear
        continue;
      }
    } else if (name == "model.embed_tokens.weight") {
      why = "embedding: looked up, not multiplied";
      if (modules.embeddings() == ModulePrecision::fp8) {
        why = "embedding, in FP8";
        bytes = fp8_bytes(view.shape[0], view.shape[1]);
      }
    } else if (name == "lm_head.weight") {
      why = "output head: the recipe quantises the decoder layers' linears only";
      if (modules.head() == ModulePrecision::fp8) {
        why = "output head, in FP8";
        bytes = fp8_bytes(view.shape[0], view.shape[1]);
      }
    } else if (name == "model.norm.weight") {
      why = "norm weight";
    }
    plan.bytes_after += bytes;
    plan.kept.emplace_back(name, why);
  }
  const bool calibrates = options.calibration && (options.recipe.needs_text() || !options.statistics_path);
  const MemoryPlan memory = plan_memory(config, options.recipe, calibrates ? &*options.calibration : nullptr);
  plan.largest_layer_fp32 = memory.largest_layer_fp32;
  plan.calibration_bytes = memory.calibration_bytes;
  plan.peak_memory = memory.peak;
  if (options.held_back) {
    plan.peak_memory = std::max(plan.peak_memory, 2 * memory.largest_layer_fp32 + kFixedMemory +
                                                      measured_cost_bytes(config, *options.held_back));
  }
  return plan;
}

}  // namespace fireq::calib
