#include "calib/dataset.hpp"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <span>

#include "common/error.hpp"
#include "formats/file_system.hpp"
#include "formats/names.hpp"

namespace fireq::calib {
namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t kLargestText = std::uint64_t{4} << 30U;
// Of split_calibration_windows: tokens, one of so many windows, windows.
constexpr std::uint64_t kLargestHeldBack = 4096;
constexpr std::uint64_t kHeldBackShare = 16;
constexpr std::uint64_t kFewestToHoldBackFrom = 8;

std::string read_jsonl(const std::string& path, const std::string& field) {
  const std::string raw = formats::read_text_file(path, kLargestText);
  std::string joined;
  std::size_t line_number = 0;
  for (std::size_t begin = 0; begin < raw.size();) {
    std::size_t end = raw.find('\n', begin);
    if (end == std::string::npos) end = raw.size();
    ++line_number;
    const std::string_view line(raw.data() + begin, end - begin);
    const std::size_t line_begin = begin;
    begin = end + 1;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const auto object = nlohmann::json::parse(line, nullptr, false);
    const auto fail = [&](const std::string& expected, const std::string& found) {
      throw Error(ErrorKind::input, "line " + std::to_string(line_number) + " cannot be used")
          .path(path)
          .offset(line_begin)
          .expected(expected)
          .found(found)
          .hint("choose the field with --jsonl-field");
    };
    if (object.is_discarded() || !object.is_object()) fail("one JSON object a line", "something else");
    const auto it = object.find(field);
    if (it == object.end()) fail("a field '" + field + "'", "none");
    if (!it->is_string()) fail("a string in '" + field + "'", it->type_name());
    if (!joined.empty()) joined += '\n';
    joined += it->get_ref<const std::string&>();
  }
  return joined;
}

bool is_jsonl(const fs::path& path) {
  return path.extension() == ".jsonl";
}

// A file as it is, or the text files below a directory in the order of their paths.
std::vector<std::string> expand(const std::string& path) {
  std::error_code ec;
  const fs::file_status status = fs::status(path, ec);
  if (ec || !fs::exists(status)) {
    throw Error(ErrorKind::usage, "text file does not exist").path(path).hint("check --text");
  }
  if (!fs::is_directory(status)) return {path};
  static constexpr std::array<std::string_view, 4> kExtensions{".txt", ".md", ".raw", ".jsonl"};
  std::vector<std::string> found;
  try {
    for (const auto& entry : fs::recursive_directory_iterator(path)) {
      const std::string extension = entry.path().extension().string();
      if (entry.is_regular_file() &&
          std::find(kExtensions.begin(), kExtensions.end(), extension) != kExtensions.end()) {
        found.push_back(entry.path().string());
      }
    }
  } catch (const fs::filesystem_error& e) {
    throw Error(ErrorKind::environment, std::string("cannot list the directory: ") + e.code().message())
        .path(path);
  }
  if (found.empty()) {
    throw Error(ErrorKind::input, "directory holds no text")
        .path(path)
        .expected("*.txt, *.md, *.raw or *.jsonl");
  }
  std::sort(found.begin(), found.end());
  return found;
}

// Unbiased index below n from a splitmix64 stream: std::uniform_int_distribution differs between libraries.
class Draw {
 public:
  explicit Draw(std::uint64_t seed) : state_(seed) {}
  std::uint64_t below(std::uint64_t n) {
    const std::uint64_t limit = n * (~std::uint64_t{0} / n);
    for (;;) {
      const std::uint64_t x = next();
      if (x < limit) return x % n;
    }
  }

 private:
  std::uint64_t next() {
    state_ += 0x9e3779b97f4a7c15ULL;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30U)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27U)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31U);
  }
  std::uint64_t state_;
};

std::int32_t require_bos(Bos bos, std::optional<std::int32_t> bos_id) {
  if (bos != Bos::none && !bos_id) {
    throw Error(ErrorKind::usage, "the tokenizer has no BOS token").hint("use --bos none");
  }
  return bos_id.value_or(-1);
}

