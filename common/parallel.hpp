// Threads: one loop over independent items, on a pool of threads that sleep between loops. Results never
// depend on the thread count as long as the body writes only what belongs to its item.
#pragma once

#include <cstddef>
#include <functional>

namespace fireq {

// Calls body(i) for i in [0, n), dynamically scheduled over `threads` threads (0: all available; capped at
// n). The first exception thrown by a body is rethrown here after every thread stopped. Nested calls, and
// calls while another thread's loop runs, run serially.
void parallel_for(std::size_t n, int threads, const std::function<void(std::size_t)>& body);

// Number of threads that `threads` (0 = all processors this process may run on) means here.
int resolve_threads(int threads) noexcept;

}  // namespace fireq
