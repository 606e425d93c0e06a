// What both sides of the decode kernel (decode.cuh) share - parameters, the division of a matrix, shared
// memory - and its producers.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/partials.cuh"
#include "kernels/cuda/profile.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/weight_tile.cuh"
#include "kernels/gemm_config.hpp"
#include "kernels/split_plan.hpp"

namespace fireq::kernels {

inline constexpr std::uint32_t kDecodeThreads = 320;
inline constexpr std::uint32_t kMostTokens = 64;  // of a CTA
inline constexpr std::uint32_t kDecodeSharedLimit =
    115712;  // half of a multiprocessor's 228 KB, less 1 KB a CTA

struct DecodeParams {
  const std::uint8_t* tiles;
  const float* token_scale;
  OutputParams output;
  LevelsParam levels;
  SplitPlan plan;
  HalfScale partial;
  uint4* workspace;
  std::uint8_t* dump;              // expanded operands [N, Kp], debug kernels only
  CtaProfile* profile;             // [CTAs], profiled kernels only
  std::uint32_t groups;            // Kp / 128
  std::uint32_t tile_tokens;       // rows of a token copy: all tokens, or those of each blockIdx.y
  std::uint32_t keep_nanoseconds;  // how long CTAs without work stay (keep_place)
};

// How the warpgroups and CTAs divide a matrix.
enum class Division : std::uint8_t {
  grid,      // a warpgroup 64 rows; blocks of 128 rows, the remainder's K split among CTAs of the grid
  clusters,  // a warpgroup 64 rows; a block of 128 rows a cluster, its K split among the CTAs
  halves     // a block of 64 rows a cluster, its K split among the CTAs and, in each, the two warpgroups
};

template <std::uint32_t kTokens_, std::uint32_t kGroups_, std::uint32_t kWeightStages_,
          std::uint32_t kTokenStages_, Division kDivision_>
struct DecodeTraits {
  static constexpr bool kClusters = kDivision_ != Division::grid;  // a cluster a block
  static constexpr bool kHalves = kDivision_ == Division::halves;
  static constexpr bool kTokenTiles = kClusters && kTokens_ == kMostTokens;  // several along blockIdx.y
  static constexpr std::uint32_t kBlockRows = kHalves ? kHalfRows : kTileRows;
  static constexpr std::uint32_t kParts = kHalves ? 2 : 1;  // of K in a CTA
  static constexpr std::uint32_t kMostShares =              // CTAs of a cluster
      kHalves ? kMostHalfShares : decode_most_shares(kTokens_);
  static constexpr std::uint32_t kTokens = kTokens_;  // columns of the multiply
  static constexpr std::uint32_t kGroups = kGroups_;  // K groups of a warpgroup a pipeline stage
  static constexpr std::uint32_t kStageGroups = kParts * kGroups;
  static constexpr std::uint32_t kWeightStages = kWeightStages_;
  static constexpr std::uint32_t kTokenStages = kTokenStages_;
  // Whole rounds of the weights' ring are unrolled: with few tokens memory is the limit in any case. In step:
  // whole rounds of the tokens' ring too.
  static constexpr bool kRounds = kTokens >= 32;
  static constexpr bool kInStep = kRounds && kWeightStages % kTokenStages == 0;
  static constexpr std::uint32_t kAccumulators = kTokens / 2;
  static constexpr std::uint32_t kBlocks =
      kTokens / 8;  // 16 x 8 accumulator blocks of a thread: four values each
  // No registers left for a second set: sums between promotions wait in shared memory. In halves there is no
  // room for them: they stay in registers as scaled FP16, and parts arrive in the token stages.
  static constexpr bool kSumsInShared = kTokens >= 64 && !kHalves;
  static constexpr bool kSumsInHalves = kTokens >= 64 && kHalves;
  static constexpr bool kPartsInTokens = kHalves && kTokens >= 32;
  // Units between promotions, whole rounds of the ring.
  static constexpr std::uint32_t kMostChunk = kPromoteK / (kGroup * kGroups);
  static constexpr std::uint32_t kChunk = kRounds ? kMostChunk / kWeightStages * kWeightStages : kMostChunk;

