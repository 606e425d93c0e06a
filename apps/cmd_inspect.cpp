#include <fmt/format.h>

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>

#include "apps/attribution.hpp"
#include "apps/commands.hpp"
#include "apps/html_report.hpp"
#include "apps/linear_check_json.hpp"
#include "apps/precision_plan.hpp"
#include "calib/folding.hpp"
#include "calib/inspect.hpp"
#include "calib/validate.hpp"
#include "common/error.hpp"
#include "formats/fireq_folder.hpp"
#include "libquant/levels.hpp"

namespace fireq::apps {
namespace {

struct Arguments {
  CommonOptions common;
  std::string target, html, reference;
  ComparisonText text;
  std::optional<std::uint64_t> layer;
  std::size_t outliers = 4;
};

void print_rows(const Report& report, const std::vector<calib::SiteRow>& rows, const char* kind,
                nlohmann::json& list) {
  report.line(fmt::format("{:>5}  {:<42} {:>10} {:>10} {:>9} {:>9}  top channels (x median)", "layer", kind,
                          "absmax", "rms", "max/rms", "kurtosis"));
  for (const calib::SiteRow& r : rows) {
    std::string top;
    nlohmann::json outliers = nlohmann::json::array();
    for (const auto& o : r.outliers) {
      top += fmt::format(" {} ({:.1f})", o.channel, o.ratio);
      outliers.push_back({{"channel", o.channel}, {"absmax", o.absmax}, {"ratio", o.ratio}});
    }
    report.line(fmt::format("{:>5}  {:<42} {:>10.4g} {:>10.4g} {:>9.1f} {:>9.1f} {}", r.layer, r.site,
                            r.summary.absmax, r.summary.rms, r.summary.max_over_rms, r.summary.kurtosis,
                            top));
    list.push_back({{"layer", r.layer},
                    {"site", r.site},
                    {"absmax", r.summary.absmax},
                    {"rms", r.summary.rms},
                    {"max_over_rms", r.summary.max_over_rms},
                    {"kurtosis", r.summary.kurtosis},
                    {"outliers", outliers}});
  }
}

void print_packed(const Report& report, const std::vector<calib::PackedRow>& rows, nlohmann::json& list) {
  report.line(fmt::format("{:>5}  {:<42} {:>9} {:>10} {:>10} {:>10}  share of each magnitude, %", "layer",
                          "linear", "subnormal", "min scale", "max scale", "max row"));
  for (const calib::PackedRow& r : rows) {
    double total = 0;
    for (const std::uint64_t n : r.index_count) total += static_cast<double>(n);
    std::string shares;
    for (const std::uint64_t n : r.index_count)
      shares += fmt::format(" {:.1f}", 100 * static_cast<double>(n) / total);
    report.line(fmt::format("{:>5}  {:<42} {:>7.2f} % {:>10.4g} {:>10.4g} {:>10.4g} {}", r.layer, r.name,
                            100 * r.subnormal_scales, r.smallest_scale, r.largest_scale, r.largest_row_scale,
                            shares));
    list.push_back({{"layer", r.layer},
                    {"name", r.name},
                    {"magnitude_counts", r.index_count},
                    {"scale_counts", r.scale_count},
                    {"absmax_histogram", r.absmax_histogram},
                    {"subnormal_scales", r.subnormal_scales},
                    {"subnormal_without_row_scale", r.subnormal_without_row_scale},
                    {"smallest_scale", r.smallest_scale},
                    {"largest_scale", r.largest_scale},
                    {"smallest_row_scale", r.smallest_row_scale},
                    {"largest_row_scale", r.largest_row_scale}});
  }
}

// Values in the profiles of a page: about 6 bytes each.
constexpr std::size_t kProfileBudget = 1'000'000;

// `profiles` is filled for a page only.
void inspect_file(const Arguments& a, const std::string& path, const calib::Recipe& recipe, bool qk_norm,
                  const Report& report, nlohmann::json& json, nlohmann::json& profiles) {
  const formats::CalibrationStatistics statistics = formats::read_statistics(path);
  report.line(fmt::format("{}: {} layers, {} tokens in {} windows", path, statistics.layers.size(),
                          statistics.meta.tokens, statistics.meta.windows));
  json["tokens"] = statistics.meta.tokens;
  json["windows"] = statistics.meta.windows;
  json["sites"] = nlohmann::json::array();
  print_rows(report, calib::inspect_statistics(statistics, recipe, qk_norm, a.outliers, a.layer), "site",
             json["sites"]);
  if (a.html.empty()) return;
  profiles =
      profiles_json(calib::channel_profiles(statistics, recipe, qk_norm, a.layer),
                    calib::key_channels_smoothed_by_s(statistics, recipe, qk_norm, a.layer), kProfileBudget);
}

// Each linear against the original, folded as the folder's recipe folds it.
void compare_with_reference(const Arguments& a, const calib::WeightSource& packed, const Report& report,
                            Progress& progress, nlohmann::json& json) {
  const auto reference = calib::open_weights(a.reference);
  if (reference->packed())
    throw Error(ErrorKind::usage, "the reference must be the original model").path(a.reference);
  calib::require_same_shape(packed.config(), reference->config(), a.reference);
  const auto folded = calib::fold_like(*reference, a.target, *packed.quantization());
  calib::ValidateOptions options;
  options.folded_reference = folded.get();
  options.threads = a.common.threads;
  json["reference"] = a.reference;
  json["reference_bytes"] = reference->reader().total_bytes();
  json["linears"] = nlohmann::json::array();
  for (const calib::LinearCheck& c : calib::validate_linears(packed, options, progress))
    json["linears"].push_back(check_json(c));
  if (!a.text.text.given()) return;
  const calib::Windows windows = comparison_windows(a.text, a.target, packed.config());
  const calib::Attribution costs = calib::attribute_costs(
      packed, *folded, *reference, windows,
      {.cache = packed.quantization()->kv_cache, .threads = a.common.threads}, progress);
  report.line("");
  print_attribution(report, costs);
  json["attribution"] = attribution_json(costs);
}

// How each linear, the embedding and the head are stored; those that are not in 4 bits are printed.
void list_modules(const Arguments& a, const calib::WeightSource& source, const Report& report,
                  nlohmann::json& json) {
  const formats::CheckpointReader& reader = source.reader();
  std::map<std::string, std::uint64_t> bytes;  // of a module's weight with its scales
  for (const std::string& name : reader.names()) {
    const std::string_view module = std::string_view(name).substr(0, name.rfind('.'));
    if (name.find(".weight", module.size()) == module.size())
      bytes[std::string(module)] += reader.tensor(name).data.size();
  }
  json["modules"] = nlohmann::json::array();
  const auto add = [&](const nlohmann::json& layer, const std::string& name,
                       formats::ModulePrecision precision) {
    if (precision != formats::ModulePrecision::int4) {
      report.line(fmt::format("{:>5}  {:<42} {}", layer.is_null() ? "" : layer.dump(), name,
                              calib::precision_name(precision)));
    }
    json["modules"].push_back({{"layer", layer},
                               {"name", name},
                               {"precision", calib::precision_name(precision)},
                               {"bytes", bytes[name]}});
  };
  for (std::uint64_t layer = 0; layer < source.config().layers; ++layer) {
    if (a.layer && *a.layer != layer) continue;
    const auto names = formats::linear_names(layer);
    for (std::size_t i = 0; i < names.size(); ++i) add(layer, names.at(i), source.precision(layer, i));
  }
  for (const char* const module : {formats::kEmbeddingModule, formats::kHeadModule}) {
    // A tied head has no tensor of its own.
    if (bytes.contains(module)) add(nullptr, module, module_precision(*source.quantization(), module));
  }
}

void inspect_packed_folder(const Arguments& a, const calib::WeightSource& source, const Report& report,
                           Progress& progress, nlohmann::json& json, nlohmann::json& profiles) {
  const formats::QuantizationConfig& q = *source.quantization();
  json["kind"] = "fireq";
  json["recipe"] = nlohmann::json::parse(q.recipe_json, nullptr, false);
  json["bytes"] = source.reader().total_bytes();
  json["tool_version"] = q.tool_version;
  json["levels"] = q.levels;
  json["row_scale"] = q.row_scale_per_row ? "row" : "tensor";
  json["layout"] = q.layout == formats::WeightLayout::row ? "row" : "sm90";
  json["source_fingerprint"] = q.source_fingerprint;
  json["calibration_fingerprint"] = q.calibration_fingerprint;
  json["packed"] = nlohmann::json::array();
  const char* const levels = q.levels_int4                                      ? "int4"
                             : q.levels == libquant::Levels::normal().magnitude ? "normal"
                                                                                : "own";
  report.line(fmt::format("{}: {} levels, {} scales, layout {}, {} of tensors, made by {}", a.target, levels,
                          q.row_scale_per_row ? "row" : "tensor",
                          q.layout == formats::WeightLayout::row ? "row" : "sm90",
                          bytes_text(source.reader().total_bytes()), q.tool_version));
  print_packed(report, calib::inspect_packed(source, a.layer, progress), json["packed"]);
  list_modules(a, source, report, json);
  if (std::optional<nlohmann::json> plan = stored_plan(a.target)) {
    report.line(
        fmt::format("{}: what --target-size or --max-kl measured (--html shows it)", kPrecisionPlanFile));
    json["plan"] = std::move(*plan);
  }
  if (const std::string path = a.target + "/calibration.h5"; std::filesystem::exists(path)) {
    report.line("");
    inspect_file(a, path, calib::parse_recipe(q.recipe_json, a.target + "/config.json"),
                 source.config().qk_norm, report, json, profiles);
  }
  if (!a.reference.empty()) compare_with_reference(a, source, report, progress, json);
}

int run(const Arguments& a) {
  ConsoleProgress progress(a.common.quiet);
  const Report report(a.common, progress);
  if (!a.html.empty() && !html_report_available()) html_report({}, {}, {});  // says why not, before the work
  nlohmann::json json = {{"target", a.target}}, profiles = nlohmann::json::object();
  const bool statistics = std::filesystem::is_regular_file(a.target);
  const auto source = statistics ? nullptr : calib::open_weights(a.target);
  if (!a.reference.empty() && (!source || !source->packed())) {
    throw Error(ErrorKind::usage, "--reference compares a FireQ folder with its original").path(a.target);
  }
  if (a.text.text.given() && a.reference.empty()) {
    throw Error(ErrorKind::usage, "--text compares with a reference").hint("add --reference HF_DIR");
  }
  // A page has what the tables have, and can be read.
  CommonOptions of_tables = a.common;
  of_tables.quiet = of_tables.quiet || !a.html.empty();
  const Report tables(of_tables, progress);
  if (statistics) {
    json["kind"] = "statistics";
    inspect_file(a, a.target, calib::preset_recipe("paper"), false, tables, json, profiles);
  } else if (source->packed()) {
    inspect_packed_folder(a, *source, tables, progress, json, profiles);
  } else {
    json["kind"] = "model";
    json["bytes"] = source->reader().total_bytes();
    if (const formats::Int4Scheme* scheme = source->imported()) {
      json["imported"] = {{"method", formats::int4_method(scheme->format)},
                          {"group_size", scheme->group_size}};
      tables.line(fmt::format("{}: quantised by {} to 4 bits, {}; what follows are its dequantised weights",
                              a.target, formats::int4_method(scheme->format),
                              scheme->group_size == 0 ? std::string("one group a row")
                                                      : fmt::format("groups of {}", scheme->group_size)));
    }
    json["weights"] = nlohmann::json::array();
    print_rows(tables, calib::inspect_weights(*source, a.outliers, a.layer, a.common.threads, progress),
               "linear (input channels)", json["weights"]);
  }
  if (!a.html.empty()) {
    formats::write_file_atomically(formats::real_file_system(), a.html,
                                   html_report("FireQ: " + a.target, report.whole(json), profiles));
    report.line(fmt::format("{}: written, opens in any browser", a.html));
  }
  report.json(json);
  return 0;
}

}  // namespace

void add_inspect(CLI::App& app, Runner& runner) {
  auto a = std::make_shared<Arguments>();
  CLI::App* cmd = app.add_subcommand(
      "inspect", "Outliers by layer and site: a model's weights, a statistics file, or a FireQ folder");
  cmd->add_option("target", a->target, "Hugging Face folder, FireQ folder, or statistics file")->required();
  cmd->add_option("--layer", a->layer, "Only this layer")->transform(whole_number(0, 1'000'000));
  cmd->add_option("--outliers", a->outliers, "Channels to name in each row")
      ->transform(whole_number(0, 64))
      ->capture_default_str();
  cmd->add_option("--html", a->html,
                  "Write the whole picture as one page that opens from disk, and print no tables")
      ->type_name("FILE");
  cmd->add_option("--reference", a->reference,
                  "Of a FireQ folder: the original model, to measure each linear's error")
      ->type_name("HF_DIR");
  add_comparison_text_options(*cmd, a->text);
  add_common_options(*cmd, a->common);
  cmd->footer(
      "With --reference and --text also what each part and each layer costs (as validate --attribute).\n"
      "Rows k_after_n and k_after_n_s show the keys as the recipe's N and S leave them.\n"
      "Examples:\n"
      "  fireq inspect model --layer 0\n"
      "  fireq inspect stats.h5 --json stats.json\n"
      "  fireq inspect out\n"
      "  fireq inspect out --reference model --text test.txt --max-tokens 4096 --html report.html");
  cmd->callback([a, &runner] { runner = [a] { return run(*a); }; });
}

}  // namespace fireq::apps
