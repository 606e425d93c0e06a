// Decode GEMM for sm_90a, up to 64 tokens: y[M, N] = (a r) (x8 w8^T), weights streamed once from memory.
//
// The weights are the register operand of wgmma (64 rows a warpgroup) and the tokens the shared-memory one,
// so that few tokens cost few columns, and codes are expanded to FP8 between a shared-memory load and the
// multiply, each once.
//   warps 0-7   two consumer warpgroups, one 64-row half of a 128-row tile each
//   warp 8      fills the weight ring by bulk copies; never waits for the previous kernel, whose time it uses
//   to fill the ring warp 9      waits for the previous kernel (programmatic dependent launch), then fills
//   the token ring by tensor copies
// The grid is one CTA per multiprocessor; a CTA takes at most half of a multiprocessor's shared memory and
// registers, so that the next kernel's CTAs are resident, and its rings full, when this one ends. SplitPlan
// divides the row blocks; partial sums of blocks that several workers share go to a workspace in which every
// word is kEmpty between launches: the owner of a piece polls the data itself, adds in worker order (the same
// bits every time) and restores kEmpty: no counters, no fences. With a cluster of two, the CTAs take
// neighbouring row tiles of the same step along K, and each fetches half of the tokens for both: at 32 tokens
// and more, tokens would otherwise be as much L2 traffic as the weights.
//
// The accumulators of FP8 wgmma keep about 13 bits below the running sum: every kPromoteK of K they are added
// to FP32 sums and cleared.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/weight_tile.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/split_plan.hpp"

namespace fireq::kernels {

inline constexpr std::uint32_t kEmpty =
    0xffffffffU;  // a NaN that arithmetic never makes (it makes 0x7fffffff)
inline constexpr std::uint32_t kPromoteK = 2048;
inline constexpr std::uint32_t kDecodeThreads = 320;
inline constexpr std::uint32_t kDecodeSharedLimit =
    115712;  // half of a multiprocessor's 228 KB, less 1 KB a CTA

struct DecodeParams {
  const std::uint8_t* tiles;
  const float* token_scale;
  OutputParams output;
  LevelsParam levels;
  SplitPlan plan;
  uint4* workspace;
  std::uint8_t* dump;       // expanded operands [N, Kp], debug kernels only
  std::uint32_t groups;     // Kp / 128
  std::uint32_t row_tiles;  // ceil(N / 128)
};

template <std::uint32_t kTokens_, std::uint32_t kGroups_, std::uint32_t kCluster_,
          std::uint32_t kWeightStages_, std::uint32_t kTokenStages_>
struct DecodeTraits {
  static constexpr std::uint32_t kTokens = kTokens_;  // columns of the multiply
  static constexpr std::uint32_t kGroups = kGroups_;  // K groups a pipeline stage
  static constexpr std::uint32_t kCluster = kCluster_;
  static constexpr std::uint32_t kWeightStages = kWeightStages_;
  static constexpr std::uint32_t kTokenStages = kTokenStages_;
  static constexpr std::uint32_t kAccumulators = kTokens / 2;
  static constexpr std::uint32_t kBlocks =
      kTokens / 8;  // 16 x 8 accumulator blocks of a thread: four values each
  static constexpr bool kSumsInShared = kTokens >= 64;  // no registers left for a second set
  static constexpr std::uint32_t kChunk = kPromoteK / (kGroup * kGroups);  // units between promotions

  static constexpr std::uint32_t kTokenGroupBytes = kTokens * kGroup;
  static constexpr std::uint32_t kTokenStageBytes = kGroups * kTokenGroupBytes;
  static constexpr std::uint32_t kWeightStageBytes = kGroups * kTileBytes;

