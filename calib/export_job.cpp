#include "calib/export_job.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <set>
#include <utility>

#include "calib/packed_tensors.hpp"
#include "calib/plain_tensors.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"
#include "formats/export_folder.hpp"
#include "formats/folder_rules.hpp"
#include "libquant/number_formats.hpp"
#include "libquant/vllm_scales.hpp"

namespace fireq::calib {
namespace {

using formats::FireqWriter;
using formats::ModulePrecision;
using libquant::kGroupSize;
using libquant::QuantizedLinear;
using StagedTensor = FireqWriter::Tensor;

constexpr std::uint64_t kRowsPerTask = 32;
constexpr std::uint64_t kLargestConfig = std::uint64_t{1} << 24U;
constexpr const char* kSmoothing = "self_attn.k_post_rope_scale";
constexpr const char* kShift = "self_attn.k_post_rope_shift";

// Linears that vLLM holds as one: it wants all of such a set quantised, or none.
constexpr std::array<std::array<std::size_t, 2>, 4> kFusedSets{
    {{kQ, kV}, {kO, kO}, {kGate, kUp}, {kDown, kDown}}};

std::string layer_prefix(std::uint64_t layer) {
  return "model.layers." + std::to_string(layer) + ".";
}

std::string layer_unit(std::uint64_t layer) {
  const std::string digits = std::to_string(layer);
  return "layer-" + std::string(digits.size() < 5 ? 5 - digits.size() : 0, '0') + digits;
}

std::string counted(std::uint64_t n, const std::string& noun) {
  return std::to_string(n) + " " + noun + (n == 1 ? "" : "s");
}

class ExportJob {
 public:
  ExportJob(const WeightSource& packed, const ExportOptions& options, formats::FileSystem& fs,
            Progress& progress)
      : source_(packed),
        options_(options),
        fs_(fs),
        progress_(progress),
        reader_(packed.reader()),
        config_(packed.config()),
        served_(options.format == ExportFormat::compressed_tensors) {}

  ExportResult run();

 private:
  void plan();
  void refuse_levels(const std::string& name) const;
  void choose_plain();
  void measure_loss();
  void note_left_out();
  void stage_layer(FireqWriter& writer, std::uint64_t layer);
  void stage_rest(FireqWriter& writer);
  StagedTensor plain_table(const std::string& module) const;
  StagedTensor plain_linear(std::uint64_t layer, std::size_t i) const;
  void packed_linear(std::uint64_t layer, std::size_t i, std::vector<StagedTensor>& tensors) const;
  StagedTensor other_tensor(const std::string& name) const;
  bool is_quantised(const std::string& name) const {
    return module_precision(*source_.quantization(), name) == ModulePrecision::int4;
  }

