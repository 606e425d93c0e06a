#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "apps/commands.hpp"
#include "apps/cost_report.hpp"
#include "apps/dry_run.hpp"
#include "apps/precision_plan.hpp"
#include "apps/time_report.hpp"
#include "calib/plan.hpp"
#include "calib/quantize_job.hpp"
#include "calib/sensitivity.hpp"
#include "common/error.hpp"

namespace fireq::apps {
namespace {

struct Arguments {
  CommonOptions common;
  std::string model, out, preset, recipe_file, levels, target, stats, layout = "row", shard_size = "5GB";
  TextArguments text;
  CalibrationArguments calibration;
  std::vector<std::string> ignore;
  std::string target_size;
  std::optional<double> max_kl;
  bool resume = false, restart = false, force = false, dry_run = false, no_measure = false;
};

// Text serves the best preset; statistics alone serve `fast`.
std::string preset_of(const Arguments& a) {
  if (!a.preset.empty()) return a.preset;
  return a.text.given() ? "best" : "fast";
}

calib::Recipe levels_recipe(const Arguments& a) {
  const calib::Target target = a.target == "vllm" ? calib::Target::vllm : calib::Target::fireq;
  calib::Recipe recipe = a.recipe_file.empty() ? calib::preset_recipe(preset_of(a), target)
                                               : calib::parse_recipe(formats::read_text_file(a.recipe_file),
                                                                     a.recipe_file, target);
  if (!a.target.empty() && recipe.target != target) {
    throw Error(ErrorKind::usage, "--for and the recipe's key 'for' say different things")
        .path(a.recipe_file);
  }
  if (a.levels.empty()) return recipe;
  // --levels is a recipe key on the command line: a name, or a file with 8 magnitudes.
  const bool named = a.levels == "int4" || a.levels == "normal" || a.levels == "trained";
  nlohmann::json overlay = nlohmann::json::parse(calib::recipe_to_json(recipe));
  if (named) {
    overlay["weights"]["levels"] = a.levels;
  } else {
    const auto list = nlohmann::json::parse(formats::read_text_file(a.levels), nullptr, false);
    if (list.is_discarded()) {
      throw Error(ErrorKind::usage, "levels file is not JSON")
          .path(a.levels)
          .expected("a list of 8 increasing magnitudes");
    }
    overlay["weights"]["levels"] = list;
  }
  return calib::parse_recipe(overlay.dump(), named ? "--levels" : a.levels);
}

calib::Recipe recipe_of(const Arguments& a) {
  calib::Recipe recipe = levels_recipe(a);
  recipe.ignore.insert(recipe.ignore.end(), a.ignore.begin(), a.ignore.end());
  return recipe;
}

calib::PrecisionGoal goal_of(const Arguments& a) {
  calib::PrecisionGoal goal;
  if (!a.target_size.empty()) goal.size = parse_size(a.target_size);
  goal.kl = a.max_kl;
  return goal;
}

void obtain_text(const Arguments& a, const calib::WeightSource& source, calib::QuantizeOptions& options,
                 Progress& progress) {
  const bool choosing = goal_of(a).given();
  if (choosing && !a.text.given()) {
    throw Error(ErrorKind::usage, "--target-size and --max-kl measure on calibration text")
        .hint("give --text FILE");
  }
  const bool needed = options.recipe.needs_statistics() || options.recipe.needs_text() || choosing;
  if (!a.stats.empty()) {
    if (a.text.given()) throw Error(ErrorKind::usage, "--stats and --text exclude each other");
    if (options.recipe.needs_text()) {
      throw Error(ErrorKind::usage, "preset '" + options.recipe.preset + "' needs the text itself")
          .hint("give --text FILE; statistics alone do not hold what it needs");
    }
    options.statistics_path = a.stats;
  } else if (needed && !a.text.given()) {
    throw Error(ErrorKind::usage, "preset '" + options.recipe.preset + "' needs calibration text")
        .hint("give --text FILE or --stats FILE, or use --preset rtn");
  }
  if (!needed && !a.stats.empty()) {
    progress.warning("the recipe needs no calibration: the statistics are not used");
    options.statistics_path.reset();
  }
  if (!needed && a.text.given() && a.no_measure) {
    progress.warning("the recipe needs no calibration: the text is not used");
  }
  if (!a.text.given() || (!needed && a.no_measure)) return;
  const TokenizedText text = tokenize(a.text, a.model, source.config());
  const std::uint64_t context = source.config().context;
  calib::Windows windows;
  if (a.no_measure) {
    windows = calibration_windows(a.text, text, a.calibration, context, progress);
  } else {
    calib::SplitWindows split = split_calibration_windows(a.text, text, a.calibration, context, progress);
    windows = std::move(split.calibration);
    if (split.held_back.count > 0) options.held_back = std::move(split.held_back);
  }
  if (!needed) return;
  options.calibration = std::move(windows);
  options.seed = a.calibration.seed;
}

// Why nothing will be measured; empty when something will.
std::string unmeasured(const Arguments& a, const calib::QuantizeOptions& options) {
  if (options.held_back) return {};
  if (a.no_measure) return "--no-measure";
  if (!a.text.given()) return "no text was given";
  return "the text is too short to hold a window back: give more of it, or ask for shorter windows "
         "(--length)";
}

calib::QuantizeResult quantize(const calib::WeightSource& source, const calib::QuantizeOptions& options,
                               Progress& progress) {
  try {
    return calib::quantize_model(source, options, formats::real_file_system(), progress);
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::interrupted) throw;
    throw Error(ErrorKind::interrupted, "interrupted; the finished layers are kept")
        .path(options.out)
        .hint("go on with --resume");
  }
}

// Of the finished folder, on what the plan was measured on.
double result_kl(const Arguments& a, const calib::WeightSource& source, const calib::PrecisionPlan& plan,
                 const Report& report, Progress& progress) {
  const auto written = calib::open_weights(a.out);
  const double kl = calib::stored_kl(*written, source, plan.windows, a.common.threads);
  report.line(fmt::format("KL {:.5f} on the {} tokens of the plan", kl, plan.windows.ids.size()));
  if (a.max_kl && !(kl <= *a.max_kl)) {
    progress.warning(
        fmt::format("the KL is over --max-kl {}: the plan's, with weights rounded to the nearest, was {:.5f}",
                    *a.max_kl, plan.kl));
  }
  return kl;
}

int run(const Arguments& a) {
  if (a.resume && a.restart) throw Error(ErrorKind::usage, "--resume and --restart exclude each other");
  ConsoleProgress progress(a.common.quiet);
  calib::QuantizeOptions options;
  options.recipe = recipe_of(a);
  options.out = a.out;
  options.mode = a.resume    ? formats::FireqWriter::Mode::resume
                 : a.restart ? formats::FireqWriter::Mode::restart
                             : formats::FireqWriter::Mode::fresh;
  options.force = a.force;
  options.layout = a.layout == "sm90" ? formats::WeightLayout::sm90 : formats::WeightLayout::row;
  options.shard_size = parse_size(a.shard_size);
  options.threads = a.common.threads;
  options.tool_version = tool_version();
  const auto source = calib::open_weights(a.model);
  if (!a.dry_run) {
    formats::FireqWriter::refuse_early(formats::real_file_system(), a.out, a.model, options.mode, a.force);
  }
  if (const formats::Int4Scheme* scheme = source->imported()) {
    progress.warning(
        fmt::format("{} was quantised by {} to 4 bits: this adds a second error to its own; "
                    "start from the original model where there is one",
                    a.model, formats::int4_method(scheme->format)));
  }
  obtain_text(a, *source, options, progress);
  const Report report(a.common, progress);
  const calib::PrecisionGoal goal = goal_of(a);
  std::optional<calib::TimePlan> time;
  // A resumed run has less before it than the whole that is counted.
  if (!source->packed() && !a.resume && (!a.common.quiet || !a.common.json_path.empty())) {
    time = calib::plan_time(*source, options, goal);
    print_time(report, time);
  }
  std::optional<calib::TextFit> fit;
  if (options.calibration && !a.dry_run) {
    fit = check_text(a.text, *source, *options.calibration, a.common.threads, progress);
  }
  std::optional<calib::PrecisionPlan> plan;
  if (goal.given()) {
    plan = calib::plan_precisions(*source, options, goal, progress);
    options.recipe = plan->recipe;
    options.side_files.emplace_back(kPrecisionPlanFile, precision_plan_json(*plan).dump(2) + "\n");
    print_plan(report, *plan);
  }
  const std::optional<ExpectedCost> expected = expected_cost(options.recipe);
  print_expected(report, expected, options.recipe);
  if (a.dry_run) {
    return dry_run(
        report, *source, options, plan,
        {{"expected", expected_json(expected, options.recipe)}, {"expected_time", time_json(time)}});
  }

  const calib::QuantizeResult result = quantize(*source, options, progress);
  const double share =
      100.0 * static_cast<double>(result.bytes_after) / static_cast<double>(result.bytes_before);
  std::string linears = fmt::format("{} linears in 4 bits", result.linears);
  if (result.fp8_linears > 0) linears += fmt::format(", {} in FP8", result.fp8_linears);
  if (result.plain_linears > 0) linears += fmt::format(", {} as they were", result.plain_linears);
  report.line(fmt::format("{}: {}, {} -> {} ({:.1f} %), {}", a.out, linears, bytes_text(result.bytes_before),
                          bytes_text(result.bytes_after), share, seconds_text(result.seconds)));
  if (result.resumed_layers > 0)
    report.line(fmt::format("resumed: {} layers were done already", result.resumed_layers));
  if (result.clamped + result.zero_channels > 0) {
    report.line(fmt::format("smoothing: {} factors clamped, {} zero channels left alone", result.clamped,
                            result.zero_channels));
  }
  if (result.dead_channels > 0) {
    report.line(
        fmt::format("{} input channels were zero on all of the calibration text", result.dead_channels));
  }
  nlohmann::json chosen = nullptr;
  if (plan) {
    chosen = precision_plan_json(*plan);
    chosen["seconds"] = plan->seconds;
    chosen["result_kl"] = result_kl(a, *source, *plan, report, progress);
  }
  const std::string why_not = unmeasured(a, options);
  print_measured(report, result, why_not);
  report.json({{"out", a.out},
               {"plan", chosen},
               {"linears", result.linears},
               {"fp8_linears", result.fp8_linears},
               {"plain_linears", result.plain_linears},
               {"bytes_before", result.bytes_before},
               {"bytes_after", result.bytes_after},
               {"resumed_layers", result.resumed_layers},
               {"lambda_clamped", result.clamped},
               {"zero_channels", result.zero_channels},
               {"dead_channels", result.dead_channels},
               {"saturated_groups", result.saturated_groups},
               {"seconds", result.seconds},
               {"calibration_seconds", result.calibration_seconds},
               {"expected", expected_json(expected, options.recipe)},
               {"expected_time", time_json(time)},
               {"measured", measured_json(result)},
               {"not_measured", result.measured ? nlohmann::json(nullptr) : nlohmann::json(why_not)},
               {"text", fit ? text_json(*fit) : nlohmann::json(nullptr)},
               {"warnings", progress.warnings()},
               {"recipe", nlohmann::json::parse(calib::recipe_to_json(options.recipe))}});
  return 0;
}

}  // namespace

