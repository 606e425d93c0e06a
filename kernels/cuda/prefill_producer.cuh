// What both sides of the prefill kernel (prefill.cuh) share - parameters, shared memory, the order of tiles -
// and its producer.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/partials.cuh"
#include "kernels/cuda/profile.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/weight_tile.cuh"
#include "kernels/split_plan.hpp"

namespace fireq::kernels {

inline constexpr std::uint32_t kPrefillThreads = 384;
inline constexpr std::uint32_t kPrefillCluster = 2;
inline constexpr std::uint32_t kRasterTokens = 2048;
// Tokens wait behind the weights that were asked for before them: where a CTA has enough to do afterwards,
// only the first stages' are.
inline constexpr std::uint32_t kFirstWeights = 3;
inline constexpr std::uint32_t kPrefillSharedLimit = 232448;

struct PrefillParams {
  const std::uint8_t* tiles;
  const float* token_scale;
  OutputParams output;
  LevelsParam levels;
  SplitPlan plan;  // blocks: pairs of row tiles x token tiles; units: K groups
  // Pairs of CTAs in a cluster, each with a part of K of the cluster's one block; 1: a pair a cluster, and
  // what the plan shares goes through the workspace.
  std::uint32_t cluster_shares;
  uint4* workspace;
  std::uint8_t* dump;           // expanded operands [N, Kp], debug kernels only
  CtaProfile* profile;          // [CTAs], profiled kernels only
  std::uint32_t groups;         // Kp / 128
  std::uint32_t row_tiles;      // ceil(N / 128)
  std::uint32_t token_tiles;    // ceil(M / kTokens)
  std::uint32_t chunk;          // groups between promotions
  std::uint32_t first_weights;  // stages of weights asked for before the first tokens
  HalfScale partial;
  bool tensor_output;    // output rows are 16-byte aligned: stored by the copy engine
  bool vector_residual;  // residual rows are 16-byte aligned
};

// As many stages as shared memory has room for beside the table and the staging buffer.
constexpr std::uint32_t prefill_stages(std::uint32_t tokens) {
  return (kPrefillSharedLimit - kTableBytes - 2 * tokens * kHalfRows * 2 - 4 * tokens - 16) /
         (tokens * kGroup + kTileBytes + 24);
}

template <std::uint32_t kTokens_, std::uint32_t kStages_>
struct PrefillTraits {
  static constexpr std::uint32_t kTokens = kTokens_;
  static constexpr std::uint32_t kStages = kStages_;
  static constexpr std::uint32_t kAccumulators = kTokens / 2;
  static constexpr std::uint32_t kTokenBytes = kTokens * kGroup;
  static constexpr std::uint32_t kStagingBytes = kTokens * kHalfRows * 2;  // of one warpgroup

  static constexpr std::uint32_t kTableOffset = 0;  // 1024-byte aligned
  static constexpr std::uint32_t kTokenOffset = kTableOffset + kTableBytes;
  static constexpr std::uint32_t kStagingOffset = kTokenOffset + kStages * kTokenBytes;
  static constexpr std::uint32_t kWeightOffset = kStagingOffset + 2 * kStagingBytes;
  static constexpr std::uint32_t kScaleOffset = kWeightOffset + kStages * kTileBytes;  // of the tile's tokens
  static constexpr std::uint32_t kBarrierOffset = kScaleOffset + 4 * kTokens;
  static constexpr std::uint32_t kSharedBytes = kBarrierOffset + 24 * kStages + 16;
  static_assert(kSharedBytes <= kPrefillSharedLimit);
  // The stage that is multiplied, the one whose codes are loaded, and the one before, not yet free.
  static_assert(kStages >= 3 && 2 * kStages <= kPromoteGroups);
};

template <class Traits>
struct PrefillShared {
  std::uint32_t base;
  std::uint32_t cluster_rank;
  // Which row tile of the pair.
  __device__ __forceinline__ std::uint32_t rank() const { return cluster_rank % kPrefillCluster; }
  __device__ __forceinline__ std::uint32_t tokens(std::uint32_t stage) const {
    return base + Traits::kTokenOffset + stage * Traits::kTokenBytes;
  }
  __device__ __forceinline__ std::uint32_t weights(std::uint32_t stage) const {
    return base + Traits::kWeightOffset + stage * kTileBytes;
  }
  __device__ __forceinline__ std::uint32_t full(std::uint32_t stage) const {
    return base + Traits::kBarrierOffset + 8 * stage;
  }
  __device__ __forceinline__ std::uint32_t empty(std::uint32_t stage) const {
    return full(stage) + 8 * Traits::kStages;
  }
  // Weights are this CTA's alone and free as soon as they are in registers.
  __device__ __forceinline__ std::uint32_t weight_empty(std::uint32_t stage) const {
    return full(stage) + 16 * Traits::kStages;
  }
  // Where the cluster's CTAs of the same row tile say that their stages are free, and where their partial
  // sums are counted.
  __device__ __forceinline__ std::uint32_t all_ready() const {
    return base + Traits::kBarrierOffset + 24 * Traits::kStages;
  }
  __device__ __forceinline__ std::uint32_t received() const { return all_ready() + 8; }
};

// Where block `block` of the plan lies, in raster order.
struct BlockPlace {
  std::uint32_t row_pair, token_tile;
  __device__ __forceinline__ BlockPlace(const PrefillParams& p, std::uint32_t tokens, std::uint32_t block) {
    const std::uint32_t pairs = (p.row_tiles + kPrefillCluster - 1) / kPrefillCluster;
    const std::uint32_t wide = kRasterTokens / tokens;
    const std::uint32_t group = block / (pairs * wide);
    const std::uint32_t within = block - group * pairs * wide;
    const std::uint32_t width = min(wide, p.token_tiles - group * wide);
    row_pair = within / width;
    token_tile = group * wide + within - row_pair * width;
  }
};

// The producer: weights of the first round before it joins the others at the start and waits for the kernel
// before, whose time they use.
template <class Traits>
class PrefillProducer {
 public:
  __device__ __forceinline__ PrefillProducer(const PrefillParams& p, const CUtensorMap* token_map,
                                             const PrefillShared<Traits>& shared, std::uint32_t worker)
      : p_(p), token_map_(token_map), shared_(shared), worker_(worker) {}