  const WeightSource& source_;
  const ExportOptions& options_;
  formats::FileSystem& fs_;
  Progress& progress_;
  const formats::CheckpointReader& reader_;
  const formats::ModelConfig& config_;
  const bool served_;
  std::set<std::string> plain_;  // linears to write as plain BF16
  ExportResult result_;
};

void ExportJob::refuse_levels(const std::string& name) const {
  const libquant::Levels folder{source_.quantization()->levels};
  const std::string own = name + ".weight_levels";
  const bool differs = reader_.contains(own);
  if (!differs && folder.is_int4()) return;
  if (differs) {
    libquant::Levels levels;
    std::memcpy(levels.magnitude.data(), reader_.tensor(own).data.data(), sizeof(levels.magnitude));
    if (levels.is_int4()) return;
  }
  Error error(ErrorKind::usage, "compressed-tensors holds integer levels only");
  error.path(reader_.folder())
      .expected("levels int4")
      .found("levels " + (differs ? "of its own" : folder.name()));
  if (differs) error.tensor(name);
  throw error.hint("quantise again: fireq quantize MODEL -o OUT --for vllm");
}

// vLLM's kernel takes N and K that are multiples of 128. What vLLM fuses is quantised together or not at all.
void ExportJob::choose_plain() {
  for (std::uint64_t layer = 0; layer < config_.layers; ++layer) {
    const auto names = formats::linear_names(layer);
    for (const auto& [first, last] : kFusedSets) {
      bool fits = true;
      for (std::size_t i = first; i <= last; ++i) {
        const auto [rows, cols] = formats::linear_shape(config_, i);
        fits = fits && rows % kGroupSize == 0 && cols % kGroupSize == 0 && is_quantised(names[i]);
      }
      for (std::size_t i = first; i <= last && !fits; ++i) plain_.insert(names[i]);
    }
    for (const std::string& name : names) {
      if (plain_.contains(name)) {
        result_.plain.push_back(name);
      } else {
        ++result_.linears;
      }
    }
  }
  if (result_.linears == 0) {
    const auto [rows, cols] = formats::linear_shape(config_, kQ);
    const auto [ffn, hidden] = formats::linear_shape(config_, kGate);
    throw Error(ErrorKind::usage,
                "no linear of this model can be exported: vLLM needs N and K in multiples of 128")
        .path(reader_.folder())
        .found("q_proj [" + std::to_string(rows) + ", " + std::to_string(cols) + "], gate_proj [" +
               std::to_string(ffn) + ", " + std::to_string(hidden) + "]")
        .hint("use --format hf-dequantized");
  }
}

// Before anything is written: would vLLM multiply what this folder holds?
void ExportJob::measure_loss() {
  std::uint64_t rows = 0;
  std::string first;
  progress_.begin("check", config_.layers);
  for (std::uint64_t layer = 0; layer < config_.layers; ++layer) {
    const auto names = formats::linear_names(layer);
    for (std::size_t i = 0; i < kLinears; ++i) {
      check_interrupt();
      if (plain_.contains(names[i])) continue;
      const libquant::VllmLoss loss = libquant::vllm_loss(source_.quantized(layer, i), options_.threads);
      if (loss.rows == 0) continue;
      if (rows == 0) first = names[i] + ", row " + std::to_string(loss.first_row);
      rows += loss.rows;
      result_.changed.push_back({names[i], loss.relative(), loss.rows});
    }
    progress_.advance(layer + 1);
  }
  progress_.end();
  if (rows == 0 || options_.requantize) return;
  throw Error(ErrorKind::usage, "vLLM would change scales of this folder when it loads them")
      .path(reader_.folder())
      .expected("rows whose largest group scale is 56")
      .found(counted(rows, "other row") + " in " + counted(result_.changed.size(), "linear") +
             ", the first in " + first)
      .hint(
          "quantise again: fireq quantize MODEL -o OUT --for vllm; or add --requantize, which exports them "
          "and "
          "prints the loss");
}

void ExportJob::note_left_out() {
  std::uint64_t smoothed = 0, shifted = 0;
  for (std::uint64_t layer = 0; layer < config_.layers; ++layer) {
    if (reader_.contains(layer_prefix(layer) + kSmoothing)) ++smoothed;
    if (reader_.contains(layer_prefix(layer) + kShift)) ++shifted;
  }
  if (smoothed > 0) {
    result_.left_out.push_back("k_post_rope_scale (S) of " + counted(smoothed, "layer") +
                               ": it cancels between K and Q where keys are not quantised");
  }
  if (shifted > 0) {
    result_.left_out.push_back("k_post_rope_shift of " + counted(shifted, "layer") +
                               ": the softmax does not notice it");
  }
  const std::vector<std::string>& fp8 = source_.quantization()->fp8;
  if (!fp8.empty()) {
    result_.left_out.push_back("the FP8 weights of " + counted(fp8.size(), "module") + ", the first " +
                               fp8.front() + ": written as plain " + std::string(dtype_name(options_.dtype)));
  }
  if (source_.quantization()->kv_cache) {
    result_.left_out.emplace_back("the INT4 KV cache: the format has none");
  }
  if (!served_) return;
  for (const std::string& what : result_.left_out) progress_.warning("not exported: " + what);
  if (!result_.plain.empty()) {
    progress_.warning(counted(result_.plain.size(), "linear") + " written as plain BF16, the first " +
                      result_.plain.front() +
                      ": vLLM needs N and K in multiples of 128, in 4 bits, and q, k and v alike, gate and "
                      "up alike");
  }
}

void ExportJob::plan() {
  if (!source_.packed()) {
    throw Error(ErrorKind::usage, "not a FireQ folder")
        .path(reader_.folder())
        .hint("make one with fireq quantize");
  }
  if (served_) {
    if (options_.dtype != Dtype::bf16) {
      throw Error(ErrorKind::usage, "vLLM runs W4AFP8 in BF16 only")
          .found(std::string(dtype_name(options_.dtype)));
    }
    for (std::uint64_t layer = 0; layer < config_.layers; ++layer) {
      for (const std::string& name : formats::linear_names(layer)) {
        if (is_quantised(name)) refuse_levels(name);
      }
    }
    choose_plain();
    measure_loss();
  } else {
    for (std::uint64_t layer = 0; layer < config_.layers; ++layer) {
      for (const std::string& name : formats::linear_names(layer))
        result_.linears +=
            module_precision(*source_.quantization(), name) == ModulePrecision::original ? 0U : 1U;
    }
  }
  note_left_out();
}

// A tensor that was not quantised: for vLLM in BF16, as it would be after loading; else as it is, so that
// norms with something folded into them stay exact.
StagedTensor ExportJob::other_tensor(const std::string& name) const {
  const TensorView view = reader_.tensor(name);
  if (!served_ || view.dtype == options_.dtype) return {{name, view.dtype, view.shape}, {}, view.data};
  return plain_tensor(
      name, options_.dtype, view.shape,
      [&](std::uint64_t begin, std::span<float> out) { tensor_to_float(view, begin, out, true); },
      reader_.file_of(name), options_.threads);
}

// The embedding or the head, where it is in FP8.
StagedTensor ExportJob::plain_table(const std::string& module) const {
  const TensorView view = reader_.tensor(module + ".weight");
  const Fp8Table table(reader_, module);
  return plain_tensor(
      module + ".weight", options_.dtype, view.shape,
      [&](std::uint64_t begin, std::span<float> out) { table.values(begin, out); },
      reader_.file_of(view.name), options_.threads);
}

StagedTensor ExportJob::plain_linear(std::uint64_t layer, std::size_t i) const {
  const std::string name = formats::linear_names(layer)[i];
  const ModulePrecision precision = source_.precision(layer, i);
  if (precision == ModulePrecision::original) return other_tensor(name + ".weight");
  if (precision == ModulePrecision::fp8) return plain_table(name);
  const QuantizedLinear q = source_.quantized(layer, i);
  const libquant::ProductTable table(q.levels);
  return plain_tensor(
      name + ".weight", options_.dtype, {q.rows, q.cols},
      [&](std::uint64_t begin, std::span<float> out) {
        libquant::dequantize_rows(q, table, begin / q.cols, out.size() / q.cols, out);
      },
      reader_.folder(), options_.threads);
}

// weight_packed, weight_scale and weight_shape. K is a multiple of 128 here, so that both formats have the
// same bytes per row, element 2i in the low nibble of byte i; only the nibbles' meaning differs.
void ExportJob::packed_linear(std::uint64_t layer, std::size_t i, std::vector<StagedTensor>& tensors) const {
  static const auto kOffsetBinary = [] {
    std::array<std::uint8_t, 256> table{};
    const auto nibble = [](unsigned code) { return (code & 8U) != 0 ? 8U - (code & 7U) : 8U + (code & 7U); };
    for (unsigned b = 0; b < table.size(); ++b) {
      table[b] = static_cast<std::uint8_t>(nibble(b & 15U) | nibble(b >> 4U) << 4U);
    }
    return table;
  }();
  const std::string name = formats::linear_names(layer)[i];
  const QuantizedLinear q = source_.quantized(layer, i);
  const std::uint64_t groups = q.groups();
  std::vector<std::byte> codes(q.codes.size());
  std::vector<std::uint16_t> scales(q.rows * groups);
  const std::uint64_t row_bytes = q.cols / 2;
  parallel_for((q.rows + kRowsPerTask - 1) / kRowsPerTask, options_.threads, [&](std::size_t t) {
    const std::uint64_t begin = t * kRowsPerTask;
    const std::uint64_t end = std::min(q.rows, begin + kRowsPerTask);
    for (std::uint64_t b = begin * row_bytes; b < end * row_bytes; ++b) {
      codes[b] = static_cast<std::byte>(kOffsetBinary[q.codes[b]]);
    }
    for (std::uint64_t row = begin; row < end; ++row) {
      for (std::uint64_t at = row * groups; at < (row + 1) * groups; ++at) {
        scales[at] = libquant::bf16_group_scale(libquant::decode_e4m3(q.group_scales[at]), q.row_scale(row));
      }
    }
  });
  tensors.push_back(
      owned_tensor(name + ".weight_packed", Dtype::i32, {q.rows, q.cols / 8}, std::move(codes)));
  tensors.push_back(owned_tensor(name + ".weight_scale", Dtype::bf16, {q.rows, groups}, to_bytes(scales)));
  const std::vector<std::int64_t> shape{static_cast<std::int64_t>(q.rows), static_cast<std::int64_t>(q.cols)};
  tensors.push_back(owned_tensor(name + ".weight_shape", Dtype::i64, {2}, to_bytes(shape)));
}

void ExportJob::stage_layer(FireqWriter& writer, std::uint64_t layer) {
  const std::string unit = layer_unit(layer);
  if (writer.unit_done(unit)) {
    ++result_.resumed_layers;
    return;
  }
  std::vector<StagedTensor> tensors;
  tensors.reserve(4 * kLinears + 4);
  const auto names = formats::linear_names(layer);
  std::vector<std::string> others{"input_layernorm.weight", "post_attention_layernorm.weight"};
  if (config_.qk_norm) {
    others.emplace_back("self_attn.q_norm.weight");
    others.emplace_back("self_attn.k_norm.weight");
  }
  for (const std::string& name : others) tensors.push_back(other_tensor(layer_prefix(layer) + name));
  for (std::size_t i = 0; i < kLinears; ++i) {
    check_interrupt();
    if (served_ && !plain_.contains(names[i])) {
      packed_linear(layer, i, tensors);
    } else {
      tensors.push_back(plain_linear(layer, i));
    }
    if (formats::linear_has_bias(config_, i)) tensors.push_back(other_tensor(names[i] + ".bias"));
  }
  writer.stage(unit, tensors);
}

void ExportJob::stage_rest(FireqWriter& writer) {
  if (writer.unit_done("rest")) return;
  std::vector<StagedTensor> tensors;
  for (const std::string& name : reader_.names()) {
    if (name.starts_with("model.layers.") || name.ends_with(".weight_scale")) continue;
    const bool fp8 = reader_.tensor(name).dtype == Dtype::f8_e4m3;
    tensors.push_back(fp8 ? plain_table(name.substr(0, name.rfind('.'))) : other_tensor(name));
  }
  writer.stage("rest", tensors);
  for (const StagedTensor& t : tensors) reader_.release(t.plan.name);
}

ExportResult ExportJob::run() {
  const auto begin = std::chrono::steady_clock::now();
  plan();
  const std::string choices = export_format_name(options_.format) + " " +
                              std::string(dtype_name(options_.dtype)) +
                              (options_.requantize ? " requantize" : "");
  FireqWriter writer(fs_, options_.out, reader_.folder(), options_.mode, options_.force,
                     {reader_.fingerprint(options_.threads), "", choices});
  progress_.begin("export", config_.layers);
  std::vector<std::string> units{"rest"};
  units.reserve(config_.layers + 1);
  for (std::uint64_t layer = 0; layer < config_.layers; ++layer) {
    check_interrupt();
    stage_layer(writer, layer);
    units.push_back(layer_unit(layer));
    progress_.advance(layer + 1);
  }
  progress_.end();
  check_interrupt();
  stage_rest(writer);

  const formats::QuantizationConfig& quantization = *source_.quantization();
  formats::ExportRecord record;
  record.format = export_format_name(options_.format);
  record.dtype = options_.dtype;
  record.recipe_json = quantization.recipe_json;
  record.source_fingerprint = quantization.source_fingerprint;
  record.tool_version = options_.tool_version;
  record.left_out = result_.left_out;
  formats::write_file_atomically(fs_, writer.side_file(std::string(formats::kExportFile)),
                                 formats::make_export_record(record));
  const std::string config =
      formats::read_text_inside_folder(reader_.folder(), "config.json", kLargestConfig);
  writer.publish(units,
                 served_ ? formats::compressed_tensors_config_json(config, result_.plain)
                         : formats::plain_config_json(config, options_.dtype),
                 options_.shard_size);
  result_.bytes_before = reader_.total_bytes();
  result_.bytes_after = formats::CheckpointReader(options_.out).total_bytes();
  result_.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return result_;
}

}  // namespace

std::string export_format_name(ExportFormat format) {
  return format == ExportFormat::hf_dequantized ? "hf-dequantized" : "compressed-tensors";
}

ExportResult export_model(const WeightSource& packed, const ExportOptions& options, formats::FileSystem& fs,
                          Progress& progress) {
  return ExportJob(packed, options, fs, progress).run();
}

}  // namespace fireq::calib
