// CUDA calls that throw, launches with attributes, and tensor maps. Host code of the CUDA build only.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "common/error.hpp"
#include "kernels/types.hpp"

namespace fireq::kernels {

void check_cuda(cudaError_t status, const char* what);

inline cudaStream_t as_stream(Stream s) {
  return static_cast<cudaStream_t>(s);
}

// How many clusters of so many CTAs, each of which takes a multiprocessor's shared memory, run at once; 0
// where the device has none.
std::uint32_t resident_clusters(std::uint32_t ctas);

struct LaunchShape {
  std::uint32_t blocks = 1;
  std::uint32_t threads = 1;
  std::uint32_t shared_bytes = 0;
  std::uint32_t cluster = 1;
  bool programmatic = false;
  Stream stream = nullptr;
  std::uint32_t blocks_y = 1;
};

// Raises a kernel's dynamic shared memory limit and launches it.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, const char* what, Args&&... args) {
  if (shape.shared_bytes > 48 * 1024) {
    const void* entry = reinterpret_cast<const void*>(kernel);
    check_cuda(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shape.shared_bytes)),
               what);
    check_cuda(cudaFuncSetAttribute(entry, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               what);
  }
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim = {shape.cluster, 1, 1};
    ++count;
  }
  if (shape.programmatic) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks, shape.blocks_y);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = as_stream(shape.stream);
  config.attrs = attributes;
  config.numAttrs = count;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), what);
}

enum class ElementType : std::uint8_t { byte, bf16 };
// A row-major matrix [rows, cols] for tensor copies of boxes box_rows x box_cols with 128-byte swizzle;
// outside reads zeros.
CUtensorMap make_tensor_map(const void* data, ElementType type, std::uint64_t rows, std::uint64_t cols,
                            std::uint64_t pitch_bytes, std::uint32_t box_rows, std::uint32_t box_cols);

}  // namespace fireq::kernels
