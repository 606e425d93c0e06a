// Host side of the prefill kernel; each token tile has a translation unit of its own (prefill128.cu, ...).
#pragma once

#include <algorithm>

#include "kernels/cuda/kernels.hpp"
#include "kernels/cuda/prefill.cuh"
#include "kernels/cuda/runtime.hpp"

namespace fireq::kernels {

template <class Traits>
void launch_prefill_traits(const GemmProblem& problem, const GemmConfig& config,
                           std::uint32_t multiprocessors, const GemmOptions& options) {
  const WeightRef& w = problem.w;
  PrefillParams p{};
  p.tiles = w.tiles;
  p.token_scale = problem.x.scale;
  p.output = {w.row_scales,
              w.per_tensor ? 0U : 1U,
              problem.epilogue.bias,
              problem.epilogue.residual,
              problem.epilogue.residual_pitch,
              problem.y.data,
              problem.y.pitch,
              static_cast<std::uint32_t>(problem.x.tokens),
              static_cast<std::uint32_t>(w.rows),
              stored_in_pairs(problem)};
  std::copy(w.levels.begin(), w.levels.end(), p.levels.magnitude);
  p.plan = prefill_plan(w.rows, w.cols, problem.x.tokens, config, multiprocessors);
  p.cluster_shares = config.cluster > kPrefillCluster ? p.plan.shares : 1;
  p.workspace = static_cast<uint4*>(options.workspace.data);
  p.dump = problem.dump;
  p.profile = options.profile;
  p.groups = static_cast<std::uint32_t>(w.groups());
  p.row_tiles = static_cast<std::uint32_t>(w.row_tiles());
  p.token_tiles = static_cast<std::uint32_t>((problem.x.tokens + Traits::kTokens - 1) / Traits::kTokens);
  const bool through_l2 = config.split_k && config.cluster == kPrefillCluster;
  p.first_weights = std::min(through_l2 ? Traits::kStages : kFirstWeights, Traits::kStages);
  p.chunk = prefill_chunk(p.groups, Traits::kStages);
  p.partial = half_scale(w.padded_cols());
  p.tensor_output = problem.y.pitch % 8 == 0 && reinterpret_cast<std::uintptr_t>(problem.y.data) % 16 == 0;
  p.vector_residual = problem.epilogue.residual_pitch % 8 == 0 &&
                      reinterpret_cast<std::uintptr_t>(problem.epilogue.residual) % 16 == 0;
  const CUtensorMap token_map = make_tensor_map(problem.x.x8, ElementType::byte, problem.x.tokens, w.cols,
                                                problem.x.pitch, Traits::kTokens / kPrefillCluster, kGroup);
  const CUtensorMap out_map = p.tensor_output
                                  ? make_tensor_map(problem.y.data, ElementType::bf16, problem.x.tokens,
                                                    w.rows, problem.y.pitch * 2, Traits::kTokens, kHalfRows)
                                  : token_map;
  const LaunchShape shape{p.plan.workers * kPrefillCluster,   kPrefillThreads,      Traits::kSharedBytes,
                          kPrefillCluster * p.cluster_shares, options.programmatic, options.stream};
  if (problem.dump != nullptr)
    launch(prefill_kernel<Traits, Variant::dump>, shape, "prefill kernel, operand dump", token_map, out_map,
           p);
  else if (options.profile != nullptr)
    launch(prefill_kernel<Traits, Variant::profile>, shape, "prefill kernel, profiled", token_map, out_map,
           p);
  else
    launch(prefill_kernel<Traits, Variant::plain>, shape, "prefill kernel", token_map, out_map, p);
}

template <std::uint32_t kTokens>
void launch_prefill_tile(const GemmProblem& problem, const GemmConfig& config, std::uint32_t multiprocessors,
                         const GemmOptions& options) {
  launch_prefill_traits<PrefillTraits<kTokens, prefill_stages(kTokens)>>(problem, config, multiprocessors,
                                                                         options);
}

}  // namespace fireq::kernels
