// What compute-sanitizer's racecheck can judge: rings of shared memory that a producer warp fills by bulk
// copies and eight warps read, with handshakes that are right or wrong by construction. scripts/gpu-check
// runs racecheck over each and reports what the tool says of it, beside what it says of the kernels.
//   racecheck_probe all-lanes|one-lane|one-lane-cluster|one-lane-guarded|early
// Exit codes: 0 the sums are right, 1 they are not, 2 usage.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/runtime.hpp"

namespace fireq::kernels {
namespace {

enum class Handshake : std::uint8_t {
  all_lanes,  // right: every lane arrives after its own load
  one_lane,   // right: the warp's lanes meet, then one arrives
  guarded,    // the same, and the producer's lanes meet after their wait
  early       // wrong: the lanes arrive before they load
};

constexpr std::uint32_t kStages = 2, kUnits = 9, kReaders = 256, kUnitBytes = kReaders * 16;

template <Handshake kHandshake, bool kCluster>
__global__ void __launch_bounds__(kReaders + 32, 1)
    ring(const std::uint8_t* source, std::uint32_t units, std::uint32_t* sums) {
  extern __shared__ __align__(1024) std::uint8_t bytes[];
  __shared__ std::uint64_t barriers[2 * kStages];
  const std::uint32_t base = ptx::smem_address(bytes);
  const auto full = [&](std::uint32_t stage) { return ptx::smem_address(barriers + stage); };
  const auto empty = [&](std::uint32_t stage) { return ptx::smem_address(barriers + kStages + stage); };
  const std::uint32_t warp = __shfl_sync(0xffffffffU, threadIdx.x / 32, 0);
  const std::uint32_t lane = ptx::lane_index();
  constexpr bool kAll = kHandshake == Handshake::all_lanes || kHandshake == Handshake::early;
  if (threadIdx.x == 0) {
    for (std::uint32_t s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full(s), 1);
      ptx::mbarrier_init(empty(s), kAll ? kReaders : kReaders / 32);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if constexpr (kCluster) ptx::cluster_sync();
  if (warp == kReaders / 32) {
    for (std::uint32_t u = 0; u < units; ++u) {
      const std::uint32_t stage = u % kStages;
      if (u >= kStages) ptx::mbarrier_wait(empty(stage), (u / kStages + 1) % 2);
      if (kHandshake == Handshake::guarded) asm volatile("bar.warp.sync 0xffffffff;" ::: "memory");
      if (ptx::elect_one()) {
        ptx::mbarrier_expect(full(stage), kUnitBytes);
        ptx::bulk_load(base + stage * kUnitBytes, source + u * kUnitBytes, kUnitBytes, full(stage));
      }
      __syncwarp();
    }
  } else {
    std::uint32_t sum = 0;
    for (std::uint32_t u = 0; u < units; ++u) {
      const std::uint32_t stage = u % kStages;
      ptx::mbarrier_wait(full(stage), u / kStages % 2);
      if (kHandshake == Handshake::early) ptx::mbarrier_arrive_if(empty(stage), true);
      const uint4 v = ptx::load_shared_16(base + stage * kUnitBytes + 16 * threadIdx.x);
      sum += v.x + v.y + v.z + v.w;
      asm volatile("" : "+r"(sum)::"memory");
      if (kHandshake == Handshake::all_lanes) ptx::mbarrier_arrive_if(empty(stage), true);
      if (!kAll) {
        __syncwarp();
        ptx::mbarrier_arrive_if(empty(stage), lane == 0);
      }
    }
    sums[blockIdx.x * kReaders + threadIdx.x] = sum;
  }
  if constexpr (kCluster) {
    __syncwarp();
    ptx::cluster_sync();
  }
}

template <Handshake kHandshake, bool kCluster>
int probe() {
  std::vector<std::uint32_t> source(kUnits * kUnitBytes / 4);
  for (std::size_t i = 0; i < source.size(); ++i) source[i] = static_cast<std::uint32_t>(i * 2654435761U);
  constexpr std::uint32_t kBlocks = 2;
  std::vector<std::uint32_t> sums(kBlocks * kReaders, 0xffffffffU);
  std::uint8_t* in = nullptr;
  std::uint32_t* out = nullptr;
  check_cuda(cudaMalloc(&in, source.size() * 4), "source");
  check_cuda(cudaMalloc(&out, sums.size() * 4), "sums");
  check_cuda(cudaMemcpy(in, source.data(), source.size() * 4, cudaMemcpyHostToDevice), "source");
  check_cuda(cudaMemcpy(out, sums.data(), sums.size() * 4, cudaMemcpyHostToDevice), "poison");
  LaunchShape shape{kBlocks, kReaders + 32, kStages * kUnitBytes};
  if (kCluster) shape.cluster = 2;
  launch(ring<kHandshake, kCluster>, shape, "ring", in, kUnits, out);
  check_cuda(cudaDeviceSynchronize(), "ring");
  check_cuda(cudaMemcpy(sums.data(), out, sums.size() * 4, cudaMemcpyDeviceToHost), "sums");
  check_cuda(cudaFree(in), "source");
  check_cuda(cudaFree(out), "sums");
  for (std::uint32_t i = 0; i < sums.size(); ++i) {
    std::uint32_t want = 0;
    for (std::uint32_t u = 0; u < kUnits; ++u)
      for (std::uint32_t j = 0; j < 4; ++j) want += source[u * kUnitBytes / 4 + i % kReaders * 4 + j];
    if (sums[i] != want) {
      std::printf("thread %u summed %08x instead of %08x\n", i, sums[i], want);
      return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace fireq::kernels

int main(int argc, char** argv) {
  using namespace fireq::kernels;
  const char* name = argc == 2 ? argv[1] : "";
  if (std::strcmp(name, "all-lanes") == 0) return probe<Handshake::all_lanes, false>();
  if (std::strcmp(name, "one-lane") == 0) return probe<Handshake::one_lane, false>();
  if (std::strcmp(name, "one-lane-cluster") == 0) return probe<Handshake::one_lane, true>();
  if (std::strcmp(name, "all-lanes-cluster") == 0) return probe<Handshake::all_lanes, true>();
  if (std::strcmp(name, "one-lane-guarded") == 0) return probe<Handshake::guarded, true>();
  if (std::strcmp(name, "early") == 0) return probe<Handshake::early, false>();
  std::fprintf(stderr, "racecheck_probe: no such handshake\n");
  return 2;
}
