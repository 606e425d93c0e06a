// Launchers of the single kernels, one translation unit each; gemm.cpp chooses among them after it has
// checked the operands.
#pragma once

#include "kernels/gemm.hpp"

namespace fireq::kernels {

struct GemmProblem {
  const TokensRef& x;
  const WeightRef& w;
  const OutputRef& y;
  const Epilogue& epilogue;
  std::uint8_t* dump = nullptr;  // non-null: write the operands there instead of caring for y
};

// What OutputParams::paired asks.
inline bool stored_in_pairs(const GemmProblem& problem) {
  const Epilogue& e = problem.epilogue;
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 4 == 0; };
  return problem.w.rows % 2 == 0 && problem.y.pitch % 2 == 0 && problem.y.pitch < (std::uint64_t{1} << 32U) &&
         aligned(problem.y.data) &&
         (e.residual == nullptr || (e.residual_pitch % 2 == 0 && aligned(e.residual)));
}

void launch_portable(const GemmProblem& problem, const GemmOptions& options);
// One token tile's launcher, instantiated in a translation unit each.
template <std::uint32_t kTokens>
void launch_decode_tile(const GemmProblem& problem, const GemmConfig& config, std::uint32_t multiprocessors,
                        const GemmOptions& options);
template <std::uint32_t kTokens>
void launch_prefill_tile(const GemmProblem& problem, const GemmConfig& config, std::uint32_t multiprocessors,
                         const GemmOptions& options);
void launch_decode(const GemmProblem& problem, const GemmConfig& config, std::uint32_t multiprocessors,
                   const GemmOptions& options);
std::size_t decode_workspace_bytes(std::uint32_t multiprocessors);
void launch_prefill(const GemmProblem& problem, const GemmConfig& config, std::uint32_t multiprocessors,
                    const GemmOptions& options);
std::size_t prefill_workspace_bytes(std::uint32_t multiprocessors);
// `scratch`: at least N * Kp bytes, 256-byte aligned, plus cuBLASLt's own workspace.
void launch_cublas(const GemmProblem& problem, void* scratch, std::size_t scratch_bytes,
                   const GemmOptions& options);

}  // namespace fireq::kernels
