#include "common/parallel.hpp"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <exception>

namespace fireq {

int resolve_threads(int threads) noexcept {
  return threads > 0 ? threads : std::max(1, omp_get_num_procs());
}

void parallel_for(std::size_t n, int threads, const std::function<void(std::size_t)>& body) {
  const auto team =
      static_cast<int>(std::min<std::size_t>(n, static_cast<std::size_t>(resolve_threads(threads))));
  if (team <= 1 || omp_in_parallel() != 0) {
    for (std::size_t i = 0; i < n; ++i) body(i);
    return;
  }
  std::exception_ptr failure;
  std::atomic<bool> failed{false};
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (std::size_t i = 0; i < n; ++i) {
    if (failed.load(std::memory_order_relaxed)) continue;
    try {
      body(i);
    } catch (...) {
#pragma omp critical(fireq_parallel_for)
      if (!failure) failure = std::current_exception();
      failed.store(true, std::memory_order_relaxed);
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace fireq
