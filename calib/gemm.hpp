// C[m, n] = sum_k A[m, k] * B[n, k] in FP32 (B is a weight matrix, row-major), in fixed tiles: the same bits
// for any thread count.
#pragma once

#include <cstdint>
#include <span>

namespace fireq::calib {

void gemm_nt(std::span<const float> a, std::span<const float> b, std::span<float> c, std::uint64_t m,
             std::uint64_t n, std::uint64_t k, int threads);

}  // namespace fireq::calib
