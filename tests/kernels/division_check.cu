#include <cuda_runtime.h>

#include "kernels/cuda/activation_rows.cuh"
#include "kernels/cuda/runtime.hpp"
#include "tests/kernels/division_check.hpp"

namespace fireq::kernels::testing {
namespace {

__global__ void count_wrong(unsigned long long* wrong) {
  const std::uint32_t bits = blockIdx.x * blockDim.x + threadIdx.x;
  const float a = __uint_as_float(0x3f800000U | bits);
  const float inverse = __frcp_rn(a);
  std::uint32_t count = 0;
  for (std::uint32_t i = 0; i < 128; ++i) {
    const float x = __uint_as_float(0x3f800000U | i << 16U);
    count += divide(x, a, inverse) != __fdiv_rn(x, a) ? 1U : 0U;
  }
  if (count != 0) atomicAdd(wrong, count);
}

}  // namespace

std::uint64_t wrong_quotients() {
  unsigned long long* wrong = nullptr;
  unsigned long long host = 0;
  check_cuda(cudaMalloc(&wrong, sizeof(host)), "division check");
  check_cuda(cudaMemset(wrong, 0, sizeof(host)), "division check");
  count_wrong<<<(1U << 23U) / 256, 256>>>(wrong);
  const cudaError_t status = cudaMemcpy(&host, wrong, sizeof(host), cudaMemcpyDeviceToHost);
  cudaFree(wrong);
  check_cuda(status, "division check");
  return host;
}

}  // namespace fireq::kernels::testing
