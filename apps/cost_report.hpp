// What quantising may be expected to cost, from the project's own measurements, and what it was measured to
// cost.
#pragma once

#include <cstddef>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "apps/console.hpp"
#include "calib/quantize_job.hpp"
#include "calib/recipe.hpp"

namespace fireq::apps {

// Ranges over the models and calibration texts of docs/results.md, nats per token.
struct ExpectedCost {
  std::size_t models = 0, runs = 0;
  double delta_nll_low = 0, delta_nll_high = 0, kl_low = 0, kl_high = 0;
};

// None where the recipe is not a preset as it is: nothing was recorded for it.
std::optional<ExpectedCost> expected_cost(const calib::Recipe& recipe);
nlohmann::json expected_json(const std::optional<ExpectedCost>& cost, const calib::Recipe& recipe);
void print_expected(const Report& report, const std::optional<ExpectedCost>& cost,
                    const calib::Recipe& recipe);

nlohmann::json measured_json(const calib::QuantizeResult& result);
void print_measured(const Report& report, const calib::QuantizeResult& result, const std::string& why_not);

}  // namespace fireq::apps
