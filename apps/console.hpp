// What a command shows: results on stdout, progress and warnings on stderr, JSON to a file.
#pragma once

#include <chrono>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "common/progress.hpp"

namespace fireq::apps {

// Options that every subcommand has.
struct CommonOptions {
  std::string json_path;  // empty: none; "-": stdout, and then nothing else is printed there
  int threads = 0;        // 0: all processors
  bool quiet = false;
};

// A bar on a terminal (one that moves its cursor: not TERM=dumb), plain lines otherwise; nothing for work
// under two seconds, nothing when quiet. Warnings are always shown, counted, and, unless quiet, summed up in
// one last line when the work ends without an error.
class ConsoleProgress : public Progress {
 public:
  explicit ConsoleProgress(bool quiet);
  ~ConsoleProgress() override;
  void begin(std::string_view stage, std::uint64_t total) override;
  void advance(std::uint64_t done) override;
  void end() override;
  void warning(std::string_view line) override;
  const std::vector<std::string>& warnings() const noexcept { return warnings_; }

 private:
  void draw(std::uint64_t done, bool last);
  void clear_line();
  void sum_up() const;

  bool quiet_, terminal_;
  bool drawn_ = false;
  std::string stage_;
  std::uint64_t total_ = 0;
  std::vector<std::string> warnings_;
  std::chrono::steady_clock::time_point begin_, last_draw_;
};

// Prints a line to stdout unless quiet or JSON goes there. Both outlive this.
class Report {
 public:
  Report(const CommonOptions& options, const ConsoleProgress& progress)
      : options_(options), progress_(progress) {}
  void line(const std::string& text) const;
  // The object with "warnings", how many there were so far, and "warning_lines", their texts.
  nlohmann::json whole(nlohmann::json value) const;
  // Writes whole(value) where --json asks for it (atomically); does nothing without --json.
  void json(const nlohmann::json& value) const;

 private:
  const CommonOptions& options_;
  const ConsoleProgress& progress_;
};

enum class Colour : std::uint8_t { red, yellow, green };
// `text` in a colour where the file descriptor is a terminal that shows colours and NO_COLOR is not set
// (no-color.org); else as it is.
std::string coloured(int descriptor, Colour colour, const std::string& text);

// Error(environment) when the text cannot be written: a full disk, a reader that has gone.
void write_stdout(std::string_view text);

std::string bytes_text(std::uint64_t bytes);  // "26.4 MB"
std::string seconds_text(double seconds);     // "3.2 s", "4 min 10 s"

}  // namespace fireq::apps
