// What the benches share: random operands spread over more memory than the L2 holds, cuBLASLt peers, timing
// by CUDA graphs, and the SM clock.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/device_memory.hpp"
#include "kernels/profile.hpp"

namespace fireq::kernels::bench {

// Levels without a zero, near to a normal-float set.
inline constexpr std::array<float, 8> kLevels{0.3386F, 1.0245F, 1.7372F, 2.5007F,
                                              3.3519F, 4.3583F, 5.6813F, 8.0F};

// Fill device memory from a random block, each copy rotated differently. Weight tiles get scale bytes of
// usual size.
void fill_tiles(std::uint8_t* tiles, std::size_t bytes, std::uint32_t seed);
void fill_fp8_normal(std::uint8_t* data, std::size_t count, std::uint32_t seed);
void fill_bf16_normal(std::uint16_t* data, std::size_t count, std::uint32_t seed);

// SM clock in MHz as the driver reports it now; 0 where its library is missing.
unsigned sm_clock_mhz();

struct Timing {
  double microseconds = 0;  // median, per launch
  double spread = 0;        // (90th - 10th percentile) / median
  unsigned clock_mhz = 0;
};

// One line: means over the CTAs of the times of the last launch of a chain, in microseconds after the launch
// before it ended, and the cycles that its first consumer waited.
std::string describe_profile(const std::vector<CtaProfile>& before, const std::vector<CtaProfile>& last);

// A captured chain of launches, replayed and timed as a whole.
class Chain {
 public:
  // `body(i, stream)` enqueues launch i.
  Chain(int launches, const std::function<void(int, cudaStream_t)>& body);
  ~Chain();
  Chain(const Chain&) = delete;
  Chain& operator=(const Chain&) = delete;
  // Replays for about `milliseconds` and appends each replay's microseconds per launch.
  void run(double milliseconds, std::vector<double>& samples, unsigned& clock_mhz);
  double once();  // one replay, microseconds per launch

 private:
  int launches_;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

Timing summarize(std::vector<double> samples, unsigned clock_mhz);

// D[M, N] bf16 = X[M, K] W[N, K]^T by cuBLASLt: FP8 with fast accumulation, or bf16.
class CublasGemm {
 public:
  CublasGemm(bool fp8, std::uint64_t m, std::uint64_t n, std::uint64_t k);
  ~CublasGemm();
  CublasGemm(const CublasGemm&) = delete;
  CublasGemm& operator=(const CublasGemm&) = delete;
  int algorithms() const { return static_cast<int>(found_.size()); }
  // With `addend` (bf16 like D) it is added.
  void run(int algorithm, const void* w, const void* x, void* d, cudaStream_t stream,
           const void* addend = nullptr);
  int fastest(const void* w, const void* x, void* d);  // the algorithm, by a short trial of each

 private:
  cublasLtHandle_t handle_ = nullptr;
  cublasLtMatmulDesc_t op_ = nullptr;
  cublasLtMatrixLayout_t a_ = nullptr, b_ = nullptr, d_ = nullptr;
  std::vector<cublasLtMatmulHeuristicResult_t> found_;
  DeviceBuffer<std::uint8_t> workspace_;
};

}  // namespace fireq::kernels::bench
