// The functions and numbers used here are the CUDA driver API's and NVML's stable ones (docs.nvidia.com/cuda/
// cuda-driver-api, docs.nvidia.com/deploy/nvml-api): a build without the CUDA toolkit asks them too.
#include "apps/gpu_driver.hpp"

#include <dlfcn.h>

#include <array>

namespace fireq::apps {
namespace {

// A shared library that is closed again, with functions looked up by name.
class Library {
 public:
  explicit Library(const char* name) : handle_(::dlopen(name, RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ != nullptr) return;
    const char* why = ::dlerror();
    problem_ = why == nullptr ? "cannot be loaded" : why;
  }
  ~Library() {
    if (handle_ != nullptr) ::dlclose(handle_);
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  explicit operator bool() const noexcept { return handle_ != nullptr; }
  const std::string& problem() const noexcept { return problem_; }

  template <typename Function>
  bool resolve(Function& function, const char* name) const {
    function = reinterpret_cast<Function>(::dlsym(handle_, name));
    return function != nullptr;
  }

 private:
  void* handle_;
  std::string problem_;
};

constexpr int kMultiprocessorCount = 16, kCapabilityMajor = 75, kCapabilityMinor = 76;  // CUdevice_attribute

std::string driver_version() {
  const Library nvml("libnvidia-ml.so.1");
  int (*init)() = nullptr;
  int (*version)(char*, unsigned) = nullptr;
  int (*shutdown)() = nullptr;
  if (!nvml || !nvml.resolve(init, "nvmlInit_v2") || !nvml.resolve(version, "nvmlSystemGetDriverVersion") ||
      !nvml.resolve(shutdown, "nvmlShutdown") || init() != 0)
    return {};
  std::array<char, 96> text{};
  const int status = version(text.data(), static_cast<unsigned>(text.size() - 1));
  shutdown();
  return status == 0 ? std::string(text.data()) : std::string();
}

// What can be asked of the driver once it is initialised.
struct Driver {
  int (*init)(unsigned) = nullptr;
  int (*version)(int*) = nullptr;
  int (*error_name)(int, const char**) = nullptr;
  int (*device_count)(int*) = nullptr;
  int (*device)(int*, int) = nullptr;
  int (*name)(char*, int, int) = nullptr;
  int (*attribute)(int*, int, int) = nullptr;
  int (*memory)(std::size_t*, int) = nullptr;

  bool resolve(const Library& library) {
    return library.resolve(init, "cuInit") && library.resolve(version, "cuDriverGetVersion") &&
           library.resolve(error_name, "cuGetErrorName") &&
           library.resolve(device_count, "cuDeviceGetCount") && library.resolve(device, "cuDeviceGet") &&
           library.resolve(name, "cuDeviceGetName") && library.resolve(attribute, "cuDeviceGetAttribute") &&
           library.resolve(memory, "cuDeviceTotalMem_v2");
  }
  std::string describe(int status) const {
    const char* text = nullptr;
    if (error_name(status, &text) == 0 && text != nullptr) return text;
    return "error " + std::to_string(status);
  }
};

int read_device(const Driver& driver, int index, GpuInfo& out) {
  int device = 0, major = 0, minor = 0;
  std::size_t memory = 0;
  std::array<char, 256> name{};
  int status = driver.device(&device, index);
  if (status == 0) status = driver.name(name.data(), static_cast<int>(name.size() - 1), device);
  if (status == 0) status = driver.attribute(&major, kCapabilityMajor, device);
  if (status == 0) status = driver.attribute(&minor, kCapabilityMinor, device);
  if (status == 0) status = driver.attribute(&out.multiprocessors, kMultiprocessorCount, device);
  if (status == 0) status = driver.memory(&memory, device);
  out.name = name.data();
  out.compute_capability = 10 * major + minor;
  out.memory = memory;
  return status;
}

}  // namespace

GpuDriver probe_gpu_driver() {
  GpuDriver out;
  const Library cuda("libcuda.so.1");
  if (!cuda) {
    out.problem = cuda.problem();
    return out;
  }
  out.found = true;
  out.version = driver_version();
  Driver driver;
  if (!driver.resolve(cuda)) {
    out.problem = "libcuda.so.1 lacks functions of the driver API";
    return out;
  }
  int status = driver.init(0);
  int count = 0;
  if (status == 0) status = driver.version(&out.cuda_version);
  if (status == 0) status = driver.device_count(&count);
  for (int i = 0; status == 0 && i < count; ++i) {
    GpuInfo device;
    status = read_device(driver, i, device);
    if (status == 0) out.devices.push_back(std::move(device));
  }
  if (status != 0) out.problem = "the driver says " + driver.describe(status);
  return out;
}

}  // namespace fireq::apps
