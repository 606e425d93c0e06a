#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

#include "apps/commands.hpp"
#include "calib/diff.hpp"
#include "common/error.hpp"
#include "formats/folder_rules.hpp"

namespace fireq::apps {
namespace {

using nlohmann::json;

struct Arguments {
  CommonOptions common;
  std::string a, b;
  std::size_t top = 20;
  bool exit_code = false;
};

constexpr std::uint64_t kLargestConfig = std::uint64_t{1} << 24U;
constexpr const char* kRecipe = "/quantization_config/recipe/";

// config.json as pointer -> value: objects are entered, lists are values.
void flatten(const json& value, const std::string& path, std::map<std::string, json>& out) {
  if (!value.is_object() || value.empty()) {
    out[path] = value;
    return;
  }
  for (const auto& item : value.items()) flatten(item.value(), path + "/" + item.key(), out);
}

// A model's config.json is parsed before this, so it is JSON.
std::map<std::string, json> config_of(const std::string& folder) {
  std::map<std::string, json> out;
  flatten(json::parse(formats::read_text_inside_folder(folder, "config.json", kLargestConfig)), "", out);
  return out;
}

std::string dotted(std::string path) {
  std::replace(path.begin(), path.end(), '/', '.');
  return path;
}

// Keys whose values differ, those of the recipe apart; null where a folder lacks one.
void compare_keys(const Arguments& a, json& recipe, json& metadata) {
  const auto left = config_of(a.a), right = config_of(a.b);
  std::map<std::string, std::pair<json, json>> all;
  for (const auto& [key, value] : left) all[key].first = value;
  for (const auto& [key, value] : right) all[key].second = value;
  for (const auto& [key, values] : all) {
    if (values.first == values.second) continue;
    const bool of_recipe = key.starts_with(kRecipe);
    (of_recipe ? recipe : metadata)
        .push_back({{"key", dotted(key.substr(of_recipe ? std::string_view(kRecipe).size() : 1))},
                    {"a", values.first},
                    {"b", values.second}});
  }
}

void print_keys(const Report& report, const char* title, const json& keys) {
  if (keys.empty()) return;
  // One folder has all of them: a list would only repeat it.
  constexpr std::size_t kMany = 8;
  const auto lacks_all = [&](const char* side) {
    return keys.size() > kMany &&
           std::all_of(keys.begin(), keys.end(), [&](const json& k) { return k[side].is_null(); });
  };
  if (lacks_all("a") || lacks_all("b")) {
    report.line(fmt::format("{}: only {} has these {} keys (--json)", title, lacks_all("a") ? "B" : "A",
                            keys.size()));
    return;
  }
  report.line(title);
  for (const json& k : keys) {
    const auto text = [](const json& value) {
      const std::string dump =
          value.is_null() ? "-" : value.dump(-1, ' ', false, json::error_handler_t::replace);
      constexpr std::size_t kMost = 60;
      return dump.size() > kMost ? dump.substr(0, kMost - 3) + "..." : dump;
    };
    report.line(fmt::format("  {:<44} {} -> {}", k["key"].get<std::string>(), text(k["a"]), text(k["b"])));
  }
}

json sizes_json(const calib::SizeByKind& s) {
  return {{"embedding", s.embedding},
          {"head", s.head},
          {"linears", s.linears},
          {"norms", s.norms},
          {"other", s.other}};
}

void print_sizes(const Report& report, const json& a, const json& b) {
  report.line(fmt::format("{:<12} {:>12} {:>12}", "size of", "A", "B"));
  for (const char* kind : {"linears", "embedding", "head", "norms", "other"}) {
    const std::uint64_t x = a[kind], y = b[kind];
    if (x + y > 0) report.line(fmt::format("  {:<10} {:>12} {:>12}", kind, bytes_text(x), bytes_text(y)));
  }
}

// A table's head: all of it when short.
template <typename List, typename Line>
void print_top(const Report& report, const List& list, std::size_t top, const Line& line) {
  std::size_t shown = 0;
  for (const auto& row : list) {
    if (row.relative == 0 || shown == top) break;
    report.line(line(row));
    ++shown;
  }
  const auto differ = static_cast<std::size_t>(
      std::count_if(list.begin(), list.end(), [](const auto& row) { return row.relative != 0; }));
  if (differ > shown) report.line(fmt::format("  and {} more (--top, --json)", differ - shown));
  if (differ < list.size()) report.line(fmt::format("  {} equal", list.size() - differ));
}

void print_weights(const Report& report, const calib::FolderDifference& d, std::size_t top) {
  report.line(d.same_folds
                  ? "weights, |B - A| / |A|"
                  : "weights as stored, |B - A| / |A|; the folds differ, so compare the products below");
  print_top(report, d.linears, top, [](const calib::LinearDifference& l) {
    return fmt::format("  {:<44} {:>6} x {:<6} {:.3g}", l.name, l.rows, l.cols, l.relative);
  });
  report.line("products that folds cancel in, |B - A| / |A|");
  print_top(report, d.products, top, [](const calib::ProductDifference& p) {
    return fmt::format("  layer {:<4} {:<10} {:.3g}", p.layer, p.name, p.relative);
  });
  if (!d.tensors.empty()) report.line("other tensors that differ");
  for (const calib::TensorDifference& t : d.tensors) {
    std::string line = fmt::format("  {:<52} {}", t.name,
                                   t.a.empty()   ? "only in B, " + t.b
                                   : t.b.empty() ? "only in A, " + t.a
                                   : t.a == t.b  ? t.a
                                                 : t.a + " -> " + t.b);
    if (t.relative) line += fmt::format(", {:.3g}", *t.relative);
    report.line(line);
  }
}

void weights_json(const calib::FolderDifference& d, json& out) {
  out["same_folds"] = d.same_folds;
  out["linears"] = json::array();
  for (const auto& l : d.linears)
    out["linears"].push_back(
        {{"name", l.name}, {"rows", l.rows}, {"cols", l.cols}, {"relative", l.relative}, {"equal", l.equal}});
  out["products"] = json::array();
  for (const auto& p : d.products)
    out["products"].push_back({{"layer", p.layer}, {"name", p.name}, {"relative", p.relative}});
  out["tensors"] = json::array();
  for (const auto& t : d.tensors) {
    json relative = nullptr, a = nullptr, b = nullptr;
    if (t.relative && std::isfinite(*t.relative)) relative = *t.relative;
    if (!t.a.empty()) a = t.a;
    if (!t.b.empty()) b = t.b;
    out["tensors"].push_back({{"name", t.name}, {"a", a}, {"b", b}, {"relative", relative}});
  }
}

int run(const Arguments& a) {
  ConsoleProgress progress(a.common.quiet);
  const auto left = calib::open_weights(a.a), right = calib::open_weights(a.b);
  const calib::FolderDifference difference =
      calib::compare_folders(*left, *right, a.common.threads, progress);
  json out = {{"a", a.a}, {"b", a.b}, {"recipe", json::array()}, {"metadata", json::array()}};
  compare_keys(a, out["recipe"], out["metadata"]);
  out["bytes"] = {{"a", sizes_json(calib::size_by_kind(*left))},
                  {"b", sizes_json(calib::size_by_kind(*right))}};
  weights_json(difference, out);
  const bool differ = !out["recipe"].empty() || !out["metadata"].empty() || !difference.tensors.empty() ||
                      std::any_of(difference.linears.begin(), difference.linears.end(),
                                  [](const auto& l) { return !l.equal; });
  out["differ"] = differ;

  const Report report(a.common, progress);
  report.line(fmt::format("A: {}\nB: {}", a.a, a.b));
  print_keys(report, "recipe", out["recipe"]);
  print_keys(report, "config.json", out["metadata"]);
  print_sizes(report, out["bytes"]["a"], out["bytes"]["b"]);
  print_weights(report, difference, a.top);
  report.line(differ ? "the folders differ" : "no difference");
  report.json(out);
  return a.exit_code && differ ? static_cast<int>(ErrorKind::tolerance) : 0;
}

}  // namespace

void add_diff(CLI::App& app, Runner& runner) {
  auto a = std::make_shared<Arguments>();
  CLI::App* cmd = app.add_subcommand(
      "diff", "Compare two folders of one model: recipe, sizes, and each linear's weights");
  cmd->add_option("a", a->a, "FireQ or Hugging Face folder: what differences are relative to")->required();
  cmd->add_option("b", a->b, "FireQ or Hugging Face folder")->required();
  cmd->add_option("--top", a->top, "Rows of each table to print, worst first")
      ->transform(whole_number(0, 1'000'000))
      ->capture_default_str();
  cmd->add_flag("--exit-code", a->exit_code, "Exit code 1 when anything differs, as of git diff");
  add_common_options(*cmd, a->common);
  cmd->footer(
      "Weights with different smoothing folded in differ without meaning much: see docs/diff.md.\n"
      "Examples:\n"
      "  fireq diff OUT OUT2\n"
      "  fireq diff MODEL OUT --json diff.json\n"
      "  fireq diff OUT OUT2 --exit-code --quiet");
  cmd->callback([a, &runner] { runner = [a] { return run(*a); }; });
}

}  // namespace fireq::apps
