// Row kernels of a bf16 layer, for the FFN bench. Rows are contiguous, columns a multiple of 8; rmsnorm takes
// up to 4096.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fireq::kernels::bench {

void rmsnorm_bf16(const std::uint16_t* x, const float* weight, std::uint16_t* out, std::uint32_t tokens,
                  std::uint32_t cols, cudaStream_t stream);
// gate_up [tokens, 2 cols], gate first.
void silu_mul_bf16(const std::uint16_t* gate_up, std::uint16_t* out, std::uint32_t tokens, std::uint32_t cols,
                   cudaStream_t stream);

}  // namespace fireq::kernels::bench
