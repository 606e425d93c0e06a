#include "kernels/cuda/prefill_launch.cuh"

namespace fireq::kernels {
template void launch_prefill_tile<224>(const GemmProblem&, const GemmConfig&, std::uint32_t,
                                       const GemmOptions&);
}
