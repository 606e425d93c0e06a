// Where a kernel's time goes: the profiled variant of a kernel writes one CtaProfile a CTA, read by its first
// thread. Times are the GPU's nanosecond clock (the same on all multiprocessors), waits are clock cycles.
#pragma once

#include <cstdint>

#include "kernels/profile.hpp"

namespace fireq::kernels {

enum class Variant : std::uint8_t { plain, dump, profile };

template <bool kOn>
class Stopwatch {
 public:
  __device__ __forceinline__ void stamp(Stamp) {}
  __device__ __forceinline__ void stamp_once(Stamp) {}
  __device__ __forceinline__ void begin_wait() {}
  __device__ __forceinline__ void end_wait(Waited) {}
  __device__ __forceinline__ void write(CtaProfile*) const {}
};

template <>
class Stopwatch<true> {
 public:
  __device__ __forceinline__ void stamp(Stamp s) {
    if (s == Stamp::started) start_ = clock64();
    profile_.at[static_cast<int>(s)] = now();
  }
  __device__ __forceinline__ void stamp_once(Stamp s) {
    if (profile_.at[static_cast<int>(s)] == 0) stamp(s);
  }
  __device__ __forceinline__ void begin_wait() { begin_ = clock64(); }
  __device__ __forceinline__ void end_wait(Waited w) {
    profile_.waited[static_cast<int>(w)] += static_cast<std::uint64_t>(clock64() - begin_);
  }
  __device__ __forceinline__ void write(CtaProfile* out) const {
    out += blockIdx.y * gridDim.x + blockIdx.x;
    *out = profile_;
    std::uint32_t sm;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    out->multiprocessor = sm;
    out->cycles = static_cast<std::uint64_t>(clock64() - start_);
  }

 private:
  static __device__ __forceinline__ std::uint64_t now() {
    std::uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
  }
  CtaProfile profile_{};
  long long begin_ = 0, start_ = 0;
};

}  // namespace fireq::kernels
