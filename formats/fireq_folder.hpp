// The FireQ checkpoint as files: quantization_config, the partial folder in which a run grows, its lock and
// resume state, and the rename that publishes it. Knows names, dtypes and shapes (docs/checkpoint-format.md),
// not arithmetic.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/file_system.hpp"
#include "formats/model_config.hpp"
#include "formats/safetensors.hpp"

namespace fireq::formats {

class CheckpointReader;

enum class WeightLayout : std::uint8_t { row, sm90 };

// How a module's weight is stored: 4-bit codes, FP8 with a scale per row, or as the source has it.
enum class ModulePrecision : std::uint8_t { int4, fp8, original };
inline constexpr const char* kEmbeddingModule = "model.embed_tokens";
inline constexpr const char* kHeadModule = "lm_head";

// On text that a folder was not calibrated on, with everything on that it asks for: its nll per token, how
// much that is over the original's, and KL(original || folder), in nats, with standard errors of the means
// over tokens.
struct MeasuredCost {
  std::uint64_t tokens = 0;
  double nll = 0, delta_nll = 0, delta_nll_stderr = 0, kl = 0, kl_stderr = 0;
};

// quantization_config of a FireQ folder.
struct QuantizationConfig {
  std::uint64_t group_size = 128;
  bool levels_int4 = true;
  std::array<float, 8> levels{0, 1, 2, 3, 4, 5, 6, 7};
  bool row_scale_per_row = true;  // else one per tensor
  WeightLayout layout = WeightLayout::row;
  bool kv_cache = true;             // INT4 cache calibrated
  std::vector<std::string> ignore;  // modules in the source's own type
  std::vector<std::string> fp8;     // modules in FP8; none of them is in ignore
  std::string recipe_json;          // the resolved recipe, compact JSON text
  std::string source_fingerprint;
  std::string calibration_fingerprint;  // empty without calibration
  std::uint64_t calibration_tokens = 0;
  std::uint64_t calibration_seed = 0;
  std::optional<MeasuredCost> measured;
  std::string tool_version;
};

// Of one of the model's linears, of the embedding or the head.
ModulePrecision module_precision(const QuantizationConfig& quantization, std::string_view module);

// Rules of docs/checkpoint-format.md on quantization_config. Error(input) naming the key.
QuantizationConfig parse_quantization_config(std::string_view config_json,
                                             const std::string& path_for_errors);

// The folder's config.json has quantization_config with quant_method "fireq"? False without a config.json;
// Error(input) when it is no JSON.
bool is_fireq_folder(const std::string& folder);
QuantizationConfig read_quantization_config(const std::string& folder);
// config.json text of OUT: the source's config.json plus quantization_config, keys sorted.
std::string make_config_json(const std::string& source_config_json, const QuantizationConfig& quantization);

// Checks names, dtypes and shapes of every tensor of a FireQ folder against its config.json before data is
// read; then the content of the small ones (weight_shape, weight_levels, k_post_rope_scale). Error(input)
// names the file and the tensor. Codes and scales are checked where they are used (libquant).
void check_fireq_tensors(const CheckpointReader& reader, const ModelConfig& model,
                         const QuantizationConfig& quantization);

// Names of the seven linears of layer i, in the order q, k, v, o, gate, up, down:
// "model.layers.0.self_attn.q_proj" ...
std::array<std::string, 7> linear_names(std::uint64_t layer);
// [N, K] of linear 0..6 in that order.
std::array<std::uint64_t, 2> linear_shape(const ModelConfig& model, std::size_t linear);
bool linear_has_bias(const ModelConfig& model, std::size_t linear);

// One run's output. Units (embedding, layers, tail) are staged one by one as hashed files in
// OUT.fireq-partial/; publish() assembles shards of at most shard_size bytes of data, writes the index and
// config.json last, fsyncs, and makes OUT appear by one rename. shard_size only moves tensors between files.
// docs/checkpoint-format.md has the partial folder's content and what each interruption leaves.
//
// stage() and publish() throw what the file system throws, publish() Error(environment) for a staged tensor
// that no longer has its hash; after an error or a crash the partial folder can be resumed.
class FireqWriter {
 public:
  enum class Mode : std::uint8_t {
    fresh,   // refuses a partial output that holds finished work
    resume,  // goes on with it; starts afresh when there is none
    restart  // throws it away
  };
  // Throws Error(usage) when OUT exists without `force` (or is, even with it, no FireQ folder and not empty),
  // when OUT is the input, inside it or around it, when its parent does not exist, and for a partial output
  // in fresh mode; Error(environment) when another run holds the lock; Error(input) when resuming with
  // another fingerprint (says which of model, text, recipe changed). `fingerprints` = {model, text, recipe}:
  // any text; whatever changes the staged bytes must be in one of them.
  FireqWriter(FileSystem& fs, std::string out, const std::string& source_folder, Mode mode, bool force,
              const std::array<std::string, 3>& fingerprints);
  // The refusals of an output that need no fingerprint, before work whose result it would take. Makes
  // nothing but the lock of a partial output that is there; removes what a run left that was killed behind
  // its complete output. The constructor looks again.
  static void refuse_early(FileSystem& fs, std::string out, const std::string& source_folder, Mode mode,
                           bool force);
  ~FireqWriter();  // releases the lock; leaves the partial folder
  FireqWriter(const FireqWriter&) = delete;
  FireqWriter& operator=(const FireqWriter&) = delete;

  const std::string& partial_folder() const noexcept;
  bool unit_done(const std::string& unit) const;
  // Stages one unit: tensors with their bytes, sorted by name inside the unit. A killed run finds it again;
  // what a power failure takes from it is noticed by its hash, and the unit done again. Unit names are made
  // of letters, digits, '-', '_' and '.'.
  struct Tensor {
    TensorPlan plan;
    std::vector<std::byte> owned;         // used when not empty
    std::span<const std::byte> borrowed;  // else this
    // The source folder's tensor of this name, unchanged (its dtype and shape must be the plan's): nothing is
    // staged, publish() copies it straight from there. `owned` and `borrowed` are not looked at.
    bool from_source = false;
  };
  void stage(const std::string& unit, std::span<const Tensor> tensors);
  // A unit that is done, to read back.
  SafetensorsFile open_unit(const std::string& unit) const;
  // Where the caller writes a side file such as calibration.h5, atomically; it survives a resume and is
  // published when this was called (again) in the run that publishes.
  std::string side_file(const std::string& name);
  // Copies tokenizer files, generation_config.json, chat templates, licence files byte for byte; writes
  // config.json; shards; index; rename. `revise`, when given, gets the path of the finished folder before the
  // rename, and what it returns becomes its config.json.
  using Revise = std::function<std::string(const std::string& folder)>;
  void publish(const std::vector<std::string>& units_in_order, const std::string& config_json,
               std::uint64_t shard_size, const Revise& revise = {});

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fireq::formats