void add_quantize(CLI::App& app, Runner& runner) {
  auto a = std::make_shared<Arguments>();
  CLI::App* cmd = app.add_subcommand("quantize", "Turn a Hugging Face checkpoint into a FireQ folder");
  cmd->add_option("model", a->model, "Hugging Face folder (config.json, safetensors, tokenizer)")->required();
  cmd->add_option("-o,--out", a->out, "Folder to write; it appears whole, at the end")->required();
  auto* preset = cmd->add_option("--preset", a->preset,
                                 "rtn (no text), paper, fast, or best; default: best with --text, else fast")
                     ->check(CLI::IsMember({"rtn", "paper", "fast", "best"}));
  cmd->add_option("--recipe", a->recipe_file, "Recipe as JSON (docs/recipes.md)")
      ->type_name("FILE")
      ->excludes(preset);
  cmd->add_option("--levels", a->levels,
                  "int4, normal, trained, or a file with 8 increasing magnitudes; default: the recipe's");
  cmd->add_option("--for", a->target,
                  "fireq, or vllm: keep to what vLLM runs from an export (docs/export.md)")
      ->check(CLI::IsMember({"fireq", "vllm"}));
  cmd->add_option("--ignore", a->ignore,
                  "Modules to leave in their own type: globs, or re: and a regular expression")
      ->type_name("PATTERN");
  auto* size = cmd->add_option("--target-size", a->target_size,
                               "Keep the most sensitive linears in FP8 or their own type, up to this size");
  cmd->add_option("--max-kl", a->max_kl, "The same, until the KL on calibration text is at most this")
      ->check(CLI::PositiveNumber)
      ->excludes(size);
  add_text_options(*cmd, a->text);
  add_calibration_options(*cmd, a->calibration);
  cmd->add_option("--stats", a->stats, "Statistics of fireq calibrate instead of text")->type_name("FILE");
  cmd->add_flag("--no-measure", a->no_measure,
                "Do not measure what the result costs, and hold no text back for it");
  cmd->add_flag("--resume", a->resume, "Continue a run that was stopped");
  cmd->add_flag("--restart", a->restart, "Throw a stopped run away and start again");
  cmd->add_flag("--force", a->force, "Replace an existing output");
  cmd->add_flag("--dry-run", a->dry_run, "Print expected time, sizes, plan and peak memory; write nothing");
  cmd->add_option("--layout", a->layout, "row, or sm90 (the tiles of the Hopper kernels)")
      ->check(CLI::IsMember({"row", "sm90"}))
      ->capture_default_str();
  cmd->add_option("--shard-size", a->shard_size, "Largest safetensors file, for example 5GB")
      ->capture_default_str();
  add_common_options(*cmd, a->common);
  cmd->footer(
      "Examples:\n"
      "  fireq quantize Llama-3.2-1B -o Llama-3.2-1B-fireq --text calibration.txt\n"
      "  fireq quantize model -o out --preset fast --text t.txt        (seconds instead of minutes)\n"
      "  fireq quantize model -o out --preset rtn\n"
      "  fireq quantize model -o out --preset paper --text corpus/ --samples 128 --length 2048 --seed 1\n"
      "  fireq quantize model -o out --for vllm --text t.txt\n"
      "  fireq quantize model -o out --preset rtn --ignore 'model.layers.0.*' 're:.*down_proj$'\n"
      "  fireq quantize model -o out --text t.txt --dry-run");
  cmd->callback([a, &runner] { runner = [a] { return run(*a); }; });
}

}  // namespace fireq::apps
