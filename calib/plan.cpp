#include "calib/plan.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstdio>
#include <map>
#include <utility>

#include "calib/evaluate.hpp"
#include "calib/sensitivity.hpp"
#include "common/error.hpp"

namespace fireq::calib {
namespace {

using formats::ModulePrecision;

constexpr std::uint64_t kVariantBytes = std::uint64_t{1} << 30U;
// A tensor's entry in a safetensors header, and a header's padding, at most.
constexpr std::uint64_t kHeaderBytesPerTensor = 200;
constexpr std::uint64_t kTensorsPerLinear = 6;

std::string number(double value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.4g", value);
  return text.data();
}

// One more step for a unit: to a precision that costs `bytes` more and saves `gain` of KL.
struct Step {
  std::size_t unit = 0;
  ModulePrecision to = ModulePrecision::fp8;
  std::uint64_t bytes = 0;
  double gain = 0;
  double rate() const noexcept { return gain / static_cast<double>(std::max<std::uint64_t>(1, bytes)); }
};

std::uint64_t more(std::uint64_t bytes, std::uint64_t than) {
  return bytes > than ? bytes - than : 0;
}

// Steps of one unit along the lower hull of (bytes, KL): rates that do not rise.
void add_steps(const PlannedUnit& u, std::size_t index, std::vector<Step>& steps) {
  if (u.start() == ModulePrecision::fp8) {
    const Step step{index, ModulePrecision::original, more(u.bytes_original, *u.bytes_fp8), *u.kl_fp8};
    if (step.gain > 0) steps.push_back(step);
    return;
  }
  const Step whole{index, ModulePrecision::original, more(u.bytes_original, u.bytes_int4), u.kl_int4};
  if (u.kl_fp8) {
    const Step first{index, ModulePrecision::fp8, more(*u.bytes_fp8, u.bytes_int4), u.kl_int4 - *u.kl_fp8};
    const Step second{index, ModulePrecision::original, more(u.bytes_original, *u.bytes_fp8), *u.kl_fp8};
    if (first.gain > 0 && first.rate() >= second.rate()) {
      steps.push_back(first);
      if (second.gain > 0) steps.push_back(second);
      return;
    }
  }
  if (whole.gain > 0) steps.push_back(whole);
}

class Planner {
 public:
  Planner(const WeightSource& source, QuantizeOptions& options, const PrecisionGoal& goal, Progress& progress)
      : source_(source),
        options_(options),
        goal_(goal),
        progress_(progress),
        recipe_(options.recipe),
        modules_(modules_of(source, recipe_)) {}

  PrecisionPlan run() {
    const auto begin = std::chrono::steady_clock::now();
    if (!options_.calibration) {
      throw Error(ErrorKind::usage, "choosing precisions needs calibration text").hint("give --text FILE");
    }
    collect_statistics();
    plan_.windows = sample_windows(*options_.calibration, kPlanTokens);
    find_units();
    plan_.memory = kFixedMemory + std::max(unit_kl_memory(source_.config(), plan_.windows.ids.size(),
                                                          units_.size(), precisions_.size(), kVariantBytes),
                                           comparison_memory(source_.config(), plan_.windows));
    QuantizeOptions smallest = options_;
    smallest.recipe = recipe_at_plan();
    const QuantizePlan least = plan_quantization(source_, smallest);
    least_bytes_ = least.bytes_after;
    header_bytes_ =
        kHeaderBytesPerTensor * (kTensorsPerLinear * least.linears.size() + 2 * least.kept.size() + 16);
    if (goal_.size && least_bytes_ + header_bytes_ > *goal_.size) {
      throw Error(ErrorKind::usage, "the model does not become as small as that")
          .expected("--target-size of " + std::to_string(least_bytes_ + header_bytes_) + " bytes or more")
          .found(std::to_string(*goal_.size))
          .hint(modules_.embeddings() == ModulePrecision::original
                    ? R"(a recipe with "embeddings": "fp8" makes embedding and head smaller)"
                    : "ignore fewer modules");
    }
    measure();
    if (goal_.size) {
      take_by_size();
      progress_.begin("check", 1);
    } else {
      take_by_kl();
    }
    plan_.recipe = recipe_at_plan();
    plan_.kl = kl_of_plan();
    progress_.end();
    QuantizeOptions planned = options_;
    planned.recipe = plan_.recipe;
    plan_.bytes = plan_quantization(source_, planned).bytes_after;
    plan_.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    return std::move(plan_);
  }

 private:
  PlannedRun run_of(const Recipe& recipe, const Modules& modules) const {
    return {source_, recipe, modules, options_.statistics ? &*options_.statistics : nullptr,
            options_.threads};
  }

  void collect_statistics() {
    if (!recipe_.needs_statistics() || options_.statistics) return;
    options_.statistics = calibrate(source_, *options_.calibration, options_.threads, progress_);
    options_.statistics->meta.model_fingerprint = source_.reader().fingerprint(options_.threads);
    options_.statistics->meta.text_fingerprint = fingerprint_of_windows(*options_.calibration);
    options_.statistics->meta.seed = options_.seed;
  }

