// What time a run is expected to take, as printed before it begins.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>

#include "apps/console.hpp"
#include "calib/time_plan.hpp"

namespace fireq::apps {

void print_time(const Report& report, const std::optional<calib::TimePlan>& plan);
nlohmann::json time_json(const std::optional<calib::TimePlan>& plan);

}  // namespace fireq::apps
