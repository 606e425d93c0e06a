// What `fireq quantize --dry-run` prints: the plan, without a byte written.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>

#include "apps/console.hpp"
#include "calib/plan.hpp"
#include "calib/quantize_job.hpp"

namespace fireq::apps {

// `out`: what the JSON says beside the plan. Returns the exit code.
int dry_run(const Report& report, const calib::WeightSource& source, const calib::QuantizeOptions& options,
            const std::optional<calib::PrecisionPlan>& chosen, nlohmann::json out);

}  // namespace fireq::apps
