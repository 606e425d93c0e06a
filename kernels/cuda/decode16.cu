#include "kernels/cuda/decode_launch.cuh"

namespace fireq::kernels {
template void launch_decode_tile<16>(const GemmProblem&, const GemmConfig&, std::uint32_t,
                                     const GemmOptions&);
}