  __device__ __forceinline__ void fetch_first_weights() const {
    SegmentWalk walk(p_.plan, worker_);
    Segment segment;
    std::uint32_t stage = 0;
    const std::uint32_t most = p_.first_weights;
    while (stage < most && walk.next(segment)) {
      const std::uint8_t* source = tile_of(BlockPlace(p_, Traits::kTokens, segment.block));
      for (std::uint32_t g = segment.begin; g < segment.end && stage < most; ++g, ++stage) {
        if (ptx::elect_one()) fetch_weights(source, g, stage);
        __syncwarp();
      }
    }
  }
  __device__ __forceinline__ void run() const {
    ptx::wait_for_previous_kernel();
    SegmentWalk walk(p_.plan, worker_);
    Segment segment;
    RingPosition<Traits::kStages> ring;
    std::uint32_t ahead = 0;
    constexpr std::uint32_t kShare = Traits::kTokens / kPrefillCluster;
    const auto pair =
        static_cast<std::uint16_t>(((1U << kPrefillCluster) - 1U) << (shared_.cluster_rank - shared_.rank()));
    while (walk.next(segment)) {
      const BlockPlace place(p_, Traits::kTokens, segment.block);
      const std::uint8_t* source = tile_of(place);
      const std::uint32_t first_token = place.token_tile * Traits::kTokens + shared_.rank() * kShare;
      for (std::uint32_t g = segment.begin; g < segment.end; ++g) {
        if (ahead >= Traits::kStages) ptx::mbarrier_wait(shared_.weight_empty(ring.index), ring.parity ^ 1U);
        ptx::mbarrier_wait(shared_.empty(ring.index), ring.parity ^ 1U);
        if (ptx::elect_one()) {
          if (ahead >= p_.first_weights) fetch_weights(source, g, ring.index);
          ptx::tensor_load_multicast(shared_.tokens(ring.index) + shared_.rank() * kShare * kGroup,
                                     token_map_, g * kGroup, first_token, shared_.full(ring.index), pair);
        }
        __syncwarp();
        ring.advance();
        ++ahead;
      }
    }
    // An empty stage, so that consumers need not ask whether one follows.
    if (ahead >= Traits::kStages) ptx::mbarrier_wait(shared_.weight_empty(ring.index), ring.parity ^ 1U);
    ptx::mbarrier_wait(shared_.empty(ring.index), ring.parity ^ 1U);
    ptx::mbarrier_arrive_if(shared_.full(ring.index), ptx::elect_one());
  }

 private:
  // With an odd number of row tiles the last pair's second CTA computes the last tile again and stores
  // nothing.
  __device__ __forceinline__ const std::uint8_t* tile_of(const BlockPlace& place) const {
    const std::uint32_t tile = min(place.row_pair * kPrefillCluster + shared_.rank(), p_.row_tiles - 1);
    return p_.tiles + static_cast<std::uint64_t>(tile) * p_.groups * kTileBytes;
  }
  __device__ __forceinline__ void fetch_weights(const std::uint8_t* source, std::uint32_t g,
                                                std::uint32_t stage) const {
    ptx::mbarrier_expect(shared_.full(stage), kTileBytes + Traits::kTokenBytes);
    ptx::bulk_load(shared_.weights(stage), source + static_cast<std::uint64_t>(g) * kTileBytes, kTileBytes,
                   shared_.full(stage));
  }

  const PrefillParams& p_;
  const CUtensorMap* token_map_;
  const PrefillShared<Traits>& shared_;
  std::uint32_t worker_;
};

}  // namespace fireq::kernels