  static constexpr std::uint32_t kTokenGroupBytes = kTokens * kGroup;
  static constexpr std::uint32_t kTokenStageBytes = kStageGroups * kTokenGroupBytes;
  static constexpr std::uint32_t kWeightStageBytes = kGroups * kTileBytes;
  // In a stage, from one K group of a warpgroup to its next, and to the other warpgroup's.
  static constexpr std::uint32_t kGroupStep = kHalves ? kHalfBytes : kTileBytes;
  static constexpr std::uint32_t kWarpgroupStep = kHalves ? kGroups * kHalfBytes : kHalfBytes;

  static constexpr std::uint32_t kTableOffset = 0;  // 1024-byte aligned, so that an index is or-ed in
  static constexpr std::uint32_t kTokenOffset =
      kTableOffset + kTableBytes;  // 1024-byte aligned for the swizzle
  static constexpr std::uint32_t kTokensEnd = kTokenOffset + kTokenStages * kTokenStageBytes;
  static constexpr std::uint32_t kSumOffset = kPartsInTokens ? kTokenOffset : kTokensEnd;
  // Finished blocks; with clusters, what the other CTAs send.
  static constexpr std::uint32_t kSumPlaces =  // blocks of one CTA times parts of K, at most
      kHalves ? 2 * (kBlocks > kMostShares ? kBlocks : kMostShares)
              : (kClusters && 2 * kBlocks < kMostShares ? kMostShares : 2 * kBlocks);
  static constexpr std::uint32_t kSumBytes = 2048 * kSumPlaces;
  static constexpr std::uint32_t kWeightOffset = kPartsInTokens ? kTokensEnd : kSumOffset + kSumBytes;
  static constexpr std::uint32_t kScaleOffset = kWeightOffset + kWeightStages * kWeightStageBytes;
  static constexpr std::uint32_t kBarrierOffset = kScaleOffset + 64 * 4;
  static constexpr std::uint32_t kSharedBytes = kBarrierOffset + 16 * (kWeightStages + kTokenStages) + 24;
  static_assert(kSharedBytes <= kDecodeSharedLimit);
  static_assert(kChunk > 0 && kWeightStages >= 2 && kTokenStages >= 2);
  static_assert(!kPartsInTokens || kSumOffset + kSumBytes <= kTokensEnd);
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
  __device__ __forceinline__ std::uint32_t received() const { return scales_full() + 8; }
  __device__ __forceinline__ std::uint32_t all_ready() const { return scales_full() + 16; }
};

// Weights: `first` fills the ring once, while the kernel before may still run; `rest` goes on.
template <class Traits>
class WeightProducer {
 public:
  __device__ __forceinline__ WeightProducer(const DecodeParams& p, const DecodeShared<Traits>& shared)
      : p_(p), shared_(shared), walk_(p.plan, blockIdx.x) {}

  __device__ __forceinline__ void first() {
    while (sent_ < Traits::kWeightStages && next()) send();
  }
  __device__ __forceinline__ void rest() {
    while (next()) {
      ptx::mbarrier_wait(shared_.weight_empty(ring_.index), ring_.parity ^ 1U);
      send();
    }
    // An empty stage, so that consumers need not ask whether one follows.
    ptx::mbarrier_wait(shared_.weight_empty(ring_.index), ring_.parity ^ 1U);
    ptx::mbarrier_arrive_if(shared_.weight_full(ring_.index), ptx::elect_one());
  }