  static constexpr std::uint32_t kTableOffset = 0;  // 1024-byte aligned, so that an index is or-ed in
  static constexpr std::uint32_t kTokenOffset =
      kTableOffset + kTableBytes;  // 1024-byte aligned for the swizzle
  static constexpr std::uint32_t kSumOffset = kTokenOffset + kTokenStages * kTokenStageBytes;
  static constexpr std::uint32_t kWeightOffset = kSumOffset + (kSumsInShared ? 256 * kAccumulators * 4 : 0);
  static constexpr std::uint32_t kScaleOffset = kWeightOffset + kWeightStages * kWeightStageBytes;
  static constexpr std::uint32_t kBarrierOffset = kScaleOffset + 64 * 4;
  static constexpr std::uint32_t kSharedBytes = kBarrierOffset + 16 * (kWeightStages + kTokenStages);
  static_assert(kSharedBytes <= kDecodeSharedLimit);
};

template <class Traits>
struct DecodeShared {
  std::uint32_t base;
  std::uint32_t rank;  // in the cluster
  __device__ __forceinline__ std::uint32_t tokens(std::uint32_t stage) const {
    return base + Traits::kTokenOffset + stage * Traits::kTokenStageBytes;
  }
  __device__ __forceinline__ std::uint32_t weights(std::uint32_t stage) const {
    return base + Traits::kWeightOffset + stage * Traits::kWeightStageBytes;
  }
  __device__ __forceinline__ std::uint32_t weight_full(std::uint32_t stage) const {
    return base + Traits::kBarrierOffset + 8 * stage;
  }
  __device__ __forceinline__ std::uint32_t weight_empty(std::uint32_t stage) const {
    return weight_full(stage) + 8 * Traits::kWeightStages;
  }
  __device__ __forceinline__ std::uint32_t token_full(std::uint32_t stage) const {
    return base + Traits::kBarrierOffset + 16 * Traits::kWeightStages + 8 * stage;
  }
  __device__ __forceinline__ std::uint32_t token_empty(std::uint32_t stage) const {
    return token_full(stage) + 8 * Traits::kTokenStages;
  }
};

template <class Traits>
__device__ __forceinline__ void fetch_weights(const DecodeParams& p, const DecodeShared<Traits>& shared,
                                              std::uint32_t worker) {
  const std::uint64_t policy = ptx::evict_first_policy();
  RingPosition<Traits::kWeightStages> ring;
  SegmentWalk walk(p.plan, worker);
  Segment segment;
  while (walk.next(segment)) {
    // With an odd number of row tiles the last cluster's second CTA reads the last tile again and stores
    // nothing.
    const std::uint32_t tile = min(segment.block * Traits::kCluster + shared.rank, p.row_tiles - 1);
    const std::uint8_t* source = p.tiles + static_cast<std::uint64_t>(tile) * p.groups * kTileBytes;
    for (std::uint32_t unit = segment.begin; unit < segment.end; ++unit) {
      ptx::mbarrier_wait(shared.weight_empty(ring.index), ring.parity ^ 1U);
      if (ptx::elect_one()) {
        const std::uint32_t group = unit * Traits::kGroups;
        const std::uint32_t bytes = min(Traits::kGroups, p.groups - group) * kTileBytes;
        ptx::mbarrier_expect(shared.weight_full(ring.index), bytes);
        ptx::bulk_load(shared.weights(ring.index), source + static_cast<std::uint64_t>(group) * kTileBytes,
                       bytes, shared.weight_full(ring.index), policy);
      }
      __syncwarp();
      ring.advance();
    }
  }
}

template <class Traits>
__device__ __forceinline__ void fetch_tokens(const DecodeParams& p, const CUtensorMap* map,
                                             const DecodeShared<Traits>& shared, float* scales,
                                             std::uint32_t worker, std::uint32_t lane) {
  ptx::wait_for_previous_kernel();
  for (std::uint32_t m = lane; m < Traits::kTokens; m += 32)
    scales[m] = m < p.output.tokens ? __ldcg(p.token_scale + m) : 0.0F;
  __syncwarp();  // the first arrival on a token barrier publishes the scales
  RingPosition<Traits::kTokenStages> ring;
  SegmentWalk walk(p.plan, worker);
  Segment segment;
  while (walk.next(segment)) {
    for (std::uint32_t unit = segment.begin; unit < segment.end; ++unit) {
      ptx::mbarrier_wait(shared.token_empty(ring.index), ring.parity ^ 1U);
      if (ptx::elect_one()) {
        const std::uint32_t full = shared.token_full(ring.index);
        ptx::mbarrier_expect(full, Traits::kTokenStageBytes);
#pragma unroll
        for (std::uint32_t kg = 0; kg < Traits::kGroups; ++kg) {
          const std::uint32_t k = (unit * Traits::kGroups + kg) * kGroup;  // past K the copy writes zeros
          const std::uint32_t to = shared.tokens(ring.index) + kg * Traits::kTokenGroupBytes;
          if constexpr (Traits::kCluster == 1) {
            ptx::tensor_load(to, map, k, 0, full);
          } else {
            constexpr std::uint32_t kShare = Traits::kTokens / Traits::kCluster;
            ptx::tensor_load_multicast(to + shared.rank * kShare * kGroup, map, k, shared.rank * kShare, full,
                                       (1U << Traits::kCluster) - 1U);
          }
        }
      }
      __syncwarp();
      ring.advance();
    }
  }
}

__device__ __forceinline__ void publish(uint4* slot, const float* v) {
  std::uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    w[i] = __float_as_uint(v[i]);
    if (w[i] == kEmpty) w[i] = 0x7fffffffU;
  }
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(slot), "r"(w[0]), "r"(w[1]),
               "r"(w[2]), "r"(w[3])
               : "memory");
}
__device__ __forceinline__ uint4 peek(const uint4* slot) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(slot)
               : "memory");
  return v;
}
__device__ __forceinline__ bool is_full(uint4 v) {
  return v.x != kEmpty && v.y != kEmpty && v.z != kEmpty && v.w != kEmpty;
}

