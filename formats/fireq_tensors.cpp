// Which tensors a FireQ folder holds: every name, dtype and shape follows from config.json.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <set>
#include <utility>

#include "common/checked.hpp"
#include "common/error.hpp"
#include "formats/checkpoint.hpp"
#include "formats/fireq_folder.hpp"

namespace fireq::formats {
namespace {

constexpr std::uint64_t kTileRows = 128;
constexpr std::uint64_t kTileBytes = 8320;
constexpr float kLargestMagnitude = 448;
constexpr std::array<const char*, 7> kLinears{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                              "self_attn.o_proj", "mlp.gate_proj",    "mlp.up_proj",
                                              "mlp.down_proj"};

std::string layer_prefix(std::uint64_t layer) {
  return std::string("model.layers.").append(std::to_string(layer)).append(".");
}

template <typename T>
T element(const TensorView& view, std::uint64_t index) {
  T value{};
  std::memcpy(&value, view.data.data() + index * sizeof(T), sizeof(T));
  return value;
}

class TensorChecker {
 public:
  TensorChecker(const CheckpointReader& reader, const ModelConfig& model,
                const QuantizationConfig& quantization)
      : reader_(reader),
        model_(model),
        quantization_(quantization),
        ignored_(quantization.ignore.begin(), quantization.ignore.end()),
        fp8_(quantization.fp8.begin(), quantization.fp8.end()) {}

  void run() {
    check_module_names();
    const std::string embedding = kEmbeddingModule;
    const std::string head = kHeadModule;
    unpacked(embedding, {model_.vocab, model_.hidden});
    plain("model.norm.weight", {model_.hidden});
    if (!model_.tied_embeddings || fp8_.contains(head) || reader_.contains(head + ".weight")) {
      unpacked(head, {model_.vocab, model_.hidden});
    }
    for (std::uint64_t i = 0; i < model_.layers; ++i) check_layer(i);
    for (const std::string& name : reader_.names()) {
      if (!known_.contains(name)) throw error(name, "a FireQ folder of this config.json has no such tensor");
    }
    // Only now, with every shape known to be right, bytes are read.
    for (const auto& [name, shape] : shapes_) check_shape_content(name, shape);
    for (const std::string& name : levels_) check_levels_content(name);
    for (const std::string& name : smoothing_) check_smoothing_content(name);
    for (const std::string& name : shifts_) check_shift_content(name);
    for (const std::string& name : roundings_) check_rounding_content(name);
  }

 private:
  Error error(const std::string& name, std::string message) const {
    Error e(ErrorKind::input, std::move(message));
    e.path(reader_.contains(name) ? reader_.file_of(name) : reader_.folder()).tensor(name);
    return e;
  }

  void check_module_names() const {
    std::set<std::string> modules{kHeadModule, kEmbeddingModule};
    for (std::uint64_t i = 0; i < model_.layers; ++i) {
      for (const std::string& name : linear_names(i)) modules.insert(name);
    }
    const auto check = [&](const char* key, const std::set<std::string>& names) {
      for (const std::string& name : names) {
        if (modules.contains(name)) continue;
        throw Error(ErrorKind::input, std::string("quantization_config.") + key +
                                          " names a module that the model does not have")
            .path(reader_.folder() + "/config.json")
            .found(name);
      }
    };
    check("ignore", ignored_);
    check("fp8", fp8_);
  }

  void expect(const std::string& name, std::initializer_list<Dtype> dtypes,
              std::vector<std::uint64_t> shape) {
    known_.insert(name);
    const auto dtype_text = [&] {
      std::string text;
      for (const Dtype dtype : dtypes) text.append(text.empty() ? "" : " or ").append(dtype_name(dtype));
      return text;
    };
    if (!reader_.contains(name)) {
      throw error(name, "the tensor is missing").expected(dtype_text() + " " + shape_text(shape));
    }
    const TensorView view = reader_.tensor(name);
    if (std::find(dtypes.begin(), dtypes.end(), view.dtype) == dtypes.end()) {
      throw error(name, "wrong dtype").expected(dtype_text()).found(std::string(dtype_name(view.dtype)));
    }
    if (view.shape != shape) {
      throw error(name, "wrong shape").expected(shape_text(shape)).found(shape_text(view.shape));
    }
  }
  void plain(const std::string& name, std::vector<std::uint64_t> shape) {
    expect(name, {Dtype::bf16, Dtype::f16, Dtype::f32}, std::move(shape));
  }

