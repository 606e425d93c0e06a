// Host side of the decode kernel, and its instances.
#include <algorithm>

#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/kernels.hpp"
#include "kernels/cuda/runtime.hpp"

namespace fireq::kernels {

namespace {

// Ring depths fill the half of shared memory that a CTA may use.
template <std::uint32_t kTokens, std::uint32_t kWeightStages, std::uint32_t kTokenStages, bool kAhead>
using Depths = DecodeTraits<kTokens, decode_groups_per_unit(kTokens), kWeightStages, kTokenStages, kAhead>;
template <std::uint32_t kTokens, bool kAhead>
struct Choice;
template <bool kAhead>
struct Choice<8, kAhead> : Depths<8, 6, 5, kAhead> {};
template <bool kAhead>
struct Choice<16, kAhead> : Depths<16, 5, 5, kAhead> {};
template <bool kAhead>
struct Choice<32, kAhead> : Depths<32, 7, 8, kAhead> {};
template <bool kAhead>
struct Choice<64, kAhead> : Depths<64, 5, 4, kAhead> {};

template <class Traits>
void launch_traits(const GemmProblem& problem, const GemmConfig& config, std::uint32_t multiprocessors,
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
              static_cast<std::uint32_t>(w.rows)};
  std::copy(w.levels.begin(), w.levels.end(), p.levels.magnitude);
  p.plan = decode_plan(w.rows, w.cols, config, multiprocessors);
  p.workspace = static_cast<uint4*>(options.workspace.data);
  p.dump = problem.dump;
  p.profile = options.profile;
  p.groups = static_cast<std::uint32_t>(w.groups());
  const CUtensorMap map = make_tensor_map(problem.x.x8, ElementType::byte, problem.x.tokens, w.cols,
                                          problem.x.pitch, Traits::kTokens, kGroup);
  const LaunchShape shape{p.plan.workers,       kDecodeThreads, Traits::kSharedBytes, 1,
                          options.programmatic, options.stream};
  if (problem.dump != nullptr)
    launch(decode_kernel<Traits, Variant::dump>, shape, "decode kernel, operand dump", map, p);
  else if (options.profile != nullptr)
    launch(decode_kernel<Traits, Variant::profile>, shape, "decode kernel, profiled", map, p);
  else
    launch(decode_kernel<Traits, Variant::plain>, shape, "decode kernel", map, p);
}

template <std::uint32_t kTokens>
void launch_tokens(const GemmProblem& problem, const GemmConfig& config, std::uint32_t multiprocessors,
                   const GemmOptions& options) {
  if (config.ahead)
    launch_traits<Choice<kTokens, true>>(problem, config, multiprocessors, options);
  else
    launch_traits<Choice<kTokens, false>>(problem, config, multiprocessors, options);
}

}  // namespace

std::size_t decode_workspace_bytes(std::uint32_t multiprocessors) {
  // Two CTAs a multiprocessor, two partial row tiles each.
  return std::size_t{multiprocessors} * 4 * kTileRows * 64 * sizeof(float);
}

void launch_decode(const GemmProblem& problem, const GemmConfig& config, std::uint32_t multiprocessors,
                   const GemmOptions& options) {
  switch (config.token_tile) {
    case 8:
      return launch_tokens<8>(problem, config, multiprocessors, options);
    case 16:
      return launch_tokens<16>(problem, config, multiprocessors, options);
    case 32:
      return launch_tokens<32>(problem, config, multiprocessors, options);
    case 64:
      return launch_tokens<64>(problem, config, multiprocessors, options);
    default:
      throw Error(ErrorKind::usage, "no decode kernel with this token tile").found(to_string(config));
  }
}

}  // namespace fireq::kernels