  void find_units() {
    OpenUnits open = open_units(source_.config(), recipe_, modules_);
    units_ = std::move(open.units);
    precisions_ = std::move(open.precisions);
    for (const PrecisionUnit& of : units_) {
      const auto names = formats::linear_names(of.layer);
      PlannedUnit unit;
      for (const std::size_t i : of.linears) {
        unit.linears.push_back(names.at(i));
        ModuleChoice choice = modules_.linear(of.layer, i);
        const auto bytes = [&](ModulePrecision p) {
          choice.precision = p;
          return linear_bytes(source_, options_, of.layer, i, choice);
        };
        unit.bytes_int4 += bytes(ModulePrecision::int4);
        if (precisions_.size() > 1) unit.bytes_fp8 = unit.bytes_fp8.value_or(0) + bytes(ModulePrecision::fp8);
        unit.bytes_original += bytes(ModulePrecision::original);
      }
      unit.precision = unit.start();
      plan_.units.push_back(std::move(unit));
    }
  }

  void measure() {
    const auto kl =
        unit_kl(run_of(recipe_, modules_), plan_.windows, units_, precisions_, kVariantBytes, progress_);
    for (std::size_t u = 0; u < units_.size(); ++u) {
      plan_.units[u].kl_int4 = kl[u][0];
      if (precisions_.size() > 1) plan_.units[u].kl_fp8 = kl[u][1];
      add_steps(plan_.units[u], u, steps_);
    }
    std::stable_sort(steps_.begin(), steps_.end(),
                     [](const Step& a, const Step& b) { return a.rate() > b.rate(); });
  }

  // The best steps until one does not fit, then whatever of the rest still does.
  void take_by_size() {
    std::uint64_t free = *goal_.size - least_bytes_ - header_bytes_;
    std::vector<bool> stuck(units_.size(), false);
    for (const Step& step : steps_) {
      if (stuck[step.unit]) continue;
      if (step.bytes > free) {
        stuck[step.unit] = true;
        continue;
      }
      free -= step.bytes;
      plan_.units[step.unit].precision = step.to;
    }
  }

  // The fewest of the best steps that reach the KL. More steps are taken to mean a smaller KL.
  void take_by_kl() {
    const auto reached = [&](std::size_t count) {
      set_steps(count);
      return kl_of_plan();
    };
    std::size_t low = 0;
    std::size_t high = steps_.size();
    // Halvings of what is left, after the first look at all of the steps; the last look was taken before.
    progress_.begin("search", 1 + std::bit_width(steps_.size()));
    const double least = reached(high);
    if (least > *goal_.kl) {
      throw Error(ErrorKind::usage, "the KL does not become as small as that")
          .expected("--max-kl of " + number(least * (1 + 1e-3)) + " or more")
          .found(number(*goal_.kl))
          .hint("with every open linear in its own type it is " + number(least));
    }
    while (low < high) {
      check_interrupt();
      const std::size_t middle = low + (high - low) / 2;
      if (reached(middle) <= *goal_.kl) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    set_steps(high);
  }

  void set_steps(std::size_t count) {
    for (PlannedUnit& unit : plan_.units) unit.precision = unit.start();
    for (std::size_t i = 0; i < count; ++i) plan_.units[steps_[i].unit].precision = steps_[i].to;
  }

  Recipe recipe_at_plan() const {
    Recipe out = recipe_;
    for (const PlannedUnit& unit : plan_.units) {
      if (unit.precision == ModulePrecision::int4) continue;
      for (const std::string& name : unit.linears) out.overrides.push_back({name, unit.precision, ""});
    }
    return out;
  }

  // KL of the mixture that the units say now; each is measured once.
  double kl_of_plan() {
    std::vector<ModulePrecision> mixture;
    for (const PlannedUnit& unit : plan_.units) mixture.push_back(unit.precision);
    const auto known = measured_.find(mixture);
    if (known != measured_.end()) return known->second;
    const Recipe recipe = recipe_at_plan();
    const Modules modules = modules_of(source_, recipe);
    const double kl = planned_kl(run_of(recipe, modules), plan_.windows);
    measured_.emplace(std::move(mixture), kl);
    progress_.advance(measured_.size());
    return kl;
  }

  const WeightSource& source_;
  QuantizeOptions& options_;
  const PrecisionGoal& goal_;
  Progress& progress_;
  const Recipe recipe_;
  const Modules modules_;
  std::vector<PrecisionUnit> units_;
  std::vector<ModulePrecision> precisions_;
  std::vector<Step> steps_;
  std::map<std::vector<ModulePrecision>, double> measured_;  // whole mixtures
  std::uint64_t least_bytes_ = 0, header_bytes_ = 0;
  PrecisionPlan plan_;
};

}  // namespace

OpenUnits open_units(const formats::ModelConfig& config, const Recipe& recipe, const Modules& modules) {
  static const std::vector<std::vector<std::size_t>> kFused{{kQ, kK, kV}, {kO}, {kGate, kUp}, {kDown}};
  static const std::vector<std::vector<std::size_t>> kEach{{kQ}, {kK}, {kV}, {kO}, {kGate}, {kUp}, {kDown}};
  const bool vllm = recipe.target == Target::vllm;
  OpenUnits open;
  for (std::uint64_t layer = 0; layer < config.layers; ++layer) {
    for (const std::vector<std::size_t>& set : vllm ? kFused : kEach) {
      const bool said =
          std::any_of(set.begin(), set.end(), [&](std::size_t i) { return modules.chosen(layer, i); });
      if (!said) open.units.push_back({layer, set});
    }
  }
  open.precisions = {ModulePrecision::int4};
  if (!vllm) open.precisions.push_back(ModulePrecision::fp8);
  return open;
}

PrecisionPlan plan_precisions(const WeightSource& source, QuantizeOptions& options, const PrecisionGoal& goal,
                              Progress& progress) {
  return Planner(source, options, goal, progress).run();
}

}  // namespace fireq::calib
