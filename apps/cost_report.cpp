#include "apps/cost_report.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>

namespace fireq::apps {
namespace {

struct Cost {
  double delta_nll = 0, kl = 0;
};
// A row of docs/results.md: with FP8 activations, and with the INT4 cache too.
struct RecordedCost {
  std::string_view preset, model;
  Cost without_cache, with_cache;
};

constexpr auto kRecorded = std::to_array<RecordedCost>({
#include "recorded_costs.inc"
});

}  // namespace

std::optional<ExpectedCost> expected_cost(const calib::Recipe& recipe) {
  calib::Recipe preset = calib::preset_recipe(recipe.preset);
  preset.kv_cache = recipe.kv_cache;
  if (calib::recipe_to_json(preset) != calib::recipe_to_json(recipe)) return std::nullopt;
  ExpectedCost out;
  std::set<std::string_view> models;
  for (const RecordedCost& row : kRecorded) {
    if (row.preset != recipe.preset) continue;
    const Cost& cost = recipe.kv_cache ? row.with_cache : row.without_cache;
    if (out.runs++ == 0) {
      out.delta_nll_low = out.delta_nll_high = cost.delta_nll;
      out.kl_low = out.kl_high = cost.kl;
    }
    out.delta_nll_low = std::min(out.delta_nll_low, cost.delta_nll);
    out.delta_nll_high = std::max(out.delta_nll_high, cost.delta_nll);
    out.kl_low = std::min(out.kl_low, cost.kl);
    out.kl_high = std::max(out.kl_high, cost.kl);
    models.insert(row.model);
  }
  out.models = models.size();
  return out.runs == 0 ? std::nullopt : std::optional(out);
}

nlohmann::json expected_json(const std::optional<ExpectedCost>& cost, const calib::Recipe& recipe) {
  if (!cost) return nullptr;
  return {{"preset", recipe.preset},
          {"source", "docs/results.md"},
          {"models", cost->models},
          {"runs", cost->runs},
          {"kv_cache", recipe.kv_cache},
          {"delta_nll", {cost->delta_nll_low, cost->delta_nll_high}},
          {"kl", {cost->kl_low, cost->kl_high}}};
}

nlohmann::json measured_json(const calib::QuantizeResult& result) {
  if (!result.measured) return nullptr;
  const formats::MeasuredCost& m = *result.measured;
  return {{"tokens", m.tokens},
          {"nll", m.nll},
          {"delta_nll", m.delta_nll},
          {"delta_nll_stderr", m.delta_nll_stderr},
          {"kl", m.kl},
          {"kl_stderr", m.kl_stderr},
          {"seconds", result.measuring_seconds}};
}

void print_expected(const Report& report, const std::optional<ExpectedCost>& cost,
                    const calib::Recipe& recipe) {
  if (!cost) {
    report.line("expected cost: none is recorded for this recipe (docs/results.md has the presets')");
    return;
  }
  report.line(
      fmt::format("expected cost: nll {:+.3f} to {:+.3f}, KL {:.3f} to {:.3f} per token{}: what preset {} "
                  "lost in {} runs on {} "
                  "models (docs/results.md)",
                  cost->delta_nll_low, cost->delta_nll_high, cost->kl_low, cost->kl_high,
                  recipe.kv_cache ? " with the INT4 cache" : "", recipe.preset, cost->runs, cost->models));
}

void print_measured(const Report& report, const calib::QuantizeResult& result, const std::string& why_not) {
  if (!result.measured) {
    report.line("cost not measured: " + why_not);
    return;
  }
  const formats::MeasuredCost& m = *result.measured;
  report.line(
      fmt::format("measured cost: nll {:+.4f} +- {:.4f} (from {:.4f}), KL {:.4f} +- {:.4f} per token, on {} "
                  "tokens held back from calibration, in {}",
                  m.delta_nll, m.delta_nll_stderr, m.nll - m.delta_nll, m.kl, m.kl_stderr, m.tokens,
                  seconds_text(result.measuring_seconds)));
}

}  // namespace fireq::apps
