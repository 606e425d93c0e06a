// Products from many threads at once are those of one thread, bit for bit. (A serial OpenBLAS, called without
// turns, gives two threads one work area about once in 10^4 small products.)
#include "libquant/blas.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <thread>
#include <vector>

namespace fireq::libquant {
namespace {

TEST(Blas, ProductsFromManyThreadsAreThoseOfOne) {
  constexpr std::size_t kSize = 24, kThreads = 8, kRounds = 4000;
  std::mt19937_64 random(3);
  std::normal_distribution<double> normal;
  std::vector<double> a(kSize * kSize), b(kSize * kSize);
  for (double& x : a) x = normal(random);
  for (double& x : b) x = normal(random);
  const auto product = [&] {
    std::vector<double> c(kSize * kSize, -1);
    blas::gemm(blas::Op::none, blas::Op::transpose, kSize, kSize, kSize, 1.0, {a.data(), kSize},
               {b.data(), kSize}, 0.0, {c.data(), kSize});
    return c;
  };
  const std::vector<double> alone = product();
  for (std::size_t i = 0; i < kSize; ++i) {
    double sum = 0;
    for (std::size_t k = 0; k < kSize; ++k) sum += a[k] * b[i * kSize + k];
    ASSERT_NEAR(alone[i], sum, 1e-12);
  }
  std::atomic<std::size_t> different{0};
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      for (std::size_t i = 0; i < kRounds; ++i) different += product() != alone ? 1U : 0U;
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(different, 0U);
}

}  // namespace
}  // namespace fireq::libquant