Windows cut(const std::vector<std::int32_t>& tokens, std::uint64_t length, Bos bos,
            std::optional<std::int32_t> bos_id) {
  if (length < 2)
    throw Error(ErrorKind::usage, "window length must be at least 2").found(std::to_string(length));
  const std::int32_t begin_id = require_bos(bos, bos_id);
  Windows windows;
  windows.length = length;
  if (bos == Bos::window) {
    windows.count = tokens.size() / (length - 1);
    for (std::uint64_t w = 0; w < windows.count; ++w) {
      windows.ids.push_back(begin_id);
      const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(w * (length - 1));
      windows.ids.insert(windows.ids.end(), first, first + static_cast<std::ptrdiff_t>(length - 1));
    }
    return windows;
  }
  std::vector<std::int32_t> stream;
  stream.reserve(tokens.size() + 1);
  if (bos == Bos::head) stream.push_back(begin_id);
  stream.insert(stream.end(), tokens.begin(), tokens.end());
  windows.count = stream.size() / length;
  stream.resize(windows.count * length);
  windows.ids = std::move(stream);
  return windows;
}

// `tokens` of text without BOS.
void require_one_window(const Windows& windows, std::uint64_t tokens, Bos bos) {
  if (windows.count > 0) return;
  const std::uint64_t have = bos == Bos::none ? tokens : tokens + 1;
  const std::string with_bos = bos == Bos::none ? "" : " with BOS";
  throw Error(ErrorKind::input, "text is shorter than one window")
      .expected("at least " + std::to_string(windows.length) + " tokens" + with_bos)
      .found(std::to_string(have))
      .hint("use more text (--skip-chars, --max-chars)" +
            (have < 2 ? std::string()
                      : ", or a window of at most " + std::to_string(have) +
                            " tokens (--ctx to evaluate, --length to calibrate)"));
}

Windows cut_for_calibration(const std::vector<std::int32_t>& tokens, std::uint64_t length,
                            std::uint64_t samples, Bos bos, std::optional<std::int32_t> bos_id,
                            Progress& progress) {
  if (samples == 0) throw Error(ErrorKind::usage, "--samples must be at least 1");
  Windows all = cut(tokens, length, bos, bos_id);
  require_one_window(all, tokens.size(), bos);
  if (all.count < samples) {
    progress.warning("calibration text gives " + std::to_string(all.count) + " windows of " +
                     std::to_string(length) + " tokens, fewer than the " + std::to_string(samples) +
                     " asked for");
  }
  return all;
}

// `samples` of `count` windows, or all, in text order.
std::vector<std::uint64_t> draw(std::uint64_t count, std::uint64_t samples, std::uint64_t seed) {
  std::vector<std::uint64_t> order(count);
  std::iota(order.begin(), order.end(), std::uint64_t{0});
  if (count <= samples) return order;
  // Partial Fisher-Yates, then text order.
  Draw random(seed);
  for (std::uint64_t i = 0; i < samples; ++i) std::swap(order[i], order[i + random.below(count - i)]);
  order.resize(samples);
  std::sort(order.begin(), order.end());
  return order;
}

// The first `length` tokens of some windows.
Windows select(const Windows& all, std::span<const std::uint64_t> which, std::uint64_t length) {
  Windows chosen;
  chosen.length = length;
  chosen.count = which.size();
  for (const std::uint64_t w : which) {
    const auto first = all.ids.begin() + static_cast<std::ptrdiff_t>(w * all.length);
    chosen.ids.insert(chosen.ids.end(), first, first + static_cast<std::ptrdiff_t>(length));
  }
  return chosen;
}

}  // namespace

std::string load_text(const TextOptions& options) {
  if (options.files.empty()) throw Error(ErrorKind::usage, "no text given").hint("use --text FILE");
  std::string text;
  bool first = true;
  for (const std::string& given : options.files) {
    for (const std::string& path : expand(given)) {
      std::string part = is_jsonl(path) ? read_jsonl(path, options.jsonl_field)
                                        : formats::read_text_file(path, kLargestText);
      formats::check_utf8(part, path);
      if (!first) text += '\n';
      first = false;
      if (text.empty()) {
        text = std::move(part);
      } else {
        text += part;
      }
    }
  }
  const std::string_view slice = formats::slice_code_points(text, options.skip_chars, options.max_chars);
  if (slice.empty()) {
    throw Error(ErrorKind::input, "text is empty")
        .path(options.files.front())
        .hint(options.skip_chars > 0 ? "--skip-chars leaves nothing of it" : "give a file with text in it");
  }
  return slice.size() == text.size() ? text : std::string(slice);
}

