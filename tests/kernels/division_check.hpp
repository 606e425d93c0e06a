// For a test of the row kernels' division (kernels/cuda/activation_rows.cuh) that only a GPU has the time
// for.
#pragma once

#include <cstdint>

namespace fireq::kernels::testing {

// How many of the 2^30 quotients x / a, x each of 128 significands of bf16 and a each of 2^23 of FP32, are
// not those of IEEE division. Error(environment) where the GPU fails.
std::uint64_t wrong_quotients();

}  // namespace fireq::kernels::testing
