// Original checkpoints (and what is common to both kinds): which tensors a model has, and their values.
#include "calib/weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "calib/plain_tensors.hpp"
#include "calib/weights_folder.hpp"
#include "common/checked.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::calib {
namespace {

constexpr std::uint64_t kChunk = 4096;  // elements per step; tensors may start at any byte

std::string element_name(const TensorView& view, std::uint64_t index) {
  std::string text = "]";
  for (std::size_t d = view.shape.size(); d-- > 0;) {
    text.insert(0, (d == 0 ? "[" : ", ") + std::to_string(index % view.shape[d]));
    index /= view.shape[d];
  }
  return view.shape.empty() ? "[]" : text;
}

bool is_float(Dtype dtype) {
  return dtype == Dtype::f32 || dtype == Dtype::f16 || dtype == Dtype::bf16;
}

std::string layer_name(std::uint64_t layer, const char* rest) {
  return "model.layers." + std::to_string(layer) + "." + rest;
}

// Fused tensors: which linears, in row order.
struct Fused {
  const char* name;
  std::size_t first, count;
};
constexpr Fused kFusedQkv{"self_attn.qkv_proj", kQ, 3};
constexpr Fused kFusedGateUp{"mlp.gate_up_proj", kGate, 2};

const Fused* fused_of(std::size_t linear) {
  if (linear <= kV) return &kFusedQkv;
  if (linear == kGate || linear == kUp) return &kFusedGateUp;
  return nullptr;
}

}  // namespace

Dtype linear_dtype(const formats::CheckpointReader& reader, std::uint64_t layer, std::size_t linear) {
  const std::string module = formats::linear_names(layer)[linear], own = module + ".weight";
  if (reader.contains(own)) return reader.tensor(own).dtype;
  if (const auto scales = int4_scale_dtype(reader, module)) return *scales;
  const Fused* const fused = fused_of(linear);
  if (fused == nullptr) return reader.tensor(own).dtype;
  return reader.tensor(layer_name(layer, fused->name) + ".weight").dtype;
}

void tensor_to_float(const TensorView& view, std::uint64_t begin_element, std::span<float> out,
                     bool check_finite) {
  if (!is_float(view.dtype)) {
    throw Error(ErrorKind::input, "tensor cannot be read as floating point")
        .tensor(view.name)
        .expected("F32, F16 or BF16")
        .found(std::string(dtype_name(view.dtype)));
  }
  const std::uint64_t size = dtype_size(view.dtype);
  if (checked_add(begin_element, out.size(), view.name) > view.data.size() / size) {
    throw Error(ErrorKind::internal, "read past the end of a tensor").tensor(view.name);
  }
  std::array<std::uint16_t, kChunk> half{};
  for (std::uint64_t done = 0; done < out.size(); done += kChunk) {
    const std::span<float> part = out.subspan(done, std::min<std::uint64_t>(kChunk, out.size() - done));
    const std::byte* source = view.data.data() + (begin_element + done) * size;
    if (view.dtype == Dtype::f32) {
      std::memcpy(part.data(), source, part.size() * size);
    } else {
      std::memcpy(half.data(), source, part.size() * size);
      const std::span<const std::uint16_t> bits(half.data(), part.size());
      view.dtype == Dtype::f16 ? libquant::decode_f16(bits, part) : libquant::decode_bf16(bits, part);
    }
    if (!check_finite) continue;
    const auto bad = std::find_if(part.begin(), part.end(), [](float v) { return !std::isfinite(v); });
    if (bad != part.end()) {
      const std::uint64_t index = begin_element + done + static_cast<std::uint64_t>(bad - part.begin());
      throw Error(ErrorKind::input, "a weight is not finite")
          .tensor(view.name)
          .found((std::isnan(*bad) ? "NaN at "
                  : *bad > 0       ? "Inf at "
                                   : "-Inf at ") +
                 element_name(view, index));
    }
  }
}

