// The main job: a Hugging Face checkpoint and a recipe become a FireQ folder, one decoder layer at a time.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "calib/dataset.hpp"
#include "calib/modules.hpp"
#include "calib/recipe.hpp"
#include "calib/weights.hpp"
#include "common/progress.hpp"
#include "formats/fireq_folder.hpp"
#include "formats/statistics.hpp"

namespace fireq::calib {

struct QuantizeOptions {
  std::string out;
  Recipe recipe;
  // One of these where the recipe needs statistics: windows to calibrate on, or a statistics file.
  std::optional<Windows> calibration;
  std::optional<std::string> statistics_path;
  // Statistics that were collected on `calibration` in this run already, their meta filled in.
  std::optional<formats::CalibrationStatistics> statistics;
  // Not calibrated on: what the finished folder costs is measured on them before it appears.
  std::optional<Windows> held_back;
  std::uint64_t seed = 0;  // recorded: the draw of the windows
  formats::FireqWriter::Mode mode = formats::FireqWriter::Mode::fresh;
  bool force = false;
  formats::WeightLayout layout = formats::WeightLayout::row;
  std::uint64_t shard_size = 5'000'000'000;
  int threads = 0;
  std::string tool_version;
  std::vector<std::pair<std::string, std::string>> side_files;  // written beside the tensors: name, text
};

struct LinearPlan {
  std::string name;
  std::uint64_t rows = 0, cols = 0;
  std::uint64_t bytes_before = 0, bytes_after = 0;
  formats::ModulePrecision precision = formats::ModulePrecision::int4;
};

// What a run will do and write, known without running it.
struct QuantizePlan {
  std::vector<LinearPlan> linears;
  std::vector<std::pair<std::string, std::string>> kept;  // tensor left unquantised, and why
  std::uint64_t bytes_before = 0;                         // all tensors' data
  std::uint64_t bytes_after = 0;
  // Upper estimate of resident memory: two largest layers in FP32, calibration activations, fixed buffers.
  std::uint64_t peak_memory = 0;
  std::uint64_t largest_layer_fp32 = 0;
  std::uint64_t calibration_bytes = 0;
};
// Throws Error(usage) for a source that is a FireQ folder already.
QuantizePlan plan_quantization(const WeightSource& source, const QuantizeOptions& options);

// Bytes of one linear's weight, without a bias, as `choice` would have it stored.
std::uint64_t linear_bytes(const WeightSource& source, const QuantizeOptions& options, std::uint64_t layer,
                           std::size_t linear, const ModuleChoice& choice);

// Program, libraries, working areas: what any work on a model holds beside what grows with it.
inline constexpr std::uint64_t kFixedMemory = 200'000'000;

// Resident memory in bytes of a run on a model of this shape. windows: null when it does not calibrate.
struct MemoryPlan {
  std::uint64_t largest_layer_fp32 = 0;
  std::uint64_t calibration_bytes = 0;
  std::uint64_t peak = 0;  // upper estimate: layers in FP32, calibration_bytes, fixed buffers
};
MemoryPlan plan_memory(const formats::ModelConfig& config, const Recipe& recipe, const Windows* windows);

// The statistics in the file `path`, of the model with this shape and fingerprint
// (CheckpointReader::fingerprint). Throws Error(input) where they are of another one or damaged.
formats::CalibrationStatistics statistics_of_model(const std::string& path,
                                                   const formats::ModelConfig& config,
                                                   const std::string& fingerprint);

struct QuantizeResult {
  std::uint64_t bytes_before = 0, bytes_after = 0;                // tensor data
  std::uint64_t linears = 0, fp8_linears = 0, plain_linears = 0;  // in 4 bits, in FP8, as they were
  std::uint64_t resumed_layers = 0;
  std::uint64_t clamped = 0, zero_channels = 0;
  std::uint64_t saturated_groups = 0;  // with a weight that the per-tensor scale cut off
  std::uint64_t dead_channels = 0;     // inputs that were always zero on the calibration text
  std::optional<formats::MeasuredCost> measured;
  double seconds = 0, calibration_seconds = 0, measuring_seconds = 0;
};

// Throws Error; after an interrupt or a crash, mode `resume` continues at the first layer that is not done
// and ends with the same bytes.
QuantizeResult quantize_model(const WeightSource& source, const QuantizeOptions& options,
                              formats::FileSystem& fs, Progress& progress);

}  // namespace fireq::calib
