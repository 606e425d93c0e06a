#include "common/progress.hpp"

#include "common/error.hpp"

namespace fireq {

std::atomic<bool>& interrupt_flag() noexcept {
  static std::atomic<bool> flag{false};
  return flag;
}

void check_interrupt() {
  if (interrupt_flag().load(std::memory_order_relaxed)) {
    throw Error(ErrorKind::interrupted, "interrupted");
  }
}

}  // namespace fireq
