// Benches of the GPU kernels: one run, peers interleaved, weights rotated through more memory than the L2
// holds, medians of graph replays. Behind `fireq bench gemm` and `fireq bench ffn`. Error(environment)
// without CUDA or a GPU.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/gemm_config.hpp"

namespace fireq::kernels::bench {

struct Shape {
  std::uint64_t n = 0, k = 0;  // output and input channels
};
// "NxK" or a model's set: llama3-8b, llama2-7b, llama2-13b, llama3-70b. Error(usage) for anything else.
std::vector<Shape> shapes_of(const std::string& word);

using Print = std::function<void(const std::string& line)>;

struct GemmBenchOptions {
  std::vector<Shape> shapes;
  std::vector<std::uint64_t> tokens;
  std::vector<std::string> only;  // configurations or routes; empty: all but the portable kernel
  double milliseconds = 4;        // a candidate and round
  int rounds = 3;
  bool bf16 = false;     // cuBLASLt bf16 as another peer
  bool check = true;     // compare outputs with the portable kernel
  bool serial = false;   // no programmatic dependent launch
  bool profile = false;  // also where a launch's time goes, stage by stage
  bool best = false;     // print the fastest configuration of each kernel and the heuristic's choice only
};
struct GemmBenchRow {
  std::uint64_t n = 0, k = 0, m = 0;
  std::string config;   // of ours, "cublas fp8" or "cublas bf16"
  bool chosen = false;  // by the heuristic
  double microseconds = 0;
  double roof_microseconds = 0;  // max(N K (1/2 + 1/128) / bandwidth, 2 M N K / FP8 rate)
  double spread = 0;             // (90th - 10th percentile) / median
  double speed_over_fp8 = 0;
  double difference = 0;  // relative Frobenius norm, to the portable kernel
  unsigned clock_mhz = 0;
  double roof_fraction() const { return roof_microseconds / microseconds; }
  double tflops() const;
};
struct GemmBenchResult {
  DeviceInfo device;
  double bandwidth = 0, fp8_rate = 0;  // of the roof: bytes and operations a second
  std::vector<GemmBenchRow> rows;
  int wrong = 0;  // configurations too far from the portable kernel
};
GemmBenchResult run_gemm_bench(const GemmBenchOptions& options, const Print& print);

struct FfnBenchOptions {
  std::uint64_t hidden = 4096, ffn = 14336;
  std::vector<std::uint64_t> tokens;
  double milliseconds = 10;
  int rounds = 3;
};
struct FfnBenchRow {
  std::uint64_t m = 0;
  double fireq = 0, fp8 = 0, bf16 = 0;  // microseconds
  unsigned clock_mhz = 0;
};
struct RowKernelRow {
  std::string name;
  std::uint64_t m = 0;
  double microseconds = 0, bytes_per_second = 0;
};
struct FfnBenchResult {
  DeviceInfo device;
  std::vector<FfnBenchRow> blocks;
  std::vector<RowKernelRow> row_kernels;
};
FfnBenchResult run_ffn_bench(const FfnBenchOptions& options, const Print& print);

}  // namespace fireq::kernels::bench
