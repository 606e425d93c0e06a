// The plan of --target-size and --max-kl, as people and programs read it.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "apps/console.hpp"
#include "calib/plan.hpp"

namespace fireq::apps {

// The plan in reports and, so that the folder says why its linears are what they are, beside the tensors.
inline constexpr const char* kPrecisionPlanFile = "precision_plan.json";
nlohmann::json precision_plan_json(const calib::PrecisionPlan& plan);

// What was measured, the most sensitive first, and what comes of it.
void print_plan(const Report& report, const calib::PrecisionPlan& plan);

// The plan that a FireQ folder holds; nullopt when it holds none. Error(input) naming the key of a file that
// is something else.
std::optional<nlohmann::json> stored_plan(const std::string& folder);

}  // namespace fireq::apps
