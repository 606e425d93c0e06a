#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "apps/commands.hpp"
#include "apps/device.hpp"
#include "apps/tasks.hpp"
#include "calib/evaluate.hpp"
#include "calib/folding.hpp"
#include "common/error.hpp"

namespace fireq::apps {
namespace {

struct Arguments {
  CommonOptions common;
  std::string model, reference, bos, weights, activations, kv, k, v, qp;
  std::string device = "cpu";
  TextArguments text;
  std::vector<std::string> tasks;
  std::optional<std::uint64_t> ctx;
};

// Each part follows its own option, else --kv for K and V, else the folder: a FireQ folder runs all that it
// asks for.
calib::Precision precision_of(const Arguments& a, const calib::WeightSource& model) {
  const bool packed = model.packed();
  const bool cache = packed && model.quantization()->kv_cache;
  const auto choose = [](const std::string& option, const char* on, bool otherwise) {
    return option.empty() ? otherwise : option == on;
  };
  const bool kv = choose(a.kv, "int4", cache);
  const bool qp = choose(a.qp, "fp8", packed);
  return {.fp8_activations = choose(a.activations, "fp8", packed),
          .int4_k = choose(a.k, "int4", kv),
          .int4_v = choose(a.v, "int4", kv),
          .fp8_q = qp,
          .fp8_p = qp};
}

nlohmann::json precision_json(const calib::Precision& p, bool packed_weights) {
  return {{"weights", packed_weights ? "packed" : "original"},
          {"activations", p.fp8_activations ? "fp8" : "fp"},
          {"k", p.int4_k ? "int4" : "fp"},
          {"v", p.int4_v ? "int4" : "fp"},
          {"q", p.fp8_q ? "fp8" : "fp"},
          {"p", p.fp8_p ? "fp8" : "fp"}};
}

// The kernels multiply packed operands with FP8 activations and nothing else.
void check_device(const Arguments& a, const calib::WeightSource& model) {
  if (a.device == "cpu") return;
  if (!model.packed()) {
    throw Error(ErrorKind::usage, "--device " + a.device + " needs a FireQ folder")
        .path(a.model)
        .hint("make one with fireq quantize");
  }
  if (a.weights == "original" || a.activations == "fp") {
    throw Error(ErrorKind::usage, "--device " + a.device + " runs packed weights with FP8 activations")
        .hint("leave out --weights original and --activations fp, or stay on the CPU");
  }
}

int run(const Arguments& a) {
  if (!a.text.given() && a.tasks.empty())
    throw Error(ErrorKind::usage, "no text given").hint("use --text FILE, --tokens ids.u32 or --tasks FILE");
  if (a.text.given() && !a.tasks.empty())
    throw Error(ErrorKind::usage, "--tasks and a text exclude each other").hint("run eval once for each");
  if (a.device != "cpu" && !a.tasks.empty())
    throw Error(ErrorKind::usage, "--tasks run on the CPU").hint("leave out --device " + a.device);
  ConsoleProgress progress(a.common.quiet);
  const auto model = calib::open_weights(a.model);
  if (!model->packed() && a.weights == "packed") {
    throw Error(ErrorKind::usage, "--weights packed needs a FireQ folder").path(a.model);
  }
  check_device(a, *model);
  const auto gpu = open_device(a.device);
  std::unique_ptr<calib::WeightSource> reference;
  if (!a.reference.empty()) {
    reference = calib::open_weights(a.reference);
    calib::require_same_shape(model->config(), reference->config(), a.reference);
  }
  // The original weights in place of the packed ones carry the folder's folds: N and S belong to the cache's
  // part.
  std::unique_ptr<calib::WeightSource> folded;
  if (model->packed() && a.weights == "original") {
    if (!reference) {
      throw Error(ErrorKind::usage, "--weights original needs the original model")
          .hint("add --reference HF_DIR");
    }
    folded = calib::fold_like(*reference, a.model, *model->quantization());
  }
  const calib::WeightSource& tested = folded ? *folded : *model;

  if (!a.tasks.empty()) {
    const Report report(a.common, progress);
    const calib::Precision precision = precision_of(a, *model);
    const std::uint64_t context = a.ctx.value_or(model->config().context);
    nlohmann::json json = {{"precision", precision_json(precision, tested.packed())}};
    json["tasks"] = run_tasks({a.tasks, a.bos, context}, a.model, tested, reference.get(), precision,
                              a.common.threads, report, progress);
    report.json(json);
    return 0;
  }

  const TokenizedText text = tokenize(a.text, a.model, model->config());
  const calib::Bos bos = resolve_bos(a.bos, text);
  const std::uint64_t context = model->config().context;
  const std::uint64_t ctx = a.ctx.value_or(std::min<std::uint64_t>(context, 2048));
  if (ctx > context) {
    progress.warning(fmt::format("--ctx {} is over the model's context of {}", ctx, context));
  }
  const calib::Windows windows = evaluation_windows(a.text, text, ctx, bos);

  calib::EvaluationOptions options;
  options.precision = precision_of(a, *model);
  options.threads = a.common.threads;
  options.reference = reference.get();
  std::unique_ptr<calib::LinearBackend> backend;
  if (gpu != nullptr) backend = make_backend(*gpu);
  options.backend = backend.get();
  const calib::EvaluationResult result = calib::evaluate(tested, windows, options, progress);
  const std::uint64_t tokens = text.ids.size() + (bos == calib::Bos::head ? 1 : 0);

  const Report report(a.common, progress);
  static constexpr std::array<const char*, 3> kBosNames{"head", "window", "none"};
  const char* bos_name = kBosNames[static_cast<std::size_t>(bos)];
  report.line(fmt::format(
      "perplexity {:.4f}  nll {:.5f} +- {:.5f}  ({} tokens scored in {} windows of {}, BOS {})", result.ppl,
      result.nll_per_token, result.nll_stderr, result.scored, result.windows, ctx, bos_name));
  if (result.kl_mean) {
    report.line(fmt::format(
        "against the reference: nll {:+.5f} +- {:.5f}, KL {:.5f} +- {:.5f} (max {:.3f}), same top "
        "token {:.2f} %",
        *result.delta_nll, *result.delta_nll_stderr, *result.kl_mean, *result.kl_stderr, *result.kl_max,
        100 * *result.top1_agree));
  }
  report.line(fmt::format("{:.0f} tokens/s{}",
                          static_cast<double>(result.windows * ctx) / std::max(result.seconds, 1e-9),
                          gpu == nullptr ? "" : ", linears on " + gpu->device().name));

  nlohmann::json json = {{"ppl", result.ppl},
                         {"nll_per_token", result.nll_per_token},
                         {"nll_stderr", result.nll_stderr},
                         {"tokens", tokens},
                         {"windows", result.windows},
                         {"window_nll", result.window_nll},
                         {"scored", result.scored},
                         {"ctx", ctx},
                         {"bos", bos_name},
                         {"seconds", result.seconds},
                         {"cpu_seconds", result.cpu_seconds},
                         {"precision", precision_json(options.precision, tested.packed())},
                         {"device", device_json(gpu.get())}};
  if (result.kl_mean) {
    json["kl_mean"] = *result.kl_mean;
    json["kl_max"] = *result.kl_max;
    json["kl_stderr"] = *result.kl_stderr;
    json["delta_nll"] = *result.delta_nll;
    json["delta_nll_stderr"] = *result.delta_nll_stderr;
    json["top1_agree"] = *result.top1_agree;
  }
  report.json(json);
  return 0;
}

}  // namespace

void add_eval(CLI::App& app, Runner& runner) {
  auto a = std::make_shared<Arguments>();
  CLI::App* cmd =
      app.add_subcommand("eval", "Perplexity of a Hugging Face or FireQ folder; KL against a reference");
  cmd->add_option("model", a->model, "Folder")->required();
  add_text_options(*cmd, a->text);
  cmd->add_option("--tasks", a->tasks,
                  "Instead of a text: JSONL files of choices or last words, scored by likelihood")
      ->type_name("FILE ...");
  add_context_option(*cmd, a->ctx);
  cmd->add_option("--bos", a->bos,
                  "head: once before the text; window: in every window; none. Default: the tokenizer's")
      ->check(CLI::IsMember({"head", "window", "none"}));
  cmd->add_option("--weights", a->weights, "packed, or original (needs --reference on a FireQ folder)")
      ->check(CLI::IsMember({"packed", "original"}));
  cmd->add_option("--activations", a->activations, "fp or fp8")->check(CLI::IsMember({"fp", "fp8"}));
  cmd->add_option("--kv", a->kv, "fp or int4, for K and V")->check(CLI::IsMember({"fp", "int4"}));
  cmd->add_option("--k", a->k, "fp or int4, for K alone")->check(CLI::IsMember({"fp", "int4"}));
  cmd->add_option("--v", a->v, "fp or int4, for V alone")->check(CLI::IsMember({"fp", "int4"}));
  cmd->add_option("--qp", a->qp, "fp or fp8, for queries and probabilities")
      ->check(CLI::IsMember({"fp", "fp8"}));
  cmd->add_option("--reference", a->reference, "Original model: KL and agreement are measured against it")
      ->type_name("HF_DIR");
  add_device_option(*cmd, a->device,
                    "Where the packed linears run: cpu, or cuda (the rest stays on the CPU)");
  add_common_options(*cmd, a->common);
  cmd->footer(
      "Examples:\n"
      "  fireq eval model --text test.txt --ctx 2048\n"
      "  fireq eval out --text test.txt --reference model --json result.json\n"
      "  fireq eval out --text test.txt --kv fp            (what the INT4 cache costs)\n"
      "  fireq eval out --tasks questions.jsonl --reference model\n"
      "  fireq eval out --text test.txt --weights original --reference model   (activations and cache "
      "alone)");
  cmd->callback([a, &runner] { runner = [a] { return run(*a); }; });
}

}  // namespace fireq::apps
