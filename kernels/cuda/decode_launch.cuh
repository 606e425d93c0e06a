// Host side of the decode kernel. Each token tile has a translation unit of its own (decode8.cu ...): they
// take long to compile.
#pragma once

#include <algorithm>

#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/kernels.hpp"
#include "kernels/cuda/runtime.hpp"

namespace fireq::kernels {

// Ring depths fill the half of shared memory that a CTA may use. At 64 tokens in a grid no register is left
// for a tokens' ring out of step.
template <std::uint32_t kTokens, std::uint32_t kWeightStages, std::uint32_t kTokenStages, Division kDivision>
using Depths = DecodeTraits<kTokens, decode_groups_per_unit(kTokens), kWeightStages, kTokenStages, kDivision>;
template <std::uint32_t kTokens, Division kDivision>
struct Choice;
template <>
struct Choice<8, Division::grid> : Depths<8, 6, 5, Division::grid> {};
template <>
struct Choice<8, Division::clusters> : Depths<8, 5, 8, Division::clusters> {};
template <>
struct Choice<8, Division::halves> : Depths<8, 4, 7, Division::halves> {};
template <>
struct Choice<16, Division::grid> : Depths<16, 5, 5, Division::grid> {};
template <>
struct Choice<16, Division::clusters> : Depths<16, 5, 4, Division::clusters> {};
template <>
struct Choice<16, Division::halves> : Depths<16, 4, 3, Division::halves> {};
template <Division kDivision>
struct Choice<32, kDivision> : Depths<32, 8, 4, kDivision> {};
template <Division kDivision>
struct Choice<64, kDivision> : Depths<64, 5, 4, kDivision> {};
template <>
struct Choice<64, Division::grid> : Depths<64, 4, 4, Division::grid> {};

// CTAs of a launch in clusters: where there are fewer of them than multiprocessors, one each (keep_place).
// Clusters of four do not fill the GPU's processing clusters anyway.
inline std::uint32_t places(const SplitPlan& plan, std::uint32_t token_tiles, std::uint32_t multiprocessors) {
  if (plan.shares > 2) return plan.workers;
  return std::max(plan.workers, multiprocessors / token_tiles / plan.shares * plan.shares);
}

template <class Traits>
void launch_decode_traits(const GemmProblem& problem, const GemmConfig& config, std::uint32_t multiprocessors,
                          const GemmOptions& options) {
  const WeightRef& w = problem.w;
  DecodeParams p{};
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
  p.plan = decode_plan(w.rows, w.cols, config, multiprocessors);
  p.partial = half_scale(w.padded_cols());
  p.workspace = static_cast<uint4*>(options.workspace.data);
  p.dump = problem.dump;
  p.profile = options.profile;
  // Half of what the launch takes at 4 TB/s: a sleep may last twice as long as asked for.
  p.keep_nanoseconds = static_cast<std::uint32_t>(std::min<std::uint64_t>(w.rows * w.cols / 16000, 20000));
  p.groups = static_cast<std::uint32_t>(w.groups());
  const std::uint32_t token_tiles = decode_token_tiles(problem.x.tokens);
  p.tile_tokens = (p.output.tokens + token_tiles - 1) / token_tiles;
  const CUtensorMap map = make_tensor_map(problem.x.x8, ElementType::byte, problem.x.tokens, w.cols,
                                          problem.x.pitch, p.tile_tokens, kGroup);
  const LaunchShape shape{Traits::kClusters ? places(p.plan, token_tiles, multiprocessors) : p.plan.workers,
                          kDecodeThreads,
                          Traits::kSharedBytes,
                          Traits::kClusters ? p.plan.shares : 1,
                          options.programmatic,
                          options.stream,
                          token_tiles};
  if (problem.dump != nullptr)
    launch(decode_kernel<Traits, Variant::dump>, shape, "decode kernel, operand dump", map, p);
  else if (options.profile != nullptr)
    launch(decode_kernel<Traits, Variant::profile>, shape, "decode kernel, profiled", map, p);
  else
    launch(decode_kernel<Traits, Variant::plain>, shape, "decode kernel", map, p);
}

template <std::uint32_t kTokens>
void launch_decode_tile(const GemmProblem& problem, const GemmConfig& config, std::uint32_t multiprocessors,
                        const GemmOptions& options) {
  if (config.row_tile == kHalfRows) {
    launch_decode_traits<Choice<kTokens, Division::halves>>(problem, config, multiprocessors, options);
  } else if (one_block_a_cluster(config)) {
    launch_decode_traits<Choice<kTokens, Division::clusters>>(problem, config, multiprocessors, options);
  } else {
    launch_decode_traits<Choice<kTokens, Division::grid>>(problem, config, multiprocessors, options);
  }
}

}  // namespace fireq::kernels