FolderWeights::FolderWeights(const std::string& folder, formats::CheckpointReader::Output output)
    : reader_(folder, output), config_(formats::read_model_config(folder)) {
  if (formats::is_fireq_folder(folder)) {
    quantization_ = formats::read_quantization_config(folder);
    formats::check_fireq_tensors(reader_, config_, *quantization_);
  } else if (const auto scheme = formats::read_int4_scheme(folder)) {
    import_.emplace(reader_, *scheme);
  }
  check_tensors();
  if (is_imported(formats::kHeadModule))
    import_head_ = import_->table(formats::kHeadModule, config_.vocab, config_.hidden);
}

// Everything the forward pass will read, before a byte of data is touched.
void FolderWeights::check_tensors() const {
  if (reader_.contains(kEmbedding)) {
    const TensorView view = reader_.tensor(kEmbedding);
    if (view.shape.size() == 2 && view.shape[0] < config_.vocab) {
      throw Error(ErrorKind::input, "vocab_size of config.json is larger than the embedding")
          .path(reader_.file_of(kEmbedding))
          .tensor(kEmbedding)
          .expected(shape_text(std::array{config_.vocab, config_.hidden}))
          .found(shape_text(view.shape))
          .hint("set vocab_size to the embedding's rows, or use the checkpoint that belongs to config.json");
    }
  }
  if (!is_fp8(formats::kEmbeddingModule)) check_tensor(kEmbedding, {config_.vocab, config_.hidden});
  check_tensor(kFinalNorm, {config_.hidden});
  if (is_imported(formats::kHeadModule)) {
    import_->check(formats::kHeadModule, config_.vocab, config_.hidden);
  } else if ((!config_.tied_embeddings || reader_.contains(kHead)) && !is_fp8(formats::kHeadModule)) {
    check_tensor(kHead, {config_.vocab, config_.hidden});
  }
  for (std::uint64_t layer = 0; layer < config_.layers; ++layer) {
    check_tensor(layer_name(layer, "input_layernorm.weight"), {config_.hidden});
    check_tensor(layer_name(layer, "post_attention_layernorm.weight"), {config_.hidden});
    if (config_.qk_norm) {
      check_tensor(layer_name(layer, "self_attn.q_norm.weight"), {config_.head_dim});
      check_tensor(layer_name(layer, "self_attn.k_norm.weight"), {config_.head_dim});
    }
    const auto names = formats::linear_names(layer);
    for (std::size_t linear = 0; linear < kLinears; ++linear) {
      const Source source = source_of(layer, linear);
      const auto shape = formats::linear_shape(config_, linear);
      if (is_imported(names[linear])) {
        import_->check(names[linear], shape[0], shape[1]);
        if (formats::linear_has_bias(config_, linear)) check_tensor(names[linear] + ".bias", {shape[0]});
        continue;
      }
      if (!is_packed(names[linear]) && !is_fp8(names[linear]))
        check_tensor(source.name + ".weight", {source.rows, shape[1]});
      if (formats::linear_has_bias(config_, linear)) check_tensor(source.name + ".bias", {source.rows});
    }
  }
}

void FolderWeights::check_tensor(const std::string& name, std::vector<std::uint64_t> shape) const {
  if (!reader_.contains(name)) {
    Error error(ErrorKind::input, "the model needs a tensor that the checkpoint does not have");
    error.path(reader_.folder()).tensor(name).expected(shape_text(shape)).found("nothing");
    if (name == kHead) error.hint("without it config.json would say tie_word_embeddings: true");
    throw error;
  }
  const TensorView view = reader_.tensor(name);
  if (view.shape != shape) {
    throw Error(ErrorKind::input, "tensor has another shape than config.json says")
        .path(reader_.file_of(name))
        .tensor(name)
        .expected(shape_text(shape))
        .found(shape_text(view.shape));
  }
  if (!is_float(view.dtype)) {
    throw Error(ErrorKind::input, "tensor is not in a floating point format that is read")
        .path(reader_.file_of(name))
        .tensor(name)
        .expected("F32, F16 or BF16")
        .found(std::string(dtype_name(view.dtype)));
  }
}