  // A matrix in FP8 or in the source's type.
  void unpacked(const std::string& module, const std::array<std::uint64_t, 2>& shape) {
    const std::string weight = module + ".weight";
    if (!fp8_.contains(module)) return plain(weight, {shape[0], shape[1]});
    expect(weight, {Dtype::f8_e4m3}, {shape[0], shape[1]});
    expect(module + ".weight_scale", {Dtype::f32}, {shape[0]});
  }

  void check_layer(std::uint64_t layer) {
    const std::string prefix = layer_prefix(layer);
    plain(prefix + "input_layernorm.weight", {model_.hidden});
    plain(prefix + "post_attention_layernorm.weight", {model_.hidden});
    if (model_.qk_norm) {
      plain(prefix + "self_attn.q_norm.weight", {model_.head_dim});
      plain(prefix + "self_attn.k_norm.weight", {model_.head_dim});
    }
    const std::string smoothing = prefix + "self_attn.k_post_rope_scale";
    if (reader_.contains(smoothing)) {
      expect(smoothing, {Dtype::f32}, {model_.kv_heads, model_.head_dim});
      smoothing_.push_back(smoothing);
    }
    const std::string shift = prefix + "self_attn.k_post_rope_shift";
    if (reader_.contains(shift)) {
      expect(shift, {Dtype::f32}, {model_.kv_heads, model_.head_dim});
      shifts_.push_back(shift);
    }
    for (const char* const rounded : {"self_attn.k_rounding", "self_attn.v_rounding"}) {
      if (!reader_.contains(prefix + rounded)) continue;
      expect(prefix + rounded, {Dtype::bf16}, {model_.kv_heads, model_.head_dim * (model_.head_dim + 1) / 2});
      roundings_.push_back(prefix + rounded);
    }
    const auto names = linear_names(layer);
    for (std::size_t i = 0; i < names.size(); ++i) {
      const std::array<std::uint64_t, 2> shape = linear_shape(model_, i);
      if (ignored_.contains(names[i]) || fp8_.contains(names[i])) {
        unpacked(names[i], shape);
      } else {
        check_linear(names[i], shape);
      }
      if (linear_has_bias(model_, i)) plain(names[i] + ".bias", {shape[0]});
    }
  }

  void check_linear(const std::string& name, const std::array<std::uint64_t, 2>& shape) {
    const std::uint64_t padded = checked_round_up(shape[1], quantization_.group_size, name);
    const std::uint64_t groups = padded / quantization_.group_size;
    if (quantization_.layout == WeightLayout::row) {
      expect(name + ".weight_codes", {Dtype::u8}, {shape[0], padded / 2});
      expect(name + ".weight_group_scale", {Dtype::f8_e4m3}, {shape[0], groups});
    } else {
      const std::uint64_t row_tiles = checked_round_up(shape[0], kTileRows, name) / kTileRows;
      expect(name + ".weight_tiles", {Dtype::u8}, {row_tiles, groups, kTileBytes});
    }
    expect(name + ".weight_row_scale", {Dtype::f32}, {quantization_.row_scale_per_row ? shape[0] : 1});
    expect(name + ".weight_shape", {Dtype::i64}, {2});
    shapes_.emplace(name + ".weight_shape", shape);
    const std::string levels = name + ".weight_levels";
    if (reader_.contains(levels)) {
      expect(levels, {Dtype::f32}, {8});
      levels_.push_back(levels);
    }
  }

  void check_shape_content(const std::string& name, const std::array<std::uint64_t, 2>& shape) const {
    const TensorView view = reader_.tensor(name);
    const std::array<std::int64_t, 2> found{element<std::int64_t>(view, 0), element<std::int64_t>(view, 1)};
    // Sizes of a model are below 2^31, so an equal value cannot come from a negative one.
    if (std::equal(shape.begin(), shape.end(), found.begin(), [](std::uint64_t a, std::int64_t b) {
          return b >= 0 && a == static_cast<std::uint64_t>(b);
        })) {
      return;
    }
    std::string text("[");
    text.append(std::to_string(found[0])).append(", ").append(std::to_string(found[1])).append("]");
    throw error(name, "the shape it states is not the one of config.json")
        .expected(shape_text(shape))
        .found(text);
  }

