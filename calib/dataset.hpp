// Texts and their cut into windows of tokens.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/progress.hpp"
#include "formats/tokenizer.hpp"

namespace fireq::calib {

struct TextOptions {
  // Plain text (UTF-8), *.jsonl (one JSON object a line) or directories (their *.txt, *.md, *.raw and *.jsonl
  // files, sorted, recursive). Texts are joined with a newline. Every error names the path.
  std::vector<std::string> files;
  std::string jsonl_field = "text";
  std::uint64_t skip_chars = 0;  // Unicode code points of the joined text
  std::uint64_t max_chars = 0;   // 0: to the end
};
std::string load_text(const TextOptions& options);
// --tokens ids.u32: little-endian uint32; ids at or over `vocab` are refused with their index.
std::vector<std::int32_t> load_tokens(const std::string& path, std::uint64_t vocab);

enum class Bos : std::uint8_t { head, window, none };

// Non-overlapping windows, [count, length] ids.
struct Windows {
  std::vector<std::int32_t> ids;
  std::uint64_t count = 0;
  std::uint64_t length = 0;
};

// Evaluation: head = BOS once before the text, window = each window is BOS and length-1 text tokens. A final
// partial window is dropped. Error(input) when not even one window is full.
Windows make_evaluation_windows(const std::vector<std::int32_t>& tokens, std::uint64_t length, Bos bos,
                                std::optional<std::int32_t> bos_id);
// Calibration: the same cut, then `samples` windows drawn without repetition by `seed` (all, in order, when
// there are fewer: a warning), kept in text order.
Windows make_calibration_windows(const std::vector<std::int32_t>& tokens, std::uint64_t length,
                                 std::uint64_t samples, std::uint64_t seed, Bos bos,
                                 std::optional<std::int32_t> bos_id, Progress& progress);
struct SplitWindows {
  Windows calibration, held_back;
};
// make_calibration_windows, and windows that are not among them, to measure the result on: a sixteenth as
// many, at least 1, at most 4,096 tokens (a longer window is cut). They are the last that were not drawn.
// Where all are drawn they are the last of the text, and calibration goes without them; of fewer than 8
// windows none is taken, and held_back is empty.
SplitWindows split_calibration_windows(const std::vector<std::int32_t>& tokens, std::uint64_t length,
                                       std::uint64_t samples, std::uint64_t seed, Bos bos,
                                       std::optional<std::int32_t> bos_id, Progress& progress);
std::string fingerprint_of_windows(const Windows& windows);  // xxHash3-128 hex

}  // namespace fireq::calib