// Where the rows of a linear lie: a tensor of its own, or a part of a fused one.
FolderWeights::Source FolderWeights::source_of(std::uint64_t layer, std::size_t linear) const {
  const std::string own = formats::linear_names(layer)[linear];
  const std::uint64_t rows = formats::linear_shape(config_, linear)[0];
  const Fused* fused = fused_of(linear);
  if (fused == nullptr || is_packed(own) || is_imported(own) || reader_.contains(own + ".weight"))
    return {own, 0, rows};
  const std::string name = layer_name(layer, fused->name);
  if (!reader_.contains(name + ".weight")) return {own, 0, rows};
  Source source{name, 0, 0};
  for (std::size_t i = fused->first; i < fused->first + fused->count; ++i) {
    if (i == linear) source.begin = source.rows;
    source.rows += formats::linear_shape(config_, i)[0];
  }
  return source;
}

bool FolderWeights::is_packed(const std::string& module) const {
  return quantization_ && module_precision(*quantization_, module) == formats::ModulePrecision::int4;
}

bool FolderWeights::is_fp8(const std::string& module) const {
  return quantization_ && module_precision(*quantization_, module) == formats::ModulePrecision::fp8;
}

std::vector<float> FolderWeights::values(const std::string& name, std::uint64_t begin, std::uint64_t count,
                                         int threads) const {
  std::vector<float> out(count);
  const TensorView view = reader_.tensor(name);
  constexpr std::uint64_t kPerTask = 64 * kChunk;
  try {
    parallel_for((count + kPerTask - 1) / kPerTask, threads, [&](std::size_t task) {
      const std::uint64_t from = task * kPerTask;
      const std::uint64_t n = std::min(kPerTask, count - from);
      tensor_to_float(view, begin + from, std::span(out).subspan(from, n), true);
    });
  } catch (Error& error) {
    throw error.path_if_unset(reader_.file_of(name));
  }
  return out;
}

std::vector<float> FolderWeights::vector(const std::string& name) const {
  return values(name, 0, reader_.tensor(name).elements(), 1);
}

LinearWeights FolderWeights::load_linear(std::uint64_t layer, std::size_t linear, bool operands,
                                         int threads) const {
  const auto shape = formats::linear_shape(config_, linear);
  LinearWeights out;
  out.name = formats::linear_names(layer)[linear];
  out.rows = shape[0];
  out.cols = shape[1];
  const Source source = source_of(layer, linear);
  if (is_packed(out.name)) {
    if (operands) load_operands(layer, linear, threads, out);
  } else if (is_fp8(out.name)) {
    load_fp8(out.name, threads, out);
  } else if (is_imported(out.name)) {
    out.weight = import_->load(out.name, out.rows, out.cols, threads);
    import_->release(out.name);
  } else {
    out.weight = values(source.name + ".weight", source.begin * shape[1], shape[0] * shape[1], threads);
    out.plain_input = packed();
  }
  if (formats::linear_has_bias(config_, linear)) {
    out.bias = values(source.name + ".bias", source.begin, shape[0], 1);
  }
  return out;
}

LayerWeights FolderWeights::load_layer(std::uint64_t layer, int threads) const {
  return load(layer, true, threads);
}

LayerWeights FolderWeights::load_unquantized(std::uint64_t layer, int threads) const {
  return load(layer, false, threads);
}

