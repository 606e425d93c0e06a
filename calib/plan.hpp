// Mixed precision by measurement: which linears get more than 4 bits so that a size or a KL is met
// (docs/recipes.md, "Choosing by size or by error").
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "calib/quantize_job.hpp"
#include "calib/recipe.hpp"
#include "calib/sensitivity.hpp"
#include "calib/weights.hpp"
#include "common/progress.hpp"

namespace fireq::calib {

struct PrecisionGoal {
  std::optional<std::uint64_t> size;  // bytes that the safetensors files may have at most
  std::optional<double> kl;           // nats per token, at most
  bool given() const noexcept { return size || kl; }
};

// Of the calibration text, what precisions are chosen on.
inline constexpr std::uint64_t kPlanTokens = 512;

// What the recipe leaves open, in the model's order, and the precisions that are tried. vLLM holds q, k and v
// as one, gate and up too, and has no FP8 beside 4 bits.
struct OpenUnits {
  std::vector<PrecisionUnit> units;
  std::vector<formats::ModulePrecision> precisions;
};
OpenUnits open_units(const formats::ModelConfig& config, const Recipe& recipe, const Modules& modules);

struct PlannedUnit {
  std::vector<std::string> linears;
  std::uint64_t bytes_int4 = 0, bytes_original = 0;
  double kl_int4 = 0;
  std::optional<std::uint64_t> bytes_fp8;  // where FP8 is a choice
  std::optional<double> kl_fp8;
  // Where a plan begins: 4 bits, unless FP8 is no larger (4-bit rows are padded to 128 columns).
  formats::ModulePrecision start() const noexcept {
    return bytes_fp8 && *bytes_fp8 <= bytes_int4 ? formats::ModulePrecision::fp8
                                                 : formats::ModulePrecision::int4;
  }
  formats::ModulePrecision precision = formats::ModulePrecision::int4;
};

struct PrecisionPlan {
  Recipe recipe;                   // with an override for each linear that is not in 4 bits
  std::vector<PlannedUnit> units;  // those that the recipe itself leaves open, in the model's order
  Windows windows;                 // what the KL was measured on
  std::uint64_t bytes = 0;         // of the plan, tensor data
  double kl = 0;                   // measured, with 4-bit linears rounded to the nearest
  double seconds = 0;
  std::uint64_t memory = 0;  // of the planning, resident: upper estimate
};

// options.calibration holds the text; statistics that the recipe needs are collected on the way and left in
// options.statistics. Deterministic: the same options give the same plan for any number of threads. Error
// (usage) with the smallest size, or the smallest KL, that can be reached when the goal cannot.
PrecisionPlan plan_precisions(const WeightSource& source, QuantizeOptions& options, const PrecisionGoal& goal,
                              Progress& progress);

}  // namespace fireq::calib
