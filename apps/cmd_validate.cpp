#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "apps/attribution.hpp"
#include "apps/commands.hpp"
#include "apps/device.hpp"
#include "apps/linear_check_json.hpp"
#include "calib/evaluate.hpp"
#include "calib/folding.hpp"
#include "calib/recipe.hpp"
#include "calib/validate.hpp"
#include "common/error.hpp"
#include "formats/statistics.hpp"

namespace fireq::apps {
namespace {

struct Arguments {
  CommonOptions common;
  std::string model, reference;
  std::string device = "cpu";
  ComparisonText text;
  bool attribute = false;
  std::uint64_t seed = 0;
  double max_rel_error = 0.5, max_product_error = 1e-5, max_kl = 0, max_device_error = 2.6e-3;
};

// KL and agreement over the windows, everything the folder asks for switched on.
calib::EvaluationResult compare_on_text(const Arguments& a, const calib::WeightSource& model,
                                        const calib::WeightSource& reference, const calib::Windows& windows,
                                        Progress& progress) {
  calib::EvaluationOptions options;
  const bool cache = model.quantization()->kv_cache;
  options.precision = {
      .fp8_activations = true, .int4_k = cache, .int4_v = cache, .fp8_q = true, .fp8_p = true};
  options.threads = a.common.threads;
  options.reference = &reference;
  return calib::evaluate(model, windows, options, progress);
}

std::string check_line(const calib::LinearCheck& c) {
  std::string line = fmt::format("{:<40} {:>6} x {:<6}", c.name, c.rows, c.cols);
  if (c.precision != formats::ModulePrecision::int4) line += "  " + calib::precision_name(c.precision);
  if (c.relative_error && *c.relative_error == 0) {
    line += "  no error";
  } else if (c.relative_error) {
    line += fmt::format("  error {:.4f}  SNR {:5.2f} dB  worst group [{}, {}] {:.3f}", *c.relative_error,
                        *c.snr_db, c.worst_group->row, c.worst_group->group, c.worst_group->relative_error);
  }
  return line + fmt::format("  product {:.1e}", c.product_relative_error);
}

// The same linears on the GPU, worst first.
std::vector<calib::DeviceLinearCheck> check_on_device(const Arguments& a, const calib::WeightSource& model,
                                                      kernels::GpuSession& gpu, Progress& progress) {
  calib::DeviceCheckOptions options;
  options.seed = a.seed;
  options.threads = a.common.threads;
  options.tolerance = a.max_device_error;
  std::optional<formats::CalibrationStatistics> statistics;
  const std::string path = a.model + "/calibration.h5";
  if (std::filesystem::exists(path)) {
    statistics = formats::read_statistics(path);
    options.statistics = &*statistics;
  }
  const auto probe = make_probe(gpu);
  auto checks = calib::check_device_linears(model, *probe, options, progress);
  // Failures of any kind before errors within the limit; NaN counts as a failure.
  const auto rank = [](const calib::DeviceLinearCheck& c) {
    const auto& worst = c.worst_product();
    return std::pair(c.failures().size(),
                     std::isnan(worst.relative_error) ? HUGE_VAL : worst.relative_error / worst.limit);
  };
  std::stable_sort(checks.begin(), checks.end(),
                   [&](const auto& x, const auto& y) { return rank(x) > rank(y); });
  return checks;
}

std::string device_line(const calib::DeviceLinearCheck& c) {
  const auto& worst = c.worst_product();
  const auto failures = c.failures();
  return fmt::format(
      "{:<40} {:>6} x {:<6}  {}  product {:.2e} (M {}, {}, {})", c.name, c.rows, c.cols,
      failures.empty() ? "bits equal" : "FAILED: " + fmt::format("{}", fmt::join(failures, ", ")),
      worst.relative_error, worst.tokens, worst.activations, worst.kernel);
}

nlohmann::json device_check_json(const calib::DeviceLinearCheck& c) {
  nlohmann::json products = nlohmann::json::array();
  for (const auto& p : c.products) {
    nlohmann::json product = {{"tokens", p.tokens},
                              {"activations", p.activations},
                              {"kernel", p.kernel},
                              {"rel_error", nullptr},
                              {"limit", p.limit}};
    if (std::isfinite(p.relative_error)) product["rel_error"] = p.relative_error;
    products.push_back(std::move(product));
  }
  nlohmann::json operands = nlohmann::json::array();
  for (const auto& o : c.operands) {
    nlohmann::json kernel = {{"kernel", o.kernel}, {"wrong", o.wrong}};
    if (o.wrong != 0)
      kernel["first"] = {{"row", o.row}, {"col", o.col}, {"expected", o.expected}, {"found", o.found}};
    operands.push_back(std::move(kernel));
  }
  return {{"name", c.name},
          {"rows", c.rows},
          {"cols", c.cols},
          {"wrong_tile_bytes", c.wrong_tile_bytes},
          {"wrong_unpacked_bytes", c.wrong_unpacked_bytes},
          {"wrong_operands", c.wrong_operands()},
          {"wrong_token_values", c.wrong_token_values},
          {"unwritten_outputs", c.unwritten_outputs},
          {"outputs_that_vary", c.outputs_that_vary},
          {"operands", operands},
          {"products", products},
          {"failures", c.failures()}};
}

int run(const Arguments& a) {
  if (a.text.text.given() && a.reference.empty()) {
    throw Error(ErrorKind::usage, "--text compares with a reference").hint("add --reference HF_DIR");
  }
  if (a.attribute && !a.text.text.given()) {
    throw Error(ErrorKind::usage, "--attribute measures costs on a text").hint("add --text FILE");
  }
  ConsoleProgress progress(a.common.quiet);
  const auto model = calib::open_weights(a.model);
  if (!model->packed()) {
    throw Error(ErrorKind::usage, "not a FireQ folder").path(a.model).hint("make one with fireq quantize");
  }
  const auto gpu = open_device(a.device);
  std::unique_ptr<calib::WeightSource> reference;
  std::unique_ptr<calib::WeightSource> folded;
  if (!a.reference.empty()) {
    reference = calib::open_weights(a.reference);
    if (reference->packed())
      throw Error(ErrorKind::usage, "the reference must be the original model").path(a.reference);
    calib::require_same_shape(model->config(), reference->config(), a.reference);
    folded = calib::fold_like(*reference, a.model, *model->quantization());
  }
  calib::ValidateOptions options;
  options.folded_reference = folded.get();
  options.seed = a.seed;
  options.threads = a.common.threads;
  std::vector<calib::LinearCheck> checks = calib::validate_linears(*model, options, progress);
  std::stable_sort(checks.begin(), checks.end(), [](const auto& x, const auto& y) {
    return x.relative_error.value_or(x.product_relative_error) >
           y.relative_error.value_or(y.product_relative_error);
  });

  const Report report(a.common, progress);
  nlohmann::json linears = nlohmann::json::array();
  std::vector<std::string> failures;
  for (const calib::LinearCheck& c : checks) {
    report.line(check_line(c));
    linears.push_back(check_json(c));
    // Written so that NaN fails.
    if (!(c.product_relative_error <= a.max_product_error)) failures.push_back(c.name + ": product");
    if (c.relative_error && !(*c.relative_error <= a.max_rel_error))
      failures.push_back(c.name + ": relative error");
  }
  nlohmann::json json = {{"model", a.model}, {"structure", "ok"}, {"linears", linears}};
  if (a.text.text.given()) {
    const calib::Windows windows = comparison_windows(a.text, a.model, model->config());
    const calib::EvaluationResult r = compare_on_text(a, *model, *reference, windows, progress);
    report.line(
        fmt::format("KL mean {:.5f}, max {:.3f}; same top token {:.2f} %; perplexity {:.4f} ({} tokens)",
                    *r.kl_mean, *r.kl_max, 100 * *r.top1_agree, r.ppl, r.scored));
    json["kl_mean"] = *r.kl_mean;
    json["kl_max"] = *r.kl_max;
    json["top1_agree"] = *r.top1_agree;
    json["ppl"] = r.ppl;
    json["scored"] = r.scored;
    if (a.attribute) {
      const calib::Attribution costs = calib::attribute_costs(
          *model, *folded, *reference, windows,
          {.cache = model->quantization()->kv_cache, .threads = a.common.threads}, progress);
      print_attribution(report, costs);
      json["attribution"] = attribution_json(costs);
    }
    if (a.max_kl > 0 && !(*r.kl_mean <= a.max_kl)) failures.emplace_back("KL on the text");
  }
  json["device"] = device_json(gpu.get());
  if (gpu != nullptr) {
    report.line("on " + gpu->device().name + ":");
    nlohmann::json device_linears = nlohmann::json::array();
    for (const calib::DeviceLinearCheck& c : check_on_device(a, *model, *gpu, progress)) {
      report.line(device_line(c));
      device_linears.push_back(device_check_json(c));
      if (!c.failures().empty()) failures.push_back(c.name + ": " + c.failures().front() + " on the device");
    }
    json["device"]["linears"] = device_linears;
  }
  json["failures"] = failures;
  report.line(fmt::format("{}: {} linears, structure ok, {} out of tolerance", a.model, checks.size(),
                          failures.size()));
  report.json(json);
  if (failures.empty()) return 0;
  throw Error(ErrorKind::tolerance,
              fmt::format("{} checks out of tolerance, first: {}", failures.size(), failures.front()))
      .path(a.model);
}

}  // namespace

void add_validate(CLI::App& app, Runner& runner) {
  auto a = std::make_shared<Arguments>();
  CLI::App* cmd =
      app.add_subcommand("validate", "Check a FireQ folder: structure, each linear, and its product");
  cmd->add_option("model", a->model, "FireQ folder")->required();
  cmd->add_option("--reference", a->reference,
                  "Original model: errors of each linear are measured against it")
      ->type_name("HF_DIR");
  add_comparison_text_options(*cmd, a->text);
  cmd->add_flag(
      "--attribute", a->attribute,
      "What each part and each layer costs on the text: it is evaluated about 20 times and once per layer");
  cmd->add_option("--seed", a->seed, "Seed of the random activations")
      ->transform(whole_number())
      ->capture_default_str();
  cmd->add_option("--max-rel-error", a->max_rel_error, "Tolerance of a linear's relative error")
      ->capture_default_str();
  cmd->add_option("--max-product-error", a->max_product_error, "Tolerance of the product against FP64")
      ->capture_default_str();
  cmd->add_option("--max-device-error", a->max_device_error,
                  "Tolerance of a product on the device against FP64 (half as much again under 1024 outputs)")
      ->capture_default_str();
  cmd->add_option("--max-kl", a->max_kl, "Tolerance of the mean KL on the text (0: none)")
      ->capture_default_str();
  add_device_option(
      *cmd, a->device,
      "cuda: check on the GPU, too, that every linear's bytes, operands and products are right");
  add_common_options(*cmd, a->common);
  cmd->footer(
      "Exit code 3: a rule of the format is broken; 1: compared and out of tolerance.\n"
      "Examples:\n"
      "  fireq validate out\n"
      "  fireq validate out --reference model --text test.txt --max-kl 0.2\n"
      "  fireq validate out --reference model --text test.txt --max-tokens 4096 --attribute\n"
      "  fireq validate out --device cuda --json device.json");
  cmd->callback([a, &runner] { runner = [a] { return run(*a); }; });
}

}  // namespace fireq::apps
