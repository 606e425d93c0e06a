#include "common/parallel.hpp"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace fireq {
namespace {

thread_local bool inside_loop = false;

// One loop that several threads work on.
class Loop {
 public:
  Loop(std::size_t n, const std::function<void(std::size_t)>& body) : n_(n), body_(body) {}

  void work() {
    inside_loop = true;
    for (;;) {
      const std::size_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= n_ || failed_.load(std::memory_order_relaxed)) break;
      try {
        body_(i);
      } catch (...) {
        const std::lock_guard lock(failure_mutex_);
        if (!failure_) failure_ = std::current_exception();
        failed_.store(true, std::memory_order_relaxed);
      }
    }
    inside_loop = false;
  }
  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  const std::size_t n_;
  const std::function<void(std::size_t)>& body_;
  std::atomic<std::size_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex failure_mutex_;
  std::exception_ptr failure_;
};

// Threads that sleep between loops. The caller works on its loop too and waits only for helpers that have
// come: on a busy machine a late helper costs nothing, where a barrier of spinning threads costs time slices.
class Pool {
 public:
  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : threads_) t.join();
  }

  // False when another thread's loop has the pool.
  bool run(Loop& loop, std::size_t helpers) {
    const std::unique_lock owner(owner_, std::try_to_lock);
    if (!owner) return false;
    {
      const std::lock_guard lock(mutex_);
      while (threads_.size() < helpers) threads_.emplace_back([this] { help(); });
      loop_ = &loop;
      wanted_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    loop.work();
    std::unique_lock lock(mutex_);
    wanted_ = 0;
    done_.wait(lock, [this] { return inside_ == 0; });
    loop_ = nullptr;
    return true;
  }

 private:
  void help() {
    std::uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || (wanted_ > 0 && generation_ != seen); });
      if (stop_) return;
      seen = generation_;
      --wanted_;
      ++inside_;
      Loop& loop = *loop_;
      lock.unlock();
      loop.work();
      lock.lock();
      if (--inside_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_;  // held for the length of a loop
  std::mutex mutex_;  // guards all below
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Loop* loop_ = nullptr;
  std::size_t wanted_ = 0;  // helpers that may still join the loop
  std::size_t inside_ = 0;  // helpers at work on it
  std::uint64_t generation_ = 0;
  bool stop_ = false;
};

}  // namespace

int resolve_threads(int threads) noexcept {
  if (threads > 0) return threads;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
  return static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
}

void parallel_for(std::size_t n, int threads, const std::function<void(std::size_t)>& body) {
  const std::size_t team = std::min(n, static_cast<std::size_t>(resolve_threads(threads)));
  if (team > 1 && !inside_loop) {
    static Pool pool;
    Loop loop(n, body);
    if (pool.run(loop, team - 1)) {
      loop.rethrow();
      return;
    }
  }
  for (std::size_t i = 0; i < n; ++i) body(i);
}

}  // namespace fireq
