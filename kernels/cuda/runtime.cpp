#include "kernels/cuda/runtime.hpp"

#include "kernels/gemm_config.hpp"

namespace fireq::kernels {

void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error(ErrorKind::environment, std::string(what) + ": CUDA error")
      .found(std::string(cudaGetErrorName(status)) + ", " + cudaGetErrorString(status));
}

int device_count() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

DeviceInfo current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "device query");
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, device), "device query");
  DeviceInfo info;
  info.compute_capability = properties.major * 10 + properties.minor;
  info.multiprocessors = static_cast<std::uint32_t>(properties.multiProcessorCount);
  info.name = properties.name;
  if (info.compute_capability == 90) {
    info.clusters_of_4 = resident_clusters(4);
    info.clusters_of_8 = resident_clusters(8);
  }
  return info;
}

namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                 CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill);

// Asked of the driver at run time, so that the library links without libcuda.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check_cuda(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result),
        "tensor map");
    if (result != cudaDriverEntryPointSuccess || entry == nullptr)
      throw Error(ErrorKind::environment, "the driver has no cuTensorMapEncodeTiled")
          .hint("install a newer driver");
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return function;
}

}  // namespace

CUtensorMap make_tensor_map(const void* data, ElementType type, std::uint64_t rows, std::uint64_t cols,
                            std::uint64_t pitch_bytes, std::uint32_t box_rows, std::uint32_t box_cols) {
  CUtensorMap map{};
  const cuuint64_t size[2] = {cols, rows};
  const cuuint64_t stride[1] = {pitch_bytes};
  const cuuint32_t box[2] = {box_cols, box_rows};
  const cuuint32_t element_stride[2] = {1, 1};
  const CUtensorMapDataType kind =
      type == ElementType::byte ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult status =
      encode_tiled()(&map, kind, 2, const_cast<void*>(data), size, stride, box, element_stride,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw Error(ErrorKind::usage, "these activations cannot be described to the tensor copy")
        .expected("16-byte aligned rows")
        .found("shape " + std::to_string(rows) + " x " + std::to_string(cols) + ", pitch " +
               std::to_string(pitch_bytes) + " bytes, driver error " +
               std::to_string(static_cast<int>(status)));
  return map;
}

}  // namespace fireq::kernels
