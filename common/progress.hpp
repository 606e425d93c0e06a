// How long work reports itself and is stopped. Libraries call these; the command line draws them.
#pragma once

#include <atomic>
#include <cstdint>
#include <string_view>

namespace fireq {

// Reports arrive from the thread that started the work, in order. The default does nothing.
class Progress {
 public:
  Progress() = default;
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  virtual ~Progress() = default;
  virtual void begin(std::string_view /*stage*/, std::uint64_t /*total*/) {}
  virtual void advance(std::uint64_t /*done*/) {}  // units done since begin, absolute
  virtual void end() {}
  virtual void warning(std::string_view /*line*/) {}
};

// Set by Ctrl-C; long work calls check_interrupt() between units and unwinds with ErrorKind::interrupted.
std::atomic<bool>& interrupt_flag() noexcept;
void check_interrupt();

}  // namespace fireq
