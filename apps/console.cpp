#include "apps/console.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <nlohmann/json.hpp>
#include <span>
#include <system_error>

#include "common/error.hpp"
#include "formats/file_system.hpp"

namespace fireq::apps {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kSilentSeconds = 2;
constexpr double kTerminalInterval = 0.1;
constexpr double kPlainInterval = 10;
constexpr int kBarWidth = 24;

double since(Clock::time_point t) {
  return std::chrono::duration<double>(Clock::now() - t).count();
}

std::string_view variable(const char* name) {
  const char* value = std::getenv(name);  // NOLINT(concurrency-mt-unsafe): read before threads start
  return value == nullptr ? std::string_view() : std::string_view(value);
}

// A terminal that understands more than lines.
bool is_terminal(int descriptor) {
  return isatty(descriptor) == 1 && variable("TERM") != "dumb";
}

}  // namespace

std::string coloured(int descriptor, Colour colour, const std::string& text) {
  if (!is_terminal(descriptor) || !variable("NO_COLOR").empty()) return text;
  static constexpr std::array<const char*, 3> kCodes{"31", "33", "32"};
  return fmt::format("\x1b[{}m{}\x1b[0m", kCodes[static_cast<std::size_t>(colour)], text);
}

ConsoleProgress::ConsoleProgress(bool quiet) : quiet_(quiet), terminal_(is_terminal(STDERR_FILENO)) {}

ConsoleProgress::~ConsoleProgress() {
  clear_line();
  // After an error the error is the last line.
  if (std::uncaught_exceptions() == 0) sum_up();
}

void ConsoleProgress::begin(std::string_view stage, std::uint64_t total) {
  clear_line();
  stage_ = std::string(stage);
  total_ = total;
  drawn_ = false;
  begin_ = last_draw_ = Clock::now();
}

void ConsoleProgress::advance(std::uint64_t done) {
  if (quiet_ || total_ == 0 || since(begin_) < kSilentSeconds) return;
  if (drawn_ && since(last_draw_) < (terminal_ ? kTerminalInterval : kPlainInterval)) return;
  draw(done, false);
}

void ConsoleProgress::end() {
  if (quiet_ || total_ == 0) return;
  if (drawn_ || since(begin_) >= kSilentSeconds) draw(total_, true);
  total_ = 0;
}

void ConsoleProgress::draw(std::uint64_t done, bool last) {
  const double fraction = std::min(1.0, static_cast<double>(done) / static_cast<double>(total_));
  const double elapsed = since(begin_);
  const std::string time =
      last || done == 0 ? seconds_text(elapsed) : seconds_text(elapsed * (1 - fraction) / fraction) + " left";
  if (terminal_) {
    const int filled = static_cast<int>(fraction * kBarWidth);
    fmt::print(stderr, "\r{:<12} [{}{}] {:3.0f} %  {}\x1b[K", stage_,
               std::string(static_cast<std::size_t>(filled), '#'),
               std::string(static_cast<std::size_t>(kBarWidth - filled), '.'), 100 * fraction, time);
    if (last) fmt::print(stderr, "\n");
  } else {
    fmt::print(stderr, "{}: {} of {} ({:.0f} %), {}\n", stage_, done, total_, 100 * fraction, time);
  }
  std::fflush(stderr);
  drawn_ = !last;
  last_draw_ = Clock::now();
}

void ConsoleProgress::clear_line() {
  if (terminal_ && drawn_) fmt::print(stderr, "\r\x1b[K");
  drawn_ = false;
}

void ConsoleProgress::warning(std::string_view line) {
  clear_line();
  warnings_.push_back(printable(std::string(line)));
  fmt::print(stderr, "fireq: {} {}\n", coloured(STDERR_FILENO, Colour::yellow, "warning:"), warnings_.back());
}

void ConsoleProgress::sum_up() const {
  if (quiet_ || warnings_.empty()) return;
  constexpr std::size_t kMost = 3, kLongest = 60;
  std::vector<std::string> first;
  for (const std::string& text : std::span(warnings_).first(std::min(kMost, warnings_.size()))) {
    std::size_t end = std::min(kLongest, text.size());
    while (end > 0 && end < text.size() && (static_cast<unsigned char>(text[end]) & 0xc0U) == 0x80) --end;
    first.push_back(end < text.size() ? text.substr(0, end) + "..." : text);
  }
  fmt::print(stderr, "fireq: {}: {}{}\n",
             coloured(STDERR_FILENO, Colour::yellow,
                      fmt::format("{} warning{}", warnings_.size(), warnings_.size() == 1 ? "" : "s")),
             fmt::join(first, "; "),
             warnings_.size() > kMost ? fmt::format("; and {} more", warnings_.size() - kMost) : "");
}

void write_stdout(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0) return;
  const int error_number = errno;
  throw Error(ErrorKind::environment, "cannot write to the standard output")
      .found(std::generic_category().message(error_number));
}

void Report::line(const std::string& text) const {
  if (options_.quiet || options_.json_path == "-") return;
  write_stdout(text + "\n");
}

nlohmann::json Report::whole(nlohmann::json value) const {
  value["warnings"] = progress_.warnings().size();
  value["warning_lines"] = progress_.warnings();
  return value;
}

void Report::json(const nlohmann::json& value) const {
  if (options_.json_path.empty()) return;
  const std::string text = whole(value).dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  if (options_.json_path == "-") {
    write_stdout(text);
    return;
  }
  formats::write_file_atomically(formats::real_file_system(), options_.json_path, std::string_view(text));
}

std::string bytes_text(std::uint64_t bytes) {
  static constexpr std::array<const char*, 5> kUnits{"B", "kB", "MB", "GB", "TB"};
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 1000 && unit + 1 < kUnits.size()) {
    value /= 1000;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.1f} {}", value, kUnits[unit]);
}

std::string seconds_text(double seconds) {
  if (seconds < 60) return fmt::format("{:.1f} s", seconds);
  const auto whole = static_cast<std::uint64_t>(std::llround(seconds));
  if (whole < 3600) return fmt::format("{} min {} s", whole / 60, whole % 60);
  return fmt::format("{} h {} min", whole / 3600, whole % 3600 / 60);
}

}  // namespace fireq::apps