LayerWeights FolderWeights::load(std::uint64_t layer, bool operands, int threads) const {
  LayerWeights out;
  for (std::size_t i = 0; i < kLinears; ++i) {
    out.linear[i] = load_linear(layer, i, operands, threads);
    reader_.release(source_of(layer, i).name + ".weight");
  }
  out.attn_norm = vector(layer_name(layer, "input_layernorm.weight"));
  out.mlp_norm = vector(layer_name(layer, "post_attention_layernorm.weight"));
  if (config_.qk_norm) {
    out.q_norm = vector(layer_name(layer, "self_attn.q_norm.weight"));
    out.k_norm = vector(layer_name(layer, "self_attn.k_norm.weight"));
  }
  const std::string smoothing = layer_name(layer, "self_attn.k_post_rope_scale");
  if (quantization_ && reader_.contains(smoothing)) out.k_post_rope_scale = vector(smoothing);
  const std::string shift = layer_name(layer, "self_attn.k_post_rope_shift");
  if (quantization_ && reader_.contains(shift)) out.k_post_rope_shift = vector(shift);
  const std::string keys = layer_name(layer, "self_attn.k_rounding");
  if (quantization_ && reader_.contains(keys)) out.k_rounding = vector(keys);
  const std::string values = layer_name(layer, "self_attn.v_rounding");
  if (quantization_ && reader_.contains(values)) out.v_rounding = vector(values);
  return out;
}

void FolderWeights::embed(std::span<const std::int32_t> ids, std::span<float> out) const {
  if (out.size() != ids.size() * config_.hidden)
    throw Error(ErrorKind::internal, "embedding of another size");
  const TensorView view = reader_.tensor(kEmbedding);
  std::optional<Fp8Table> fp8;
  if (is_fp8(formats::kEmbeddingModule)) fp8.emplace(reader_, formats::kEmbeddingModule);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || static_cast<std::uint64_t>(ids[i]) >= config_.vocab) {
      throw Error(ErrorKind::input, "token id outside the vocabulary")
          .path(reader_.folder())
          .expected("0 to " + std::to_string(config_.vocab - 1))
          .found(std::to_string(ids[i]) + " at index " + std::to_string(i));
    }
    const auto row = static_cast<std::uint64_t>(ids[i]);
    const std::span<float> values = out.subspan(i * config_.hidden, config_.hidden);
    if (fp8) {
      fp8->values(row * config_.hidden, values);
      continue;
    }
    try {
      tensor_to_float(view, row * config_.hidden, values, true);
    } catch (Error& error) {
      throw error.path_if_unset(reader_.file_of(kEmbedding));
    }
  }
}

std::vector<float> FolderWeights::final_norm() const {
  return vector(kFinalNorm);
}

void FolderWeights::head_rows(std::uint64_t begin, std::uint64_t count, std::span<float> out) const {
  // A checkpoint that says it is tied may hold an lm_head too. transformers 5 then uses it (equal to the
  // embedding, which changes nothing, or not, and then config.json is wrong).
  const std::string name = reader_.contains(kHead) ? kHead : kEmbedding;
  if (begin + count > config_.vocab || out.size() != count * config_.hidden) {
    throw Error(ErrorKind::internal, "rows outside the output head");
  }
  if (import_head_) return import_head_->values(begin, out);
  const char* const module = name == kHead ? formats::kHeadModule : formats::kEmbeddingModule;
  if (is_fp8(module)) return Fp8Table(reader_, module).values(begin * config_.hidden, out);
  try {
    tensor_to_float(reader_.tensor(name), begin * config_.hidden, out, true);
  } catch (Error& error) {
    throw error.path_if_unset(reader_.file_of(name));
  }
}

formats::ModulePrecision WeightSource::precision(std::uint64_t layer, std::size_t linear) const {
  const formats::QuantizationConfig* const config = quantization();
  return config == nullptr ? formats::ModulePrecision::original
                           : module_precision(*config, formats::linear_names(layer)[linear]);
}

LayerWeights WeightSource::load_unquantized(std::uint64_t /*layer*/, int /*threads*/) const {
  throw Error(ErrorKind::internal, "these weights are not packed");
}

std::unique_ptr<WeightSource> open_weights(const std::string& folder,
                                           formats::CheckpointReader::Output output) {
  return std::make_unique<FolderWeights>(folder, output);
}

}  // namespace fireq::calib
