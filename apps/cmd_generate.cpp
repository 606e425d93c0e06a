#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "apps/commands.hpp"
#include "calib/generate.hpp"
#include "common/error.hpp"

namespace fireq::apps {
namespace {

struct Arguments {
  CommonOptions common;
  std::string model, prompt, prompt_file, system;
  bool chat = false;
  calib::GenerationOptions generation;
};

#ifdef FIREQ_TOKENIZERS

std::vector<std::int32_t> prompt_ids(const Arguments& a, const formats::Tokenizer& tokenizer) {
  const std::string prompt = a.prompt_file.empty() ? a.prompt : formats::read_text_file(a.prompt_file);
  formats::check_utf8(prompt, a.prompt_file.empty() ? "-p" : a.prompt_file);
  std::string text = prompt;
  if (a.chat) {
    std::vector<formats::ChatMessage> messages;
    if (!a.system.empty()) messages.push_back({"system", a.system});
    messages.push_back({"user", prompt});
    text = formats::render_chat(tokenizer, messages);
  }
  std::vector<std::int32_t> ids = tokenizer.encode(text, a.chat);
  const bool has_bos = !ids.empty() && tokenizer.bos_id && ids.front() == *tokenizer.bos_id;
  if (tokenizer.default_bos == formats::BosMode::head && tokenizer.bos_id && !has_bos)
    ids.insert(ids.begin(), *tokenizer.bos_id);
  return ids;
}

int run(const Arguments& a) {
  const auto model = calib::open_weights(a.model);
  const auto tokenizer = formats::open_tokenizer(a.model);
  const std::vector<std::int32_t> prompt = prompt_ids(a, *tokenizer);
  for (const std::int32_t id : prompt) {
    if (id < 0 || static_cast<std::uint64_t>(id) >= model->config().vocab) {
      throw Error(ErrorKind::input,
                  "tokenizer and model do not belong together: token id is outside the embedding")
          .path(a.model)
          .expected("below " + std::to_string(model->config().vocab))
          .found(std::to_string(id));
    }
  }
  calib::GenerationOptions options = a.generation;
  options.threads = a.common.threads;
  options.stop_ids = model->config().eos_ids;
  if (tokenizer->eos_id) options.stop_ids.push_back(*tokenizer->eos_id);
  if (model->packed()) {
    const bool cache = model->quantization()->kv_cache;
    options.precision = {
        .fp8_activations = true, .int4_k = cache, .int4_v = cache, .fp8_q = true, .fp8_p = true};
  }
  const bool print = a.common.json_path != "-";
  const auto emit = [&](const std::string& piece) {
    if (print) write_stdout(piece);
  };
  if (!a.chat) emit(a.prompt_file.empty() ? a.prompt : formats::read_text_file(a.prompt_file));
  formats::StreamingDecoder decoder(*tokenizer, prompt);
  std::string text;
  const calib::GenerationResult result = calib::generate(*model, prompt, options, [&](std::int32_t id) {
    const std::string piece = decoder.push(id);
    text += piece;
    emit(piece);
  });
  const std::string rest = decoder.finish();
  text += rest;
  emit(rest + "\n");

  static constexpr std::array<const char*, 3> kReasons{"eos", "length", "context"};
  const char* reason = kReasons[static_cast<std::size_t>(result.reason)];
  const double rate = static_cast<double>(result.new_tokens) / std::max(result.seconds, 1e-9);
  if (!a.common.quiet) {
    fmt::print(stderr, "{} tokens after a prompt of {}, {:.1f} tokens/s, stopped at {}\n", result.new_tokens,
               result.prompt_tokens, rate, reason);
  }
  const ConsoleProgress progress(a.common.quiet);
  const Report report(a.common, progress);
  report.json({{"text", text},
               {"prompt_tokens", result.prompt_tokens},
               {"new_tokens", result.new_tokens},
               {"prompt_seconds", result.prompt_seconds},
               {"seconds", result.seconds},
               {"tokens_per_second", rate},
               {"stopped_at", reason}});
  return 0;
}

#else

int run(const Arguments& a) {
  throw Error(ErrorKind::environment, "this build has no tokenizers")
      .path(a.model)
      .hint("build with FIREQ_WITH_TOKENIZERS=ON");
}

#endif

}  // namespace

void add_generate(CLI::App& app, Runner& runner) {
  auto a = std::make_shared<Arguments>();
  CLI::App* cmd =
      app.add_subcommand("generate", "Continue a prompt; FireQ folders run with their INT4 cache");
  cmd->add_option("model", a->model, "Folder")->required();
  auto* prompt =
      cmd->add_option("-p,--prompt", a->prompt, "Text to continue, or the user's message with --chat");
  auto* file = cmd->add_option("--prompt-file", a->prompt_file, "The same from a file")
                   ->type_name("FILE")
                   ->excludes(prompt);
  prompt->excludes(file);
  cmd->add_flag("--chat", a->chat, "Use the model's chat template");
  cmd->add_option("--system", a->system, "System message, with --chat");
  cmd->add_option("-n,--max-new-tokens", a->generation.max_new_tokens, "Most tokens to make")
      ->transform(whole_number(1, 1 << 24))
      ->capture_default_str();
  cmd->add_option("--temperature", a->generation.sampling.temperature, "0: always the most likely token")
      ->capture_default_str();
  cmd->add_option("--top-p", a->generation.sampling.top_p, "Share of probability to draw from")
      ->capture_default_str();
  cmd->add_option("--seed", a->generation.sampling.seed, "Seed of the draws")
      ->transform(whole_number())
      ->capture_default_str();
  add_common_options(*cmd, a->common);
  cmd->footer(
      "Examples:\n"
      "  fireq generate out -p \"Once upon a time\" -n 200\n"
      "  fireq generate out --chat -p \"What is INT4?\" --temperature 0");
  cmd->callback([a, &runner] {
    runner = [a] {
      if (a->prompt.empty() && a->prompt_file.empty())
        throw Error(ErrorKind::usage, "no prompt given").hint("use -p TEXT or --prompt-file FILE");
      return run(*a);
    };
  });
}

}  // namespace fireq::apps
