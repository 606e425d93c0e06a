#include <fmt/format.h>

#include <chrono>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>

#include "apps/commands.hpp"
#include "calib/evaluate.hpp"
#include "common/error.hpp"
#include "formats/statistics.hpp"

namespace fireq::apps {
namespace {

struct Arguments {
  CommonOptions common;
  std::string model, out;
  std::vector<std::string> merge;
  TextArguments text;
  CalibrationArguments calibration;
  bool force = false;
};

formats::CalibrationStatistics collect(const Arguments& a, std::optional<calib::TextFit>& fit,
                                       ConsoleProgress& progress) {
  if (!a.text.given()) throw Error(ErrorKind::usage, "no text given").hint("use --text FILE");
  const auto source = calib::open_weights(a.model);
  if (source->packed()) {
    throw Error(ErrorKind::usage, "statistics are collected on the original model, not on a FireQ folder")
        .path(a.model);
  }
  const TokenizedText text = tokenize(a.text, a.model, source->config());
  const calib::Windows windows =
      calibration_windows(a.text, text, a.calibration, source->config().context, progress);
  fit = check_text(a.text, *source, windows, a.common.threads, progress);
  formats::CalibrationStatistics statistics = calib::calibrate(*source, windows, a.common.threads, progress);
  statistics.meta.model_fingerprint = source->reader().fingerprint(a.common.threads);
  statistics.meta.text_fingerprint = calib::fingerprint_of_windows(windows);
  statistics.meta.seed = a.calibration.seed;
  return statistics;
}

formats::CalibrationStatistics merge(const std::vector<std::string>& files) {
  formats::CalibrationStatistics sum = formats::read_statistics(files.front());
  for (std::size_t i = 1; i < files.size(); ++i) {
    try {
      sum.merge(formats::read_statistics(files[i]));
    } catch (Error& e) {
      e.path_if_unset(files[i]);
      throw;
    }
  }
  return sum;
}

int run(const Arguments& a) {
  if (a.merge.empty() == a.model.empty()) {
    throw Error(ErrorKind::usage, "give a model with --text, or --merge with statistics files");
  }
  if (a.merge.size() == 1) throw Error(ErrorKind::usage, "--merge needs at least two files");
  if (!a.force && std::filesystem::exists(a.out)) {
    throw Error(ErrorKind::usage, "output exists").path(a.out).hint("choose another name or add --force");
  }
  ConsoleProgress progress(a.common.quiet);
  const auto begin = std::chrono::steady_clock::now();
  std::optional<calib::TextFit> fit;
  const formats::CalibrationStatistics statistics =
      a.merge.empty() ? collect(a, fit, progress) : merge(a.merge);
  formats::write_statistics(formats::real_file_system(), a.out, statistics);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const Report report(a.common, progress);
  report.line(fmt::format("{}: {} layers, {} tokens in {} windows, {}", a.out, statistics.layers.size(),
                          statistics.meta.tokens, statistics.meta.windows, seconds_text(seconds)));
  report.json({{"out", a.out},
               {"layers", statistics.layers.size()},
               {"tokens", statistics.meta.tokens},
               {"windows", statistics.meta.windows},
               {"model_fingerprint", statistics.meta.model_fingerprint},
               {"text_fingerprint", statistics.meta.text_fingerprint},
               {"text", fit ? text_json(*fit) : nlohmann::json(nullptr)},
               {"seconds", seconds}});
  return 0;
}

}  // namespace

void add_calibrate(CLI::App& app, Runner& runner) {
  auto a = std::make_shared<Arguments>();
  CLI::App* cmd = app.add_subcommand(
      "calibrate", "Collect activation statistics of a model over text, or merge statistics files");
  cmd->add_option("model", a->model, "Hugging Face folder");
  cmd->add_option("-o,--out", a->out, "Statistics file to write (HDF5)")->required();
  cmd->add_option("--merge", a->merge, "Merge these statistics files instead")
      ->type_name("FILE")
      ->expected(1, 1'000'000);
  add_text_options(*cmd, a->text);
  add_calibration_options(*cmd, a->calibration);
  cmd->add_flag("--force", a->force, "Replace an existing output");
  add_common_options(*cmd, a->common);
  cmd->footer(
      "Examples:\n"
      "  fireq calibrate model --text corpus.txt --samples 128 -o stats.h5\n"
      "  fireq calibrate --merge a.h5 b.h5 -o c.h5");
  cmd->callback([a, &runner] { runner = [a] { return run(*a); }; });
}

}  // namespace fireq::apps
