#include "common/parallel.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <ctime>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace fireq {
namespace {

TEST(ParallelFor, CallsEveryItemOnce) {
  for (const int threads : {0, 1, 2, 3, 7}) {
    for (const std::size_t n : {0U, 1U, 2U, 6U, 7U, 8U, 1000U}) {
      std::vector<std::atomic<int>> calls(n);
      parallel_for(n, threads, [&](std::size_t i) { ++calls[i]; });
      for (std::size_t i = 0; i < n; ++i) EXPECT_EQ(calls[i], 1) << i << " of " << n << ", " << threads;
    }
  }
}

// Two items that wait for each other: only two threads can finish them.
TEST(ParallelFor, RunsAtTheSameTime) {
  std::atomic<int> arrived{0};
  std::atomic<bool> met{true};
  parallel_for(2, 2, [&](std::size_t) {
    ++arrived;
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (arrived < 2) {
      if (std::chrono::steady_clock::now() > until) {
        met = false;
        return;
      }
      std::this_thread::yield();
    }
  });
  EXPECT_TRUE(met);
}

TEST(ParallelFor, OneThreadIsTheCaller) {
  std::set<std::thread::id> ids;
  parallel_for(100, 1, [&](std::size_t) { ids.insert(std::this_thread::get_id()); });
  EXPECT_EQ(ids, std::set<std::thread::id>{std::this_thread::get_id()});
}

TEST(ParallelFor, ThrowsWhatABodyThrewAndWorksAfterwards) {
  for (const int threads : {1, 2, 7}) {
    std::string said;
    try {
      parallel_for(1000, threads, [](std::size_t i) {
        if (i == 3) throw std::runtime_error("item 3");
      });
    } catch (const std::runtime_error& e) {
      said = e.what();
    }
    EXPECT_EQ(said, "item 3");
    std::atomic<std::size_t> sum{0};
    parallel_for(100, threads, [&](std::size_t i) { sum += i; });
    EXPECT_EQ(sum, 4950U);
  }
}

TEST(ParallelFor, NestedLoopsAndLoopsOfOtherThreadsComplete) {
  std::atomic<int> calls{0};
  parallel_for(5, 3, [&](std::size_t) { parallel_for(7, 3, [&](std::size_t) { ++calls; }); });
  EXPECT_EQ(calls, 35);

  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 50; ++repeat) parallel_for(9, 2, [&](std::size_t) { ++calls; });
    });
  }
  for (std::thread& t : callers) t.join();
  EXPECT_EQ(calls, 35 + 4 * 50 * 9);
}

TEST(ParallelFor, ThreadsSleepBetweenLoops) {
  parallel_for(64, 4, [](std::size_t) {});
  const std::clock_t before = std::clock();  // processor time of all threads
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EXPECT_LT(static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC, 0.1);
}

TEST(ResolveThreads, TakesTheNumberOrWhatTheProcessMayUse) {
  EXPECT_EQ(resolve_threads(5), 5);
  EXPECT_GE(resolve_threads(0), 1);
}

}  // namespace
}  // namespace fireq
