// The subcommands: each registers its options on a CLI::App and sets `run`, which main calls after parsing.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "apps/console.hpp"
#include "calib/dataset.hpp"
#include "calib/measured_cost.hpp"
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
void add_export(CLI::App& app, Runner& run);
void add_doctor(CLI::App& app, Runner& run);
void add_diff(CLI::App& app, Runner& run);

void add_common_options(CLI::App& app, CommonOptions& options);

// A whole number in decimal digits, without a sign, from low to high. The library's own conversion lets a
// negative or a huge number wrap around, and reads "010" as eight.
CLI::Validator whole_number(std::uint64_t low = 0,
                            std::uint64_t high = std::numeric_limits<std::uint64_t>::max());

// Text of calibration and evaluation: files or token ids.
struct TextArguments {
  calib::TextOptions text;
  std::string tokens_path;  // ids.u32
  bool given() const { return !text.files.empty() || !tokens_path.empty(); }
  std::string name() const;  // for messages: "a.txt", "a.txt and 2 more"
};
void add_text_options(CLI::App& app, TextArguments& arguments);

// --ctx: the length of evaluation windows.
void add_context_option(CLI::App& app, std::optional<std::uint64_t>& length);

// How calibration windows are drawn from the text.
struct CalibrationArguments {
  std::uint64_t samples = 10, length = 2048, seed = 0;
  std::string bos;
};
void add_calibration_options(CLI::App& app, CalibrationArguments& arguments);

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

// The windows of calib/dataset.hpp; a text that is too short is named.
calib::Windows evaluation_windows(const TextArguments& arguments, const TokenizedText& text,
                                  std::uint64_t length, calib::Bos bos);
calib::Windows calibration_windows(const TextArguments& arguments, const TokenizedText& text,
                                   const CalibrationArguments& calibration, std::uint64_t context,
                                   Progress& progress);

// With the windows that are held back to measure on.
calib::SplitWindows split_calibration_windows(const TextArguments& arguments, const TokenizedText& text,
                                              const CalibrationArguments& calibration, std::uint64_t context,
                                              Progress& progress);
// Warns where the text is not in the model's language.
calib::TextFit check_text(const TextArguments& arguments, const calib::WeightSource& model,
                          const calib::Windows& windows, int threads, Progress& progress);

nlohmann::json text_json(const calib::TextFit& fit);

std::uint64_t parse_size(const std::string& text);  // "5GB", "512MiB", "1000000"

std::string tool_version();

}  // namespace fireq::apps
