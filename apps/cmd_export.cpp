#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "apps/commands.hpp"
#include "calib/export_job.hpp"
#include "common/error.hpp"

namespace fireq::apps {
namespace {

using calib::ExportFormat;
using Mode = formats::FireqWriter::Mode;

struct Arguments {
  CommonOptions common;
  std::string folder, out, format, dtype, shard_size = "5GB";
  bool requantize = false, resume = false, restart = false, force = false;
};

calib::ExportOptions options_of(const Arguments& a) {
  if (a.resume && a.restart) throw Error(ErrorKind::usage, "--resume and --restart exclude each other");
  calib::ExportOptions options;
  options.out = a.out;
  options.format =
      a.format == "hf-dequantized" ? ExportFormat::hf_dequantized : ExportFormat::compressed_tensors;
  const bool served = options.format == ExportFormat::compressed_tensors;
  if (served && !a.dtype.empty() && a.dtype != "bf16") {
    throw Error(ErrorKind::usage, "--dtype: vLLM runs W4AFP8 in bf16 only").expected("bf16").found(a.dtype);
  }
  if (!served && a.requantize) {
    throw Error(ErrorKind::usage, "--requantize belongs to --format compressed-tensors")
        .hint("hf-dequantized holds the folder's own values");
  }
  options.dtype = a.dtype == "f16" ? Dtype::f16 : a.dtype == "f32" ? Dtype::f32 : Dtype::bf16;
  options.requantize = a.requantize;
  options.mode = a.resume ? Mode::resume : a.restart ? Mode::restart : Mode::fresh;
  options.force = a.force;
  options.shard_size = parse_size(a.shard_size);
  options.threads = a.common.threads;
  options.tool_version = tool_version();
  return options;
}

calib::ExportResult run_export(const calib::WeightSource& packed, const calib::ExportOptions& options,
                               Progress& progress) {
  try {
    return calib::export_model(packed, options, formats::real_file_system(), progress);
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::interrupted) throw;
    throw Error(ErrorKind::interrupted, "interrupted; the finished layers are kept")
        .path(options.out)
        .hint("go on with --resume");
  }
}

int run(const Arguments& a) {
  ConsoleProgress progress(a.common.quiet);
  const calib::ExportOptions options = options_of(a);
  const auto packed = calib::open_weights(a.folder);
  const calib::ExportResult result = run_export(*packed, options, progress);

  const Report report(a.common, progress);
  const bool served = options.format == ExportFormat::compressed_tensors;
  nlohmann::json changed = nlohmann::json::array();
  double worst = 0;
  for (const auto& c : result.changed) {
    report.line(
        fmt::format("{:<40} vLLM changes {} rows, relative error {:.5f}", c.name, c.rows, c.relative_error));
    changed.push_back({{"name", c.name}, {"rows", c.rows}, {"rel_error", c.relative_error}});
    worst = std::max(worst, c.relative_error);
  }
  // With compressed-tensors these were warnings.
  if (!served) {
    for (const std::string& what : result.left_out) report.line("left out: " + what);
  }
  report.line(fmt::format("{}: {}, {} linears {}, {} -> {}, {}", a.out, a.format, result.linears,
                          served ? "in 4 bits" : "dequantised", bytes_text(result.bytes_before),
                          bytes_text(result.bytes_after), seconds_text(result.seconds)));
  if (result.resumed_layers > 0)
    report.line(fmt::format("resumed: {} layers were done already", result.resumed_layers));
  report.json({{"out", a.out},
               {"format", a.format},
               {"dtype", dtype_name(options.dtype)},
               {"linears", result.linears},
               {"plain", result.plain},
               {"changed", changed},
               {"max_rel_error", worst},
               {"left_out", result.left_out},
               {"bytes_before", result.bytes_before},
               {"bytes_after", result.bytes_after},
               {"resumed_layers", result.resumed_layers},
               {"seconds", result.seconds}});
  return 0;
}

}  // namespace

void add_export(CLI::App& app, Runner& runner) {
  auto a = std::make_shared<Arguments>();
  CLI::App* cmd =
      app.add_subcommand("export", "Turn a FireQ folder into a checkpoint that other programs load");
  cmd->add_option("folder", a->folder, "FireQ folder")->required();
  cmd->add_option("-o,--out", a->out, "Folder to write; it appears whole, at the end")->required();
  cmd->add_option("--format", a->format,
                  "compressed-tensors (4 bits, for vLLM), or hf-dequantized (plain weights, for any tool)")
      ->required()
      ->check(CLI::IsMember({"compressed-tensors", "hf-dequantized"}));
  cmd->add_option("--dtype", a->dtype, "hf-dequantized: type of the linears, bf16 (default), f16 or f32")
      ->check(CLI::IsMember({"bf16", "f16", "f32"}));
  cmd->add_flag("--requantize", a->requantize,
                "compressed-tensors: export scales that vLLM will change too, and print the loss");
  cmd->add_flag("--resume", a->resume, "Continue a run that was stopped");
  cmd->add_flag("--restart", a->restart, "Throw a stopped run away and start again");
  cmd->add_flag("--force", a->force, "Replace an existing output");
  cmd->add_option("--shard-size", a->shard_size, "Largest safetensors file, for example 5GB")
      ->capture_default_str();
  add_common_options(*cmd, a->common);
  cmd->footer(
      "Examples:\n"
      "  fireq quantize model -o out --for vllm --text calibration.txt\n"
      "  fireq export out --format compressed-tensors -o out-vllm\n"
      "  fireq export out --format hf-dequantized -o out-plain\n"
      "  fireq export out --format hf-dequantized --dtype f32 -o out-f32");
  cmd->callback([a, &runner] { runner = [a] { return run(*a); }; });
}

}  // namespace fireq::apps
