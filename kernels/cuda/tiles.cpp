// Which instance of the decode and prefill kernels a configuration names, and the workspace that they need.
#include "common/error.hpp"
#include "kernels/cuda/kernels.hpp"
#include "kernels/sm90_layout.hpp"

namespace fireq::kernels {

std::size_t decode_workspace_bytes(std::uint32_t multiprocessors) {
  // Two CTAs a multiprocessor, a partial row tile each.
  return std::size_t{multiprocessors} * 2 * kTileRows * 64 * sizeof(float);
}

std::size_t prefill_workspace_bytes(std::uint32_t multiprocessors) {
  // A partial tile a CTA.
  return std::size_t{multiprocessors} * kTileRows * 256 * sizeof(std::uint16_t);
}

void launch_decode(const GemmProblem& problem, const GemmConfig& config, std::uint32_t multiprocessors,
                   const GemmOptions& options) {
  if (config.cluster == 0 || config.cluster > decode_most_shares(config.token_tile) ||
      (config.cluster & (config.cluster - 1)) != 0)
    throw Error(ErrorKind::usage, "no decode kernel with this cluster").found(to_string(config));
  if (config.row_tile != kTileRows && (config.row_tile != kHalfRows || config.cluster > kMostHalfShares))
    throw Error(ErrorKind::usage, "no decode kernel with this row tile").found(to_string(config));
  switch (config.token_tile) {
    case 8:
      return launch_decode_tile<8>(problem, config, multiprocessors, options);
    case 16:
      return launch_decode_tile<16>(problem, config, multiprocessors, options);
    case 32:
      return launch_decode_tile<32>(problem, config, multiprocessors, options);
    case 64:
      return launch_decode_tile<64>(problem, config, multiprocessors, options);
    default:
      throw Error(ErrorKind::usage, "no decode kernel with this token tile").found(to_string(config));
  }
}

void launch_prefill(const GemmProblem& problem, const GemmConfig& config, std::uint32_t multiprocessors,
                    const GemmOptions& options) {
  if (config.cluster != 2 && config.cluster != 4 && config.cluster != 8)
    throw Error(ErrorKind::usage, "no prefill kernel with this cluster").found(to_string(config));
  switch (config.token_tile) {
    case 128:
      return launch_prefill_tile<128>(problem, config, multiprocessors, options);
    case 160:
      return launch_prefill_tile<160>(problem, config, multiprocessors, options);
    case 192:
      return launch_prefill_tile<192>(problem, config, multiprocessors, options);
    case 224:
      return launch_prefill_tile<224>(problem, config, multiprocessors, options);
    case 256:
      return launch_prefill_tile<256>(problem, config, multiprocessors, options);
    default:
      throw Error(ErrorKind::usage, "no prefill kernel with this token tile").found(to_string(config));
  }
}

}  // namespace fireq::kernels
