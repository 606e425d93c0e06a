#include "apps/attribution.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

namespace fireq::apps {
namespace {

nlohmann::json cost_json(const calib::Cost& c) {
  return {{"delta_nll", c.delta_nll}, {"kl", c.kl}};
}

nlohmann::json parts_json(const std::vector<calib::PartCost>& parts) {
  nlohmann::json list = nlohmann::json::array();
  for (const calib::PartCost& p : parts) {
    nlohmann::json entry = cost_json(p.alone);
    entry["part"] = p.part;
    if (p.without) entry["without"] = cost_json(*p.without);
    list.push_back(std::move(entry));
  }
  return list;
}

// Rows of a name and a cost, the largest KL first.
void print_sorted(const Report& report, const char* head,
                  std::vector<std::pair<std::string, calib::Cost>> rows) {
  std::stable_sort(rows.begin(), rows.end(),
                   [](const auto& x, const auto& y) { return x.second.kl > y.second.kl; });
  report.line(fmt::format("{:<26} {:>10} {:>10}", head, "delta nll", "KL"));
  for (const auto& [name, cost] : rows)
    report.line(fmt::format("{:<26} {:>+10.5f} {:>10.5f}", name, cost.delta_nll, cost.kl));
}

}  // namespace

void add_comparison_text_options(CLI::App& app, ComparisonText& arguments) {
  add_text_options(app, arguments.text);
  app.add_option("--max-tokens", arguments.max_tokens, "Tokens of the text to use")
      ->transform(whole_number(2, 1 << 30))
      ->capture_default_str();
  add_context_option(app, arguments.ctx);
  app.add_option("--bos", arguments.bos, "head, window or none")
      ->check(CLI::IsMember({"head", "window", "none"}));
}

calib::Windows comparison_windows(const ComparisonText& arguments, const std::string& folder,
                                  const formats::ModelConfig& config) {
  TokenizedText text = tokenize(arguments.text, folder, config);
  const std::uint64_t ctx =
      arguments.ctx.value_or(std::min({config.context, std::uint64_t{2048}, arguments.max_tokens}));
  if (text.ids.size() > arguments.max_tokens) text.ids.resize(arguments.max_tokens);
  return evaluation_windows(arguments.text, text, ctx, resolve_bos(arguments.bos, text));
}

nlohmann::json attribution_json(const calib::Attribution& a) {
  nlohmann::json layers = nlohmann::json::array();
  for (const calib::LayerCost& l : a.layers) {
    layers.push_back(cost_json(l.alone));
    layers.back()["layer"] = l.layer;
  }
  return {{"tokens", a.tokens},
          {"scored", a.scored},
          {"original_nll", a.original_nll},
          {"all", cost_json(a.all)},
          {"layers", layers},
          {"parts", parts_json(a.parts)},
          {"linears", parts_json(a.linears)}};
}

void print_attribution(const Report& report, const calib::Attribution& a) {
  report.line(fmt::format(
      "what it costs, against the original's nll of {:.5f} ({} tokens scored):", a.original_nll, a.scored));
  report.line(
      fmt::format("{:<26} {:>10} {:>10}   {:>10} {:>10}", "part", "alone: nll", "KL", "without: nll", "KL"));
  const auto line = [&](const std::string& name, const calib::Cost& alone,
                        const std::optional<calib::Cost>& without) {
    std::string text = fmt::format("{:<26} {:>+10.5f} {:>10.5f}", name, alone.delta_nll, alone.kl);
    if (without) text += fmt::format("   {:>+12.5f} {:>10.5f}", without->delta_nll, without->kl);
    report.line(text);
  };
  line("everything", a.all, std::nullopt);
  for (const calib::PartCost& p : a.parts) line(p.part, p.alone, p.without);
  report.line("");
  std::vector<std::pair<std::string, calib::Cost>> rows;
  for (const calib::PartCost& p : a.linears) rows.emplace_back(p.part, p.alone);
  print_sorted(report, "weights of all layers", rows);
  report.line("");
  rows.clear();
  for (const calib::LayerCost& l : a.layers) rows.emplace_back(fmt::format("layer {}", l.layer), l.alone);
  print_sorted(report, "weights of one layer", rows);
}

}  // namespace fireq::apps
