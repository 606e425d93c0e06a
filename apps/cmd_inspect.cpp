#include <fmt/format.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "apps/commands.hpp"
#include "calib/inspect.hpp"
#include "common/error.hpp"
#include "formats/fireq_folder.hpp"

namespace fireq::apps {
namespace {

struct Arguments {
  CommonOptions common;
  std::string target;
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
                    {"subnormal_scales", r.subnormal_scales},
                    {"smallest_scale", r.smallest_scale},
                    {"largest_scale", r.largest_scale},
                    {"smallest_row_scale", r.smallest_row_scale},
                    {"largest_row_scale", r.largest_row_scale}});
  }
}

void inspect_file(const Arguments& a, const std::string& path, const calib::Recipe& recipe, bool qk_norm,
                  const Report& report, nlohmann::json& json) {
  const formats::CalibrationStatistics statistics = formats::read_statistics(path);
  report.line(fmt::format("{}: {} layers, {} tokens in {} windows", path, statistics.layers.size(),
                          statistics.meta.tokens, statistics.meta.windows));
  json["tokens"] = statistics.meta.tokens;
  json["windows"] = statistics.meta.windows;
  json["sites"] = nlohmann::json::array();
  print_rows(report, calib::inspect_statistics(statistics, recipe, qk_norm, a.outliers, a.layer), "site",
             json["sites"]);
}

int run(const Arguments& a) {
  ConsoleProgress progress(a.common.quiet);
  const Report report(a.common);
  nlohmann::json json = {{"target", a.target}};
  if (std::filesystem::is_regular_file(a.target)) {
    json["kind"] = "statistics";
    inspect_file(a, a.target, calib::preset_recipe("paper"), false, report, json);
    report.json(json);
    return 0;
  }
  const auto source = calib::open_weights(a.target);
  if (!source->packed()) {
    json["kind"] = "model";
    json["weights"] = nlohmann::json::array();
    print_rows(report, calib::inspect_weights(*source, a.outliers, a.layer, a.common.threads, progress),
               "linear (input channels)", json["weights"]);
    report.json(json);
    return 0;
  }
  const formats::QuantizationConfig& q = *source->quantization();
  json["kind"] = "fireq";
  json["recipe"] = nlohmann::json::parse(q.recipe_json, nullptr, false);
  json["packed"] = nlohmann::json::array();
  report.line(fmt::format("{}: {} levels, {} scales, layout {}, {} of tensors, made by {}", a.target,
                          q.levels_int4 ? "int4" : "own", q.row_scale_per_row ? "row" : "tensor",
                          q.layout == formats::WeightLayout::row ? "row" : "sm90",
                          bytes_text(source->reader().total_bytes()), q.tool_version));
  print_packed(report, calib::inspect_packed(*source, a.layer, progress), json["packed"]);
  if (const std::string path = a.target + "/calibration.h5"; std::filesystem::exists(path)) {
    report.line("");
    inspect_file(a, path, calib::parse_recipe(q.recipe_json, a.target + "/config.json"),
                 source->config().qk_norm, report, json);
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
  add_common_options(*cmd, a->common);
  cmd->footer(
      "Rows k_after_n and k_after_n_s show the keys as the recipe's N and S leave them.\n"
      "Examples:\n"
      "  fireq inspect model --layer 0\n"
      "  fireq inspect stats.h5 --json stats.json\n"
      "  fireq inspect out");
  cmd->callback([a, &runner] { runner = [a] { return run(*a); }; });
}

}  // namespace fireq::apps
