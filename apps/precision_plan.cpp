#include "apps/precision_plan.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "calib/modules.hpp"
#include "formats/folder_rules.hpp"
#include "formats/model_config_json.hpp"

namespace fireq::apps {
namespace {

constexpr std::uint64_t kLargestPlan = std::uint64_t{1} << 26U;

// A number, or null where it may lack.
void require_number(const formats::JsonFields& fields, const char* key, bool may_lack) {
  const nlohmann::json* value = fields.find(key);
  if (value == nullptr && may_lack) return;
  if (value == nullptr || !value->is_number()) fields.fail(key, "is not a number", "a number");
}

}  // namespace

nlohmann::json precision_plan_json(const calib::PrecisionPlan& plan) {
  nlohmann::json units = nlohmann::json::array();
  for (const calib::PlannedUnit& u : plan.units) {
    nlohmann::json kl = {{"int4", u.kl_int4}};
    nlohmann::json bytes = {{"int4", u.bytes_int4}, {"original", u.bytes_original}};
    if (u.kl_fp8) {
      kl["fp8"] = *u.kl_fp8;
      bytes["fp8"] = *u.bytes_fp8;
    }
    units.push_back({{"linears", u.linears},
                     {"kl", kl},
                     {"bytes", bytes},
                     {"precision", calib::precision_name(u.precision)}});
  }
  return {{"units", units}, {"tokens", plan.windows.ids.size()}, {"bytes", plan.bytes}, {"kl", plan.kl}};
}

void print_plan(const Report& report, const calib::PrecisionPlan& plan) {
  std::vector<const calib::PlannedUnit*> order;
  for (const calib::PlannedUnit& u : plan.units) order.push_back(&u);
  std::stable_sort(order.begin(), order.end(),
                   [](const auto* x, const auto* y) { return x->kl_int4 > y->kl_int4; });
  report.line(fmt::format("{:<8} {:>10} {:>10} {:>10}  linear", "kept in", "KL in int4", "in fp8", "bytes"));
  for (const calib::PlannedUnit* u : order) {
    const std::uint64_t bytes = u->precision == formats::ModulePrecision::int4  ? u->bytes_int4
                                : u->precision == formats::ModulePrecision::fp8 ? *u->bytes_fp8
                                                                                : u->bytes_original;
    report.line(fmt::format("{:<8} {:>10.3g} {:>10} {:>10}  {}{}", calib::precision_name(u->precision),
                            u->kl_int4, u->kl_fp8 ? fmt::format("{:.3g}", *u->kl_fp8) : "-",
                            bytes_text(bytes), u->linears.front(),
                            u->linears.size() > 1 ? fmt::format(" and {} more", u->linears.size() - 1) : ""));
  }
  report.line(fmt::format("plan: {}, KL {:.5f} on {} tokens (weights and FP8 inputs), measured in {}\n",
                          bytes_text(plan.bytes), plan.kl, plan.windows.ids.size(),
                          seconds_text(plan.seconds)));
}

std::optional<nlohmann::json> stored_plan(const std::string& folder) {
  const std::string path = folder + "/" + kPrecisionPlanFile;
  if (!formats::path_exists(path)) return std::nullopt;
  nlohmann::json plan =
      formats::parse_json(formats::read_text_inside_folder(folder, kPrecisionPlanFile, kLargestPlan), path);
  const formats::JsonFields fields(plan, path);
  for (const char* key : {"tokens", "bytes", "kl"}) require_number(fields, key, false);
  std::size_t index = 0;
  for (const nlohmann::json& unit : fields.array("units")) {
    const formats::JsonFields of(unit, path, "units[" + std::to_string(index++) + "].");
    of.text("precision");
    for (const nlohmann::json& name : of.array("linears")) {
      if (!name.is_string()) of.fail("linears", "is not a list of names", "names of linears");
    }
    for (const char* key : {"kl", "bytes"}) {
      const formats::JsonFields costs = of.object(key);
      require_number(costs, "int4", false);
      require_number(costs, "fp8", true);
      require_number(costs, "original", true);
    }
  }
  return plan;
}

}  // namespace fireq::apps
