// The subcommands: each registers its options on a CLI::App and sets `run`, which main calls after parsing.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "apps/console.hpp"
#include "calib/dataset.hpp"
#include "formats/model_config.hpp"
#include "formats/tokenizer.hpp"

namespace fireq::apps {

using Runner = std::function<int()>;  // returns the exit code

void add_quantize(CLI::App& app, Runner& run);
void add_calibrate(CLI::App& app, Runner& run);
void add_eval(CLI::App& app, Runner& run);
void add_inspect(CLI::App& app, Runner& run);
void add_validate(CLI::App& app, Runner& run);
void add_generate(CLI::App& app, Runner& run);

void add_common_options(CLI::App& app, CommonOptions& options);

// Text of calibration and evaluation: files or token ids.
struct TextArguments {
  calib::TextOptions text;
  std::string tokens_path;  // ids.u32
  bool given() const { return !text.files.empty() || !tokens_path.empty(); }
};
void add_text_options(CLI::App& app, TextArguments& arguments);

struct TokenizedText {
  std::vector<std::int32_t> ids;
  std::optional<std::int32_t> bos_id;
  formats::BosMode default_bos = formats::BosMode::none;
};
// Reads and tokenises with the tokenizer of `folder`; every id is checked against the model's vocabulary.
TokenizedText tokenize(const TextArguments& arguments, const std::string& folder,
                       const formats::ModelConfig& config);

// "--bos head|window|none", empty: the tokenizer's own default.
calib::Bos resolve_bos(const std::string& option, const TokenizedText& text);

std::uint64_t parse_size(const std::string& text);  // "5GB", "512MiB", "1000000"

std::string tool_version();

}  // namespace fireq::apps