  void check_levels_content(const std::string& name) const {
    const TensorView view = reader_.tensor(name);
    float last = -1;
    for (std::uint64_t i = 0; i < 8; ++i) {
      const auto magnitude = element<float>(view, i);
      if (!(magnitude >= 0 && magnitude <= kLargestMagnitude && magnitude > last)) {
        throw error(name, "bad magnitudes")
            .expected("strictly increasing values from 0 to 448")
            .found(std::to_string(magnitude) + " at [" + std::to_string(i) + "]");
      }
      last = magnitude;
    }
  }

  void check_smoothing_content(const std::string& name) const {
    const TensorView view = reader_.tensor(name);
    for (std::uint64_t i = 0; i < view.elements(); ++i) {
      const auto scale = element<float>(view, i);
      if (std::isfinite(scale) && scale > 0) continue;
      throw error(name, "bad scale")
          .expected("finite values above 0")
          .found(std::to_string(scale) + " at element " + std::to_string(i));
    }
  }

  void check_shift_content(const std::string& name) const {
    const TensorView view = reader_.tensor(name);
    for (std::uint64_t i = 0; i < view.elements(); ++i) {
      const auto shift = element<float>(view, i);
      if (std::isfinite(shift)) continue;
      throw error(name, "bad shift")
          .expected("finite values")
          .found(std::to_string(shift) + " at element " + std::to_string(i));
    }
  }

  // Triangles of D, D - 1, ... 1 numbers; the first of each row is a weight, not 0 or less.
  void check_rounding_content(const std::string& name) const {
    const TensorView view = reader_.tensor(name);
    std::uint64_t next = 0;
    for (std::uint64_t head = 0; head < model_.kv_heads; ++head) {
      for (std::uint64_t left = model_.head_dim; left > 0; --left) {
        for (std::uint64_t i = 0; i < left; ++i, ++next) {
          const auto bits = std::uint32_t{element<std::uint16_t>(view, next)} << 16U;
          const auto value = std::bit_cast<float>(bits);
          if (std::isfinite(value) && (i > 0 || value > 0)) continue;
          throw error(name, "bad rounding factor")
              .expected(i == 0 ? "a finite weight above 0" : "finite values")
              .found(std::to_string(value) + " at element " + std::to_string(next));
        }
      }
    }
  }

  const CheckpointReader& reader_;
  const ModelConfig& model_;
  const QuantizationConfig& quantization_;
  std::set<std::string> ignored_, fp8_;
  std::set<std::string> known_;
  std::map<std::string, std::array<std::uint64_t, 2>> shapes_;
  std::vector<std::string> levels_;
  std::vector<std::string> smoothing_;
  std::vector<std::string> shifts_;
  std::vector<std::string> roundings_;
};

}  // namespace

void check_fireq_tensors(const CheckpointReader& reader, const ModelConfig& model,
                         const QuantizationConfig& quantization) {
  TensorChecker(reader, model, quantization).run();
}

std::array<std::string, 7> linear_names(std::uint64_t layer) {
  std::array<std::string, 7> names;
  for (std::size_t i = 0; i < names.size(); ++i) names[i] = layer_prefix(layer).append(kLinears[i]);
  return names;
}

std::array<std::uint64_t, 2> linear_shape(const ModelConfig& model, std::size_t linear) {
  switch (linear) {
    case 0:
      return {model.q_rows(), model.hidden};
    case 1:
    case 2:
      return {model.kv_rows(), model.hidden};
    case 3:
      return {model.hidden, model.q_rows()};
    case 4:
    case 5:
      return {model.ffn, model.hidden};
    case 6:
      return {model.hidden, model.ffn};
    default:
      throw Error(ErrorKind::internal, "a layer has seven linears").found(std::to_string(linear));
  }
}

bool linear_has_bias(const ModelConfig& model, std::size_t linear) {
  if (linear < 3) return model.qkv_bias;
  return linear == 3 ? model.o_bias : model.mlp_bias;
}

}  // namespace fireq::formats