// Adds the partial sums of `count` slots, `stride` apart, in order.
__device__ __forceinline__ void gather(uint4* const (&slot)[4], std::uint32_t count, float (&sum)[4]) {
  uint4 v[4];
  bool full = false;
  while (!full) {
    full = true;
#pragma unroll
    for (std::uint32_t i = 0; i < 4; ++i)
      if (i < count) v[i] = peek(slot[i]);
#pragma unroll
    for (std::uint32_t i = 0; i < 4; ++i)
      if (i < count) full = full && is_full(v[i]);
  }
#pragma unroll
  for (std::uint32_t i = 0; i < 4; ++i) {
    if (i >= count) continue;
    sum[0] += __uint_as_float(v[i].x);
    sum[1] += __uint_as_float(v[i].y);
    sum[2] += __uint_as_float(v[i].z);
    sum[3] += __uint_as_float(v[i].w);
    *slot[i] = make_uint4(kEmpty, kEmpty, kEmpty, kEmpty);
  }
}

template <class Traits, bool kDump>
class DecodeConsumer {
 public:
  __device__ __forceinline__ DecodeConsumer(const DecodeParams& p, const DecodeShared<Traits>& shared,
                                            const float* scales, std::uint32_t worker, std::uint32_t warp,
                                            std::uint32_t lane)
      : p_(p),
        shared_(shared),
        scales_(scales),
        worker_(worker),
        group_(warp / 4),
        warp_(warp % 4),
        lane_(lane) {}

