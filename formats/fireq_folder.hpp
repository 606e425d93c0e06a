// The FireQ checkpoint as files: quantization_config, the partial folder in which a run grows, its lock and
// resume state, and the rename that publishes it. Knows names, dtypes and shapes (docs/checkpoint-format.md),
// not arithmetic.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "formats/file_system.hpp"
#include "formats/model_config.hpp"
#include "formats/safetensors.hpp"

namespace fireq::formats {

class CheckpointReader;

enum class WeightLayout : std::uint8_t { row, sm90 };

// quantization_config of a FireQ folder.
struct QuantizationConfig {
  std::uint64_t group_size = 128;
  bool levels_int4 = true;
  std::array<float, 8> levels{0, 1, 2, 3, 4, 5, 6, 7};
  bool row_scale_per_row = true;  // else one per tensor
  WeightLayout layout = WeightLayout::row;
  bool kv_cache = true;  // INT4 cache calibrated
  std::vector<std::string> ignore;
  std::string recipe_json;  // the resolved recipe, compact JSON text
  std::string source_fingerprint;
  std::string calibration_fingerprint;  // empty without calibration
  std::uint64_t calibration_tokens = 0;
  std::uint64_t calibration_seed = 0;
  std::string tool_version;
};

// The folder's config.json has quantization_config with quant_method "fireq"?
bool is_fireq_folder(const std::string& folder);
QuantizationConfig read_quantization_config(const std::string& folder);
// config.json text of OUT: the source's config.json plus quantization_config.
std::string make_config_json(const std::string& source_config_json, const QuantizationConfig& quantization);

// Checks names, dtypes and shapes of every tensor of a FireQ folder against its config.json before data is
// read.

void check_fireq_tensors(const CheckpointReader& reader, const ModelConfig& model,
                         const QuantizationConfig& quantization);

// Names of the seven linears of layer i, in the order q, k, v, o, gate, up, down:
// "model.layers.0.self_attn.q_proj" ...
std::array<std::string, 7> linear_names(std::uint64_t layer);
// [N, K] of linear 0..6 in that order.
std::array<std::uint64_t, 2> linear_shape(const ModelConfig& model, std::size_t linear);
bool linear_has_bias(const ModelConfig& model, std::size_t linear);

// One run's output. Units (embedding, layer 0 ... L-1, tail) are staged one by one as durable files;
// publish() assembles shards of at most shard_size bytes, writes the index last, fsyncs, and renames
// OUT.fireq-partial to OUT. shard size only moves file cuts.
class FireqWriter {
 public:
  enum class Mode : std::uint8_t { fresh, resume, restart };
  // Throws Error(usage) when OUT exists without force, when OUT is the input or inside it (the caller passes
  // it), when a partial exists in fresh mode; Error(environment) when another run holds the lock;
  // Error(input) when resuming with another fingerprint (says which of model, text, recipe changed).
  // `fingerprints` = {model, text, recipe}.
  FireqWriter(FileSystem& fs, std::string out, const std::string& source_folder, Mode mode, bool force,
              const std::array<std::string, 3>& fingerprints);
  ~FireqWriter();
  FireqWriter(const FireqWriter&) = delete;
  FireqWriter& operator=(const FireqWriter&) = delete;

  const std::string& partial_folder() const noexcept;
  bool unit_done(const std::string& unit) const;
  // Stages one unit: tensors with their bytes, in name order inside the unit; durable on return.
  struct Tensor {
    TensorPlan plan;
    std::vector<std::byte> owned;         // used when not empty
    std::span<const std::byte> borrowed;  // else this
  };
  void stage(const std::string& unit, std::span<const Tensor> tensors);
  // A side file such as calibration.h5 written into the partial folder by the caller under this path.
  std::string side_file(const std::string& name) const;
  // Copies tokenizer files, generation_config.json, chat templates, licence files byte for byte; writes
  // config.json; shards; index; rename.
  void publish(const std::vector<std::string>& units_in_order, const std::string& config_json,
               std::uint64_t shard_size);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fireq::formats
