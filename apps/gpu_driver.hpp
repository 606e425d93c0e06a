// The NVIDIA driver, asked through its own libraries (libcuda, NVML), which need not be there.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fireq::apps {

struct GpuInfo {
  std::string name;
  int compute_capability = 0;  // 90 for 9.0
  int multiprocessors = 0;
  std::uint64_t memory = 0;  // bytes
};

struct GpuDriver {
  bool found = false;  // libcuda.so.1 was loaded
  std::string
      problem;  // why there are no devices, in the loader's or the driver's words; empty when all is well
  std::string version;   // of the driver, from NVML; empty without NVML
  int cuda_version = 0;  // the newest CUDA that the driver runs: 13000 for 13.0
  std::vector<GpuInfo> devices;
};

GpuDriver probe_gpu_driver();

}  // namespace fireq::apps