  __device__ __forceinline__ void run() {
    SegmentWalk walk(p_.plan, worker_);
    Segment segment;
    while (walk.next(segment)) {
      const std::uint32_t tile = segment.block * Traits::kCluster + shared_.rank;
      const bool whole = segment.begin == 0 && segment.end == p_.plan.units;
      const RowTerms terms(p_.output, first_row(tile) + lane_ / 4);
      float acc[Traits::kAccumulators];
      multiply(segment, tile, acc);
      if (tile >= p_.row_tiles) continue;
      if (whole) {
#pragma unroll
        for (std::uint32_t j = 0; j < Traits::kBlocks; ++j) {
          float v[4] = {acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]};
          emit(terms, tile, j, v);
        }
      } else {
        uint4* slot = partial(worker_, segment.block);
#pragma unroll
        for (std::uint32_t j = 0; j < Traits::kBlocks; ++j) publish(slot + 128 * j, acc + 4 * j);
      }
    }
    reduce();
  }

 private:
  __device__ __forceinline__ std::uint32_t first_row(std::uint32_t tile) const {
    return tile * kTileRows + group_ * kHalfRows + 16 * warp_;
  }
  __device__ __forceinline__ uint4* partial(std::uint32_t worker, std::uint32_t block) const {
    const std::uint64_t cta = static_cast<std::uint64_t>(worker) * Traits::kCluster + shared_.rank;
    const std::uint64_t slot = (cta * 2 + partial_slot(p_.plan, worker, block)) * 2 + group_;
    return p_.workspace + slot * (128 * Traits::kBlocks) + 32 * warp_ + lane_;
  }
  __device__ __forceinline__ void emit(const RowTerms& terms, std::uint32_t tile, std::uint32_t j,
                                       float (&v)[4]) const {
    const std::uint32_t row = first_row(tile);
    const std::uint32_t token = 8 * j + 2 * (lane_ % 4);
    finish_block(p_.output, terms, row + lane_ / 4, token, scales_[token], scales_[token + 1], v);
    store_block(p_.output, row, 8 * j, lane_, v);
  }

  // acc = sum over the segment's K of w8 x8^T.
  __device__ __forceinline__ void multiply(const Segment& segment, std::uint32_t tile,
                                           float (&acc)[Traits::kAccumulators]) {
    const std::uint32_t table = shared_.base + Traits::kTableOffset;
    float sum[Traits::kSumsInShared ? 1 : Traits::kAccumulators];
    const std::uint32_t sums =
        shared_.base + Traits::kSumOffset + 16 * (128 * Traits::kBlocks * group_ + 32 * warp_ + lane_);
    std::uint32_t a[4][4];

    std::uint32_t unit = segment.begin;
    while (unit < segment.end) {
      const bool first_chunk = unit == segment.begin;
      const std::uint32_t start = unit;
      const std::uint32_t stop = min(unit + Traits::kChunk, segment.end);
#pragma unroll
      for (std::uint32_t i = 0; i < Traits::kAccumulators; ++i) acc[i] = 0.0F;
      pin(acc);
      for (; unit < stop; ++unit) {
        ptx::mbarrier_wait(shared_.weight_full(weights_.index), weights_.parity);
        const std::uint32_t half = shared_.weights(weights_.index) + group_ * kHalfBytes;
        WeightFragment fragment[Traits::kGroups];
#pragma unroll
        for (std::uint32_t kg = 0; kg < Traits::kGroups; ++kg)
          fragment[kg].load(half + kg * kTileBytes, table, warp_, lane_);
        __syncwarp();
        ptx::mbarrier_arrive_if(shared_.weight_empty(weights_.index), lane_ == 0);
        weights_.advance();
        const std::uint64_t descriptor = wgmma_descriptor(shared_.tokens(tokens_.index));
#pragma unroll
        for (std::uint32_t kg = 0; kg < Traits::kGroups; ++kg) {
#pragma unroll
          for (std::uint32_t s = 0; s < 4; ++s) {
            wgmma_wait<3>();  // the multiply that read a[s] last is done
            if (kg == 0 && s == 3) release_tokens(tokens_.previous(), unit != start);
            fragment[kg].expand(s, a[s]);
            pin(a[s]);
            if constexpr (kDump)
              if (tile < p_.row_tiles)
                dump_fragment(p_.dump, p_.output.rows, p_.groups, first_row(tile),
                              unit * Traits::kGroups + kg, s, lane_, a[s]);
            if (kg == 0 && s == 0) ptx::mbarrier_wait(shared_.token_full(tokens_.index), tokens_.parity);
            wgmma_fence();
            Wgmma<Traits::kTokens>::multiply(acc, a[s],
                                             descriptor + kg * (Traits::kTokenGroupBytes / 16) + 2 * s);
            wgmma_commit();
          }
        }
        tokens_.advance();
      }
      wgmma_wait<0>();
      pin(acc);
      release_tokens(tokens_.previous(), true);
      promote(first_chunk, unit == segment.end, sums, sum, acc);
    }
  }

  // Adds a chunk's accumulators to the FP32 sums; after the last chunk acc holds the total.
  template <std::size_t kSums>
  __device__ __forceinline__ void promote(bool first, bool last, std::uint32_t sums, float (&sum)[kSums],
                                          float (&acc)[Traits::kAccumulators]) const {
    if constexpr (!Traits::kSumsInShared) {
#pragma unroll
      for (std::uint32_t i = 0; i < Traits::kAccumulators; ++i) {
        sum[i] = first ? acc[i] : sum[i] + acc[i];
        acc[i] = sum[i];
      }
    } else {
#pragma unroll
      for (std::uint32_t j = 0; j < Traits::kBlocks; ++j) {
        float* v = acc + 4 * j;
        if (!first) {
          const uint4 s = ptx::load_shared_16(sums + 2048 * j);
          v[0] += __uint_as_float(s.x);
          v[1] += __uint_as_float(s.y);
          v[2] += __uint_as_float(s.z);
          v[3] += __uint_as_float(s.w);
        }
        if (!last)
          ptx::store_shared_16(sums + 2048 * j, make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]),
                                                           __float_as_uint(v[2]), __float_as_uint(v[3])));
      }
    }
  }

  // One arrival a warp, at every CTA of the cluster that writes this ring.
  __device__ __forceinline__ void release_tokens(std::uint32_t stage, bool condition) const {
    if constexpr (Traits::kCluster == 1) {
      ptx::mbarrier_arrive_if(shared_.token_empty(stage), condition && lane_ == 0);
    } else {
      ptx::mbarrier_arrive_cluster_if(shared_.token_empty(stage), lane_,
                                      condition && lane_ < Traits::kCluster);
    }
  }

  // Sums and stores this worker's pieces (a warpgroup's 64 rows x 8 tokens) of the blocks that it shares.
  __device__ __forceinline__ void reduce() const {
    SegmentWalk walk(p_.plan, worker_);
    Segment segment;
    while (walk.next(segment) && segment.block < p_.plan.split_blocks) {
      const std::uint32_t tile = segment.block * Traits::kCluster + shared_.rank;
      if ((segment.begin == 0 && segment.end == p_.plan.units) || tile >= p_.row_tiles) continue;
      const std::uint32_t first = p_.plan.first_worker(segment.block);
      const std::uint32_t workers = p_.plan.last_worker(segment.block) - first + 1;
      const RowTerms terms(p_.output, first_row(tile) + lane_ / 4);
      for (std::uint32_t j = 0; j < Traits::kBlocks; ++j) {
        if ((group_ * Traits::kBlocks + j) % workers != worker_ - first) continue;
        float sum[4] = {0.0F, 0.0F, 0.0F, 0.0F};
        for (std::uint32_t c = 0; c < workers; c += 4) {
          uint4* slot[4];
#pragma unroll
          for (std::uint32_t i = 0; i < 4; ++i)
            slot[i] = partial(first + min(c + i, workers - 1), segment.block) + 128 * j;
          gather(slot, workers - c, sum);
        }
        __syncwarp();
        emit(terms, tile, j, sum);
      }
    }
  }

  const DecodeParams& p_;
  const DecodeShared<Traits>& shared_;
  const float* scales_;
  std::uint32_t worker_, group_, warp_, lane_;
  RingPosition<Traits::kWeightStages> weights_;
  RingPosition<Traits::kTokenStages> tokens_;
};

