#include <fmt/format.h>

#include <array>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "apps/commands.hpp"
#include "common/error.hpp"

namespace fireq::apps {
namespace {

// Calls `cut` and adds the text's name to what it throws about it.
template <typename Cut>
auto named_windows(const TextArguments& arguments, const Cut& cut) {
  try {
    return cut();
  } catch (Error& e) {
    if (e.kind() == ErrorKind::input) e.path_if_unset(arguments.name());
    throw;
  }
}

std::uint64_t window_length(const CalibrationArguments& calibration, std::uint64_t context,
                            Progress& progress) {
  if (calibration.length <= context) return calibration.length;
  const std::uint64_t wanted = calibration.samples * calibration.length;
  progress.warning(
      fmt::format("the model's context is {}: windows are that long, not {}, and {} of them hold {} tokens; "
                  "--samples {} would make them {}",
                  context, calibration.length, calibration.samples, calibration.samples * context,
                  (wanted + context - 1) / context, wanted));
  return context;
}

}  // namespace

CLI::Validator whole_number(std::uint64_t low, std::uint64_t high) {
  const std::string range = high == std::numeric_limits<std::uint64_t>::max()
                                ? fmt::format("of at least {}", low)
                                : fmt::format("from {} to {}", low, high);
  const auto check = [low, high, range](std::string& text) -> std::string {
    std::uint64_t value = 0;
    const char* last = text.data() + text.size();
    const auto [end, ec] = std::from_chars(text.data(), last, value);
    if (ec == std::errc() && end == last && value >= low && value <= high) {
      text = std::to_string(value);
      return {};
    }
    const bool too_large = ec == std::errc::result_out_of_range && end == last;
    return fmt::format("expected a whole number {}, found '{}'{}", range, text,
                       too_large ? ", which is too large" : "");
  };
  return {check,
          high == std::numeric_limits<std::uint64_t>::max() ? "" : fmt::format("in [{}, {}]", low, high)};
}

void add_common_options(CLI::App& app, CommonOptions& options) {
  app.add_option("--json", options.json_path, "Write the result as JSON to FILE ('-': stdout)")
      ->type_name("FILE");
  app.add_option("--threads", options.threads, "Threads (0: all processors)")
      ->transform(whole_number(0, 4096))
      ->capture_default_str();
  app.add_flag("-q,--quiet", options.quiet, "No progress and no tables; errors and warnings stay");
}

void add_text_options(CLI::App& app, TextArguments& arguments) {
  app.add_option("--text", arguments.text.files, "Text files, JSONL files or directories")->type_name("FILE");
  app.add_option("--jsonl-field", arguments.text.jsonl_field, "Field of a JSONL line that holds the text")
      ->capture_default_str();
  app.add_option("--skip-chars", arguments.text.skip_chars, "Code points to skip at the head of the text")
      ->transform(whole_number())
      ->capture_default_str();
  app.add_option("--max-chars", arguments.text.max_chars, "Code points to use after that (0: all)")
      ->transform(whole_number())
      ->capture_default_str();
  app.add_option("--tokens", arguments.tokens_path, "Little-endian uint32 token ids instead of text")
      ->type_name("FILE");
}

void add_context_option(CLI::App& app, std::optional<std::uint64_t>& length) {
  app.add_option("--ctx", length, "Tokens of a window; default: the model's context, at most 2048")
      ->transform(whole_number(2, 1 << 24));
}

void add_calibration_options(CLI::App& app, CalibrationArguments& arguments) {
  app.add_option("--bos", arguments.bos,
                 "BOS of calibration windows: head, window or none; default: the tokenizer's")
      ->check(CLI::IsMember({"head", "window", "none"}));
  app.add_option("--samples", arguments.samples, "Calibration windows")
      ->transform(whole_number(1, 1'000'000))
      ->capture_default_str();
  app.add_option("--length", arguments.length, "Tokens of a window, at most the model's context")
      ->transform(whole_number(2, 1 << 24))
      ->capture_default_str();
  app.add_option("--seed", arguments.seed, "Seed of the choice of windows")
      ->transform(whole_number())
      ->capture_default_str();
}

std::string TextArguments::name() const {
  if (!tokens_path.empty()) return tokens_path;
  if (text.files.empty()) return {};
  const std::size_t more = text.files.size() - 1;
  return more == 0 ? text.files.front() : fmt::format("{} and {} more", text.files.front(), more);
}

TokenizedText tokenize(const TextArguments& arguments, const std::string& folder,
                       const formats::ModelConfig& config) {
  TokenizedText result;
  if (!arguments.tokens_path.empty()) {
    if (!arguments.text.files.empty())
      throw Error(ErrorKind::usage, "--text and --tokens exclude each other");
    result.ids = calib::load_tokens(arguments.tokens_path, config.vocab);
    if (config.bos_id) result.bos_id = static_cast<std::int32_t>(*config.bos_id);
    return result;  // ids are used as they are: default_bos stays none
  }
  const std::string text = calib::load_text(arguments.text);
#ifdef FIREQ_TOKENIZERS
  const auto tokenizer = formats::open_tokenizer(folder);
  result.ids = tokenizer->encode(text, false);
  result.bos_id = tokenizer->bos_id;
  result.default_bos = tokenizer->default_bos;
  for (const auto id : result.ids) {
    if (std::cmp_less(id, 0) || std::cmp_greater_equal(id, config.vocab)) {
      throw Error(ErrorKind::input,
                  "tokenizer and model do not belong together: token id is outside the embedding")
          .path(folder)
          .expected("below " + std::to_string(config.vocab))
          .found(std::to_string(id));
    }
  }
  return result;
#else
  throw Error(ErrorKind::environment, "this build has no tokenizers")
      .path(folder)
      .hint("use --tokens ids.u32");
#endif
}

calib::Bos resolve_bos(const std::string& option, const TokenizedText& text) {
  if (option == "head") return calib::Bos::head;
  if (option == "window") return calib::Bos::window;
  if (option == "none") return calib::Bos::none;
  return text.default_bos == formats::BosMode::head ? calib::Bos::head : calib::Bos::none;
}

calib::Windows evaluation_windows(const TextArguments& arguments, const TokenizedText& text,
                                  std::uint64_t length, calib::Bos bos) {
  return named_windows(arguments,
                       [&] { return calib::make_evaluation_windows(text.ids, length, bos, text.bos_id); });
}

namespace {

// Both ways of drawing windows for calibration take the same.
template <class Draw>
auto draw_windows(const TextArguments& arguments, const TokenizedText& text,
                  const CalibrationArguments& calibration, std::uint64_t context, Progress& progress,
                  Draw draw) {
  const std::uint64_t length = window_length(calibration, context, progress);
  return named_windows(arguments, [&] {
    return draw(text.ids, length, calibration.samples, calibration.seed, resolve_bos(calibration.bos, text),
                text.bos_id, progress);
  });
}

}  // namespace

calib::Windows calibration_windows(const TextArguments& arguments, const TokenizedText& text,
                                   const CalibrationArguments& calibration, std::uint64_t context,
                                   Progress& progress) {
  return draw_windows(arguments, text, calibration, context, progress, calib::make_calibration_windows);
}

calib::SplitWindows split_calibration_windows(const TextArguments& arguments, const TokenizedText& text,
                                              const CalibrationArguments& calibration, std::uint64_t context,
                                              Progress& progress) {
  return draw_windows(arguments, text, calibration, context, progress, calib::split_calibration_windows);
}

calib::TextFit check_text(const TextArguments& arguments, const calib::WeightSource& model,
                          const calib::Windows& windows, int threads, Progress& progress) {
  const calib::TextFit fit = calib::text_fit(model, windows, threads, progress);
  if (fit.unlike()) {
    progress.warning(
        fmt::format("{} looks unlike the model's language: its nll of {:.2f} per token (perplexity "
                    "{:.0f}) is not below {:.2f}, what the frequencies of the text's own tokens give; "
                    "calibrate on text that the model will read",
                    arguments.name(), fit.nll, std::exp(fit.nll), fit.unigram));
  }
  return fit;
}

nlohmann::json text_json(const calib::TextFit& fit) {
  return {{"nll", fit.nll}, {"unigram", fit.unigram}, {"tokens", fit.tokens}, {"unlike", fit.unlike()}};
}

std::uint64_t parse_size(const std::string& text) {
  static constexpr std::array<std::pair<std::string_view, double>, 10> kUnits{{{"", 1},
                                                                               {"B", 1},
                                                                               {"kB", 1e3},
                                                                               {"KB", 1e3},
                                                                               {"MB", 1e6},
                                                                               {"GB", 1e9},
                                                                               {"KiB", 0x1p10},
                                                                               {"MiB", 0x1p20},
                                                                               {"GiB", 0x1p30},
                                                                               {"TB", 1e12}}};
  double value = 0;
  const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), value);
  std::string_view unit(end, static_cast<std::size_t>(text.data() + text.size() - end));
  while (unit.starts_with(' ')) unit.remove_prefix(1);
  for (const auto& [name, factor] : kUnits) {
    const double bytes = value * factor;
    if (ec == std::errc() && unit == name && bytes >= 1 && bytes < 0x1p63)
      return static_cast<std::uint64_t>(std::llround(bytes));
  }
  throw Error(ErrorKind::usage, "not a size")
      .expected("a number with B, kB, MB, GB, KiB, MiB or GiB")
      .found(text);
}

std::string tool_version() {
  return FIREQ_VERSION;
}

}  // namespace fireq::apps