std::vector<std::int32_t> load_tokens(const std::string& path, std::uint64_t vocab) {
  const std::string raw = formats::read_text_file(path, kLargestText);
  if (raw.size() % 4 != 0) {
    throw Error(ErrorKind::input, "token file is no whole number of 32-bit ids")
        .path(path)
        .found(std::to_string(raw.size()) + " bytes");
  }
  std::vector<std::int32_t> ids(raw.size() / 4);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    std::uint32_t id = 0;
    for (unsigned b = 0; b < 4; ++b) {
      id |= static_cast<std::uint32_t>(static_cast<unsigned char>(raw[4 * i + b])) << (8U * b);
    }
    if (id >= vocab) {
      throw Error(ErrorKind::input, "token id " + std::to_string(i) + " is not in the vocabulary")
          .path(path)
          .offset(4 * i)
          .expected("below " + std::to_string(vocab))
          .found(std::to_string(id));
    }
    ids[i] = static_cast<std::int32_t>(id);
  }
  return ids;
}

Windows make_evaluation_windows(const std::vector<std::int32_t>& tokens, std::uint64_t length, Bos bos,
                                std::optional<std::int32_t> bos_id) {
  Windows windows = cut(tokens, length, bos, bos_id);
  require_one_window(windows, tokens.size(), bos);
  return windows;
}

Windows make_calibration_windows(const std::vector<std::int32_t>& tokens, std::uint64_t length,
                                 std::uint64_t samples, std::uint64_t seed, Bos bos,
                                 std::optional<std::int32_t> bos_id, Progress& progress) {
  const Windows all = cut_for_calibration(tokens, length, samples, bos, bos_id, progress);
  return select(all, draw(all.count, samples, seed), length);
}

SplitWindows split_calibration_windows(const std::vector<std::int32_t>& tokens, std::uint64_t length,
                                       std::uint64_t samples, std::uint64_t seed, Bos bos,
                                       std::optional<std::int32_t> bos_id, Progress& progress) {
  const Windows all = cut_for_calibration(tokens, length, samples, bos, bos_id, progress);
  std::vector<std::uint64_t> drawn = draw(all.count, samples, seed);
  std::vector<std::uint64_t> rest;
  for (std::uint64_t w = 0, next = 0; w < all.count; ++w) {
    if (next < drawn.size() && drawn[next] == w) {
      ++next;
    } else {
      rest.push_back(w);
    }
  }
  const std::uint64_t most = std::max<std::uint64_t>(1, kLargestHeldBack / length);
  const std::uint64_t wanted = std::clamp<std::uint64_t>(drawn.size() / kHeldBackShare, 1, most);
  if (rest.empty() && drawn.size() >= kFewestToHoldBackFrom) {
    const auto kept = drawn.end() - static_cast<std::ptrdiff_t>(wanted);
    rest.assign(kept, drawn.end());
    drawn.erase(kept, drawn.end());
  } else if (rest.size() > wanted) {
    rest.erase(rest.begin(), rest.end() - static_cast<std::ptrdiff_t>(wanted));
  }
  return {select(all, drawn, length), select(all, rest, std::min(length, kLargestHeldBack))};
}

std::string fingerprint_of_windows(const Windows& windows) {
  std::vector<unsigned char> bytes;
  const auto put = [&](std::uint64_t v, unsigned n) {
    for (unsigned b = 0; b < n; ++b) bytes.push_back(static_cast<unsigned char>(v >> (8U * b)));
  };
  put(windows.count, 8);
  put(windows.length, 8);
  for (const std::int32_t id : windows.ids) put(static_cast<std::uint32_t>(id), 4);
  const XXH128_hash_t hash = XXH3_128bits(bytes.data(), bytes.size());
  return formats::hex128(hash.high64, hash.low64);
}

}  // namespace fireq::calib