 private:
  __device__ __forceinline__ bool next() {
    if (unit_ + 1 < segment_.end) {
      ++unit_;
      return true;
    }
    if (!walk_.next(segment_)) return false;
    unit_ = segment_.begin;
    return true;
  }
  __device__ __forceinline__ void send() {
    if (ptx::elect_one()) {
      const std::uint32_t group = unit_ * Traits::kStageGroups;
      const std::uint32_t groups = min(Traits::kStageGroups, p_.groups - group);
      const std::uint32_t full = shared_.weight_full(ring_.index);
      const std::uint32_t to = shared_.weights(ring_.index);
      if constexpr (Traits::kHalves) {
        const std::uint64_t tile = static_cast<std::uint64_t>(segment_.block / 2) * p_.groups + group;
        const std::uint8_t* from = p_.tiles + tile * kTileBytes + segment_.block % 2 * kHalfBytes;
        ptx::mbarrier_expect(full, groups * kHalfBytes);
#pragma unroll
        for (std::uint32_t i = 0; i < Traits::kStageGroups; ++i)
          if (i < groups)
            ptx::bulk_load(to + i * kHalfBytes, from + i * kTileBytes, kHalfBytes, full, policy_);
      } else {
        const std::uint64_t tile = static_cast<std::uint64_t>(segment_.block) * p_.groups + group;
        ptx::mbarrier_expect(full, groups * kTileBytes);
        ptx::bulk_load(to, p_.tiles + tile * kTileBytes, groups * kTileBytes, full, policy_);
      }
    }
    __syncwarp();
    ring_.advance();
    ++sent_;
  }

  const DecodeParams& p_;
  const DecodeShared<Traits>& shared_;
  SegmentWalk walk_;
  Segment segment_{0, 0, 0};
  RingPosition<Traits::kWeightStages> ring_;
  std::uint32_t unit_ = 0, sent_ = 0;
  std::uint64_t policy_ = ptx::evict_first_policy();
};

// This CTA's tokens.
struct TokenSpan {
  std::uint32_t first, count;
};
template <class Traits>
__device__ __forceinline__ TokenSpan token_span(const DecodeParams& p) {
  if constexpr (!Traits::kTokenTiles) return {0, p.output.tokens};
  const std::uint32_t first = blockIdx.y * p.tile_tokens;
  return {first, min(p.tile_tokens, p.output.tokens - first)};
}

// As many rows as there are tokens: what the others' places hold meets no output.
template <class Traits>
__device__ __forceinline__ void fetch_tokens(const DecodeParams& p, const CUtensorMap* map,
                                             const DecodeShared<Traits>& shared, float* scales,
                                             std::uint32_t lane) {
  ptx::wait_for_previous_kernel();
  const TokenSpan span = token_span<Traits>(p);
  // The scales are asked for first and stored once the first copies are on their way.
  float scale[(Traits::kTokens + 31) / 32];
#pragma unroll
  for (std::uint32_t i = 0; i < (Traits::kTokens + 31) / 32; ++i)
    scale[i] = 32 * i + lane < span.count ? __ldcg(p.token_scale + span.first + 32 * i + lane) : 0.0F;
  bool stored = false;
  const auto store_scales = [&] {
#pragma unroll
    for (std::uint32_t i = 0; i < (Traits::kTokens + 31) / 32; ++i)
      if (32 * i + lane < Traits::kTokens) scales[32 * i + lane] = scale[i];
    ptx::mbarrier_arrive_if(shared.scales_full(), true);
    stored = true;
  };
  RingPosition<Traits::kTokenStages> ring;
  SegmentWalk walk(p.plan, blockIdx.x);
  Segment segment;
  while (walk.next(segment)) {
    for (std::uint32_t unit = segment.begin; unit < segment.end; ++unit) {
      if (!stored && ring.parity == 1) store_scales();
      ptx::mbarrier_wait(shared.token_empty(ring.index), ring.parity ^ 1U);
      if (ptx::elect_one()) {
        const std::uint32_t full = shared.token_full(ring.index);
        ptx::mbarrier_expect(full, Traits::kStageGroups * kGroup * p.tile_tokens);
#pragma unroll
        for (std::uint32_t kg = 0; kg < Traits::kStageGroups; ++kg)  // past K the copy writes zeros
          ptx::tensor_load(shared.tokens(ring.index) + kg * Traits::kTokenGroupBytes, map,
                           (unit * Traits::kStageGroups + kg) * kGroup, span.first, full);
      }
      __syncwarp();
      ring.advance();
    }
  }
  if (!stored) store_scales();
}

}  // namespace fireq::kernels
