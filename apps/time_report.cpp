#include "apps/time_report.hpp"

#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <string>

namespace fireq::apps {
namespace {

// Two digits: more would promise more than a rate of one layer can say.
std::string about(double seconds) {
  if (seconds < 1) return "less than 1 s";
  const double step = std::pow(10.0, std::floor(std::log10(seconds)) - 1);
  const auto whole =
      static_cast<std::uint64_t>(std::llround(step < 1 ? seconds : std::round(seconds / step) * step));
  if (whole < 60) return fmt::format("{} s", whole);
  if (whole < 600) return fmt::format("{} min {} s", whole / 60, whole % 60);
  if (whole < 3600) return fmt::format("{} min", (whole + 30) / 60);
  if (whole >= 36000) return fmt::format("{} h", (whole + 1800) / 3600);
  return fmt::format("{} h {} min", whole / 3600, whole % 3600 / 60);
}

}  // namespace

void print_time(const Report& report, const std::optional<calib::TimePlan>& plan) {
  if (!plan || plan->stages.empty()) return;
  std::string parts;
  for (const calib::StageTime& stage : plan->stages) {
    if (stage.seconds < 1) continue;
    parts += fmt::format("{} {} {}", parts.empty() ? ":" : ",", stage.stage, about(stage.seconds));
  }
  report.line(fmt::format("expected time: {}{}{} (by the speed of the first layer, here and now)",
                          plan->total() < 1 ? "" : "about ", about(plan->total()), parts));
}

nlohmann::json time_json(const std::optional<calib::TimePlan>& plan) {
  if (!plan) return nullptr;
  nlohmann::json stages = nlohmann::json::array();
  for (const calib::StageTime& stage : plan->stages) {
    stages.push_back({{"stage", stage.stage}, {"seconds", stage.seconds}});
  }
  return {{"seconds", plan->total()}, {"stages", stages}, {"measured_in", plan->measuring}};
}

}  // namespace fireq::apps