template <class Traits, bool kDump>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    decode_kernel(const __grid_constant__ CUtensorMap token_map, const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  // Shuffles make values that the compiler takes for uniform and does not compute again in the loop.
  const std::uint32_t warp = __shfl_sync(0xffffffffU, threadIdx.x / 32, 0);
  const std::uint32_t lane = ptx::lane_index();
  DecodeShared<Traits> shared{__shfl_sync(0xffffffffU, ptx::smem_address(shared_bytes), 0),
                              Traits::kCluster == 1 ? 0 : ptx::cluster_rank()};
  float* scales = reinterpret_cast<float*>(shared_bytes + Traits::kScaleOffset);

  if (warp == 8 && ptx::elect_one()) {
    ptx::tensor_prefetch(&token_map);
    for (std::uint32_t i = 0; i < Traits::kWeightStages; ++i) {
      ptx::mbarrier_init(shared.weight_full(i), 1);
      ptx::mbarrier_init(shared.weight_empty(i), 8);
    }
    for (std::uint32_t i = 0; i < Traits::kTokenStages; ++i) {
      ptx::mbarrier_init(shared.token_full(i), 1);
      ptx::mbarrier_init(shared.token_empty(i), 8 * Traits::kCluster);
    }
    ptx::mbarrier_init_fence();
  }
  build_table(reinterpret_cast<uint2*>(shared_bytes + Traits::kTableOffset), p.levels, threadIdx.x,
              kDecodeThreads);
  if constexpr (Traits::kCluster == 1) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }
  ptx::launch_next_kernel();

  const std::uint32_t worker = blockIdx.x / Traits::kCluster;
  if (warp < 8) {
    DecodeConsumer<Traits, kDump>(p, shared, scales, worker, warp, lane).run();
  } else if (warp == 8) {
    fetch_weights<Traits>(p, shared, worker);
  } else {
    fetch_tokens<Traits>(p, &token_map, shared, scales, worker, lane);
  }
  // A CTA must not leave while the other may still write its shared memory or its barriers.
  if constexpr (Traits::kCluster > 1) {
    __syncwarp();
    ptx::cluster_sync();
  }
}

}  // namespace fireq::kernels
