#include "apps/dry_run.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include "apps/precision_plan.hpp"
#include "calib/recipe.hpp"

namespace fireq::apps {
namespace {

// A name with its layer's number taken out, and the number; those outside the layers as they are.
struct Place {
  std::string before, after;
  std::optional<std::uint64_t> layer;
};
Place place_of(const std::string& name) {
  static const std::string kLayers = "model.layers.";
  if (!name.starts_with(kLayers)) return {name, {}, {}};
  std::uint64_t layer = 0;
  const char* const last = name.data() + name.size();
  const auto [end, code] = std::from_chars(name.data() + kLayers.size(), last, layer);
  if (code != std::errc() || end == last || *end != '.') return {name, {}, {}};
  return {kLayers, std::string(end, last), layer};
}

// Numbers as ranges: "0-3,5".
std::string ranges(std::vector<std::uint64_t> numbers) {
  std::sort(numbers.begin(), numbers.end());
  std::string text;
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    const std::size_t first = i;
    while (i + 1 < numbers.size() && numbers[i + 1] == numbers[i] + 1) ++i;
    text += fmt::format("{}{}", text.empty() ? "" : ",", numbers[first]);
    if (i > first) text += fmt::format("-{}", numbers[i]);
  }
  return text;
}

// Things that are alike but for their layer, in the order in which they first come.
template <class Key, class Item>
class Groups {
 public:
  std::vector<const Item*>& of(const Key& key) {
    const auto [at, added] = index_.try_emplace(key, groups_.size());
    if (added) groups_.emplace_back();
    return groups_[at->second];
  }
  const std::vector<std::vector<const Item*>>& all() const noexcept { return groups_; }

 private:
  std::map<Key, std::size_t> index_;
  std::vector<std::vector<const Item*>> groups_;
};

template <class Item, class NameOf>
std::string name_of_all(const std::vector<const Item*>& group, const NameOf& name_of) {
  const Place first = place_of(name_of(*group.front()));
  if (!first.layer) return first.before;
  std::vector<std::uint64_t> layers;
  layers.reserve(group.size());
  for (const Item* item : group) layers.push_back(*place_of(name_of(*item)).layer);
  return first.before + ranges(std::move(layers)) + first.after;
}

void print_linears(const Report& report, const calib::QuantizePlan& plan) {
  Groups<std::tuple<std::string, std::uint64_t, std::uint64_t, std::string, std::uint64_t, std::uint64_t>,
         calib::LinearPlan>
      groups;
  for (const calib::LinearPlan& l : plan.linears) {
    groups
        .of({place_of(l.name).after, l.rows, l.cols, calib::precision_name(l.precision), l.bytes_before,
             l.bytes_after})
        .push_back(&l);
  }
  for (const auto& group : groups.all()) {
    const calib::LinearPlan& l = *group.front();
    const std::string name = name_of_all(group, [](const calib::LinearPlan& p) { return p.name; });
    report.line(fmt::format("{:<44} {:>6} x {:<6} {:<8} {:>10} -> {}", name, l.rows, l.cols,
                            calib::precision_name(l.precision), bytes_text(group.size() * l.bytes_before),
                            bytes_text(group.size() * l.bytes_after)));
  }
}

void print_kept(const Report& report, const calib::QuantizePlan& plan) {
  using Kept = std::pair<std::string, std::string>;
  Groups<Kept, Kept> groups;
  for (const Kept& kept : plan.kept) {
    const Place place = place_of(kept.first);
    groups.of({place.layer ? place.after : place.before, kept.second}).push_back(&kept);
  }
  for (const auto& group : groups.all()) {
    const std::string& why = group.front()->second;
    report.line(fmt::format("{:<44} {}: {}", name_of_all(group, [](const Kept& k) { return k.first; }),
                            why.ends_with("in FP8") ? "quantised" : "not quantised", why));
  }
}

nlohmann::json plan_json(const calib::QuantizePlan& plan) {
  nlohmann::json linears = nlohmann::json::array();
  for (const auto& l : plan.linears) {
    linears.push_back({{"name", l.name},
                       {"rows", l.rows},
                       {"cols", l.cols},
                       {"precision", calib::precision_name(l.precision)},
                       {"bytes_before", l.bytes_before},
                       {"bytes_after", l.bytes_after}});
  }
  nlohmann::json kept = nlohmann::json::array();
  for (const auto& [name, why] : plan.kept) kept.push_back({{"name", name}, {"why", why}});
  return {{"linears", linears},
          {"kept", kept},
          {"bytes_before", plan.bytes_before},
          {"bytes_after", plan.bytes_after},
          {"peak_memory", plan.peak_memory},
          {"largest_layer_fp32", plan.largest_layer_fp32},
          {"calibration_bytes", plan.calibration_bytes}};
}

}  // namespace

int dry_run(const Report& report, const calib::WeightSource& source, const calib::QuantizeOptions& options,
            const std::optional<calib::PrecisionPlan>& chosen, nlohmann::json out) {
  const calib::QuantizePlan plan = calib::plan_quantization(source, options);
  if (options.statistics_path) {
    calib::statistics_of_model(*options.statistics_path, source.config(),
                               source.reader().fingerprint(options.threads));
  }
  print_linears(report, plan);
  print_kept(report, plan);
  report.line(
      fmt::format("\nsize {} -> {} ({:.1f} %)", bytes_text(plan.bytes_before), bytes_text(plan.bytes_after),
                  100.0 * static_cast<double>(plan.bytes_after) / static_cast<double>(plan.bytes_before)));
  report.line(fmt::format("peak memory at most {} (largest layer in FP32 {}, calibration activations {})",
                          bytes_text(plan.peak_memory), bytes_text(plan.largest_layer_fp32),
                          bytes_text(plan.calibration_bytes)));
  if (chosen) {
    report.line(fmt::format("choosing precisions: peak memory at most {}, {} this time, and as long in a run",
                            bytes_text(chosen->memory), seconds_text(chosen->seconds)));
  }
  report.line("nothing was written");
  out.update(plan_json(plan));
  out["dry_run"] = true;
  if (chosen) {
    out["plan"] = precision_plan_json(*chosen);
    out["plan"]["seconds"] = chosen->seconds;
    out["plan"]["peak_memory"] = chosen->memory;
  }
  out["recipe"] = nlohmann::json::parse(calib::recipe_to_json(options.recipe));
  report.json(out);
  return 0;
}

}  // namespace fireq::apps
