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
#include "kernels/cuda/partials.cuh"
#include "kernels/cuda/profile.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/weight_tile.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/split_plan.hpp"

namespace fireq::kernels {

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
  CtaProfile* profile;      // [CTAs], profiled kernels only
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
  static constexpr std::uint32_t kSharedBytes = kBarrierOffset + 16 * (kWeightStages + kTokenStages) + 8;
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
  __device__ __forceinline__ std::uint32_t scales_full() const {
    return base + Traits::kBarrierOffset + 16 * (Traits::kWeightStages + Traits::kTokenStages);
  }
};

template <class Traits>
__device__ __forceinline__ void sync_at_start() {
  if constexpr (Traits::kCluster == 1) {
    ptx::named_barrier<kDecodeThreads>(0);
  } else {
    ptx::cluster_sync();
  }
}

// Fills its ring once before it joins the others at the start: it initialised the barriers itself.
template <class Traits>
__device__ __forceinline__ void fetch_weights(const DecodeParams& p, const DecodeShared<Traits>& shared,
                                              std::uint32_t worker) {
  const std::uint64_t policy = ptx::evict_first_policy();
  RingPosition<Traits::kWeightStages> ring;
  std::uint32_t ahead = 0;
  SegmentWalk walk(p.plan, worker);
  Segment segment;
  while (walk.next(segment)) {
    // With an odd number of row tiles the last cluster's second CTA reads the last tile again and stores
    // nothing.
    const std::uint32_t tile = min(segment.block * Traits::kCluster + shared.rank, p.row_tiles - 1);
    const std::uint8_t* source = p.tiles + static_cast<std::uint64_t>(tile) * p.groups * kTileBytes;
    for (std::uint32_t unit = segment.begin; unit < segment.end; ++unit) {
      if (ahead == Traits::kWeightStages) sync_at_start<Traits>();
      ++ahead;
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
  if (ahead <= Traits::kWeightStages) sync_at_start<Traits>();
}

template <class Traits>
__device__ __forceinline__ void fetch_tokens(const DecodeParams& p, const CUtensorMap* map,
                                             const DecodeShared<Traits>& shared, float* scales,
                                             std::uint32_t worker, std::uint32_t lane) {
  ptx::wait_for_previous_kernel();
  // The scales are asked for first and stored once the first copies are on their way.
  float scale[(Traits::kTokens + 31) / 32];
#pragma unroll
  for (std::uint32_t i = 0; i < (Traits::kTokens + 31) / 32; ++i)
    scale[i] = 32 * i + lane < p.output.tokens ? __ldcg(p.token_scale + 32 * i + lane) : 0.0F;
  bool stored = false;
  const auto store_scales = [&] {
#pragma unroll
    for (std::uint32_t i = 0; i < (Traits::kTokens + 31) / 32; ++i)
      if (32 * i + lane < Traits::kTokens) scales[32 * i + lane] = scale[i];
    __syncwarp();
    ptx::mbarrier_arrive_if(shared.scales_full(), lane == 0);
    stored = true;
  };
  RingPosition<Traits::kTokenStages> ring;
  SegmentWalk walk(p.plan, worker);
  Segment segment;
  while (walk.next(segment)) {
    for (std::uint32_t unit = segment.begin; unit < segment.end; ++unit) {
      if (!stored && ring.parity == 1) store_scales();
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
  if (!stored) store_scales();
}

template <class Traits, Variant kVariant>
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

  __device__ __forceinline__ void run(Stopwatch<kVariant == Variant::profile>& watch) {
    SegmentWalk walk(p_.plan, worker_);
    Segment segment;
    while (walk.next(segment)) {
      const std::uint32_t tile = segment.block * Traits::kCluster + shared_.rank;
      const bool whole = segment.begin == 0 && segment.end == p_.plan.units;
      const RowTerms terms(p_.output, first_row(tile) + lane_ / 4);
      float acc[Traits::kAccumulators];
      multiply(segment, tile, acc, watch);
      watch.stamp(Stamp::multiplied);
      if (tile >= p_.row_tiles) continue;
      ptx::mbarrier_wait(shared_.scales_full(), 0);
      if (whole) {
#pragma unroll
        for (std::uint32_t j = 0; j < Traits::kBlocks; ++j) {
          float v[4] = {acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]};
          emit(terms, tile, j, v);
        }
      } else {
        uint4* slot = partial(worker_, segment.block);
#pragma unroll
        for (std::uint32_t j = 0; j < Traits::kBlocks; ++j) publish(slot + 128 * j, as_words(acc + 4 * j));
      }
    }
    watch.stamp(Stamp::stored);
    reduce();
    watch.stamp(Stamp::reduced);
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
                                           float (&acc)[Traits::kAccumulators],
                                           Stopwatch<kVariant == Variant::profile>& watch) {
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
        watch.begin_wait();
        ptx::mbarrier_wait(shared_.weight_full(weights_.index), weights_.parity);
        watch.end_wait(Waited::weights);
        watch.stamp_once(Stamp::first_weights);
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
            if constexpr (kVariant == Variant::dump)
              if (tile < p_.row_tiles)
                dump_fragment(p_.dump, p_.output.rows, p_.groups, first_row(tile),
                              unit * Traits::kGroups + kg, s, lane_, a[s]);
            if (kg == 0 && s == 0) {
              watch.begin_wait();
              ptx::mbarrier_wait(shared_.token_full(tokens_.index), tokens_.parity);
              watch.end_wait(Waited::tokens);
              watch.stamp_once(Stamp::first_tokens);
            }
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
          uint4 v[4];
          collect(slot, workers - c, v);
#pragma unroll
          for (std::uint32_t i = 0; i < 4; ++i) {
            if (c + i >= workers) continue;
            sum[0] += __uint_as_float(v[i].x);
            sum[1] += __uint_as_float(v[i].y);
            sum[2] += __uint_as_float(v[i].z);
            sum[3] += __uint_as_float(v[i].w);
          }
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

template <class Traits, Variant kVariant>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    decode_kernel(const __grid_constant__ CUtensorMap token_map, const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  // Shuffles make values that the compiler takes for uniform and does not compute again in the loop.
  const std::uint32_t warp = __shfl_sync(0xffffffffU, threadIdx.x / 32, 0);
  const std::uint32_t lane = ptx::lane_index();
  DecodeShared<Traits> shared{__shfl_sync(0xffffffffU, ptx::smem_address(shared_bytes), 0),
                              Traits::kCluster == 1 ? 0 : ptx::cluster_rank()};
  float* scales = reinterpret_cast<float*>(shared_bytes + Traits::kScaleOffset);

  Stopwatch<kVariant == Variant::profile> watch;
  watch.stamp(Stamp::started);

  // All CTAs are on the multiprocessors; the next kernel's may come as soon as there is room.
  ptx::launch_next_kernel();
  const std::uint32_t worker = blockIdx.x / Traits::kCluster;
  if (warp == 8) {
    if (ptx::elect_one()) {
      for (std::uint32_t i = 0; i < Traits::kWeightStages; ++i) {
        ptx::mbarrier_init(shared.weight_full(i), 1);
        ptx::mbarrier_init(shared.weight_empty(i), 8);
      }
      for (std::uint32_t i = 0; i < Traits::kTokenStages; ++i) {
        ptx::mbarrier_init(shared.token_full(i), 1);
        ptx::mbarrier_init(shared.token_empty(i), 8 * Traits::kCluster);
      }
      ptx::mbarrier_init(shared.scales_full(), 1);
      ptx::mbarrier_init_fence();
    }
    __syncwarp();
    fetch_weights<Traits>(p, shared, worker);
  } else if (warp == 9) {
    if (ptx::elect_one()) ptx::tensor_prefetch(&token_map);
    __syncwarp();
    sync_at_start<Traits>();
    fetch_tokens<Traits>(p, &token_map, shared, scales, worker, lane);
  } else {
    build_table(reinterpret_cast<uint2*>(shared_bytes + Traits::kTableOffset), p.levels, threadIdx.x, 256);
    sync_at_start<Traits>();
    watch.stamp(Stamp::ready);
    DecodeConsumer<Traits, kVariant>(p, shared, scales, worker, warp, lane).run(watch);
    if (threadIdx.x == 0) watch.write(p.profile);
  }
  // A CTA must not leave while the other may still write its shared memory or its barriers.
  if constexpr (Traits::kCluster > 1) {
    __syncwarp();
    ptx::cluster_sync();
  }
}

}  // namespace fireq::kernels
