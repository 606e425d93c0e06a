// Decode GEMM for sm_90a, up to 64 tokens: y[M, N] = (a r) (x8 w8^T), weights streamed once from memory; for
// a few hundred tokens, weights streamed once a tile of 64.
//
// The weights are the register operand of wgmma (64 rows a warpgroup) and the tokens the shared-memory one,
// so that few tokens cost few columns, and codes are expanded to FP8 between a shared-memory load and the
// multiply, each once.
//   warps 0-7   two consumer warpgroups, one 64-row half of a 128-row tile each
//   warp 8      fills the weight ring by bulk copies; never waits for the previous kernel, whose time it uses
//               to fill the ring
//   warp 9      waits for the previous kernel (programmatic dependent launch), then fills the token ring by
//               tensor copies
// One or two CTAs a multiprocessor; a CTA takes at most half of a multiprocessor's shared memory and
// registers, so that with one the next kernel's CTAs are resident, and their rings full, when this one ends.
//
// SplitPlan divides the row blocks. Partial sums of blocks that several workers
// share go through the workspace (partials.cuh), or, where each block is a cluster's (kClusters), from the
// shared memory of one CTA to another's: each CTA sums and stores its share of the 16 x 8 blocks.
//
// Code that runs once a launch (epilogue, reduction) is kept in small loops over values in shared memory: its
// instructions come from the L2 each time, and unrolled they took longer than their work.
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
#include "kernels/gemm_config.hpp"
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
  std::uint8_t* dump;    // expanded operands [N, Kp], debug kernels only
  CtaProfile* profile;   // [CTAs], profiled kernels only
  std::uint32_t groups;  // Kp / 128
};

template <std::uint32_t kTokens_, std::uint32_t kGroups_, std::uint32_t kWeightStages_,
          std::uint32_t kTokenStages_, bool kAhead_, bool kClusters_>
struct DecodeTraits {
  static constexpr bool kAhead = kAhead_;        // load codes while those before are expanded
  static constexpr bool kClusters = kClusters_;  // a cluster a block
  static constexpr std::uint32_t kMostShares = decode_most_shares(kTokens_);  // CTAs of a cluster
  static constexpr std::uint32_t kTokens = kTokens_;                          // columns of the multiply
  static constexpr std::uint32_t kGroups = kGroups_;                          // K groups a pipeline stage
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
  // Finished blocks; with clusters, what the other CTAs send.
  static constexpr std::uint32_t kSumBytes =
      2048 * (kClusters && 2 * kBlocks < kMostShares ? kMostShares : 2 * kBlocks);
  static constexpr std::uint32_t kWeightOffset = kSumOffset + kSumBytes;
  static constexpr std::uint32_t kScaleOffset = kWeightOffset + kWeightStages * kWeightStageBytes;
  static constexpr std::uint32_t kBarrierOffset = kScaleOffset + 64 * 4;
  static constexpr std::uint32_t kSharedBytes = kBarrierOffset + 16 * (kWeightStages + kTokenStages) + 24;
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
  __device__ __forceinline__ std::uint32_t received() const { return scales_full() + 8; }
  __device__ __forceinline__ std::uint32_t all_ready() const { return scales_full() + 16; }
};

// Weights: `first` fills the ring once, before the CTA's barrier and the kernel before's end; `rest` goes on.
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
    if constexpr (Traits::kAhead) {  // an empty stage, so that consumers need not ask whether one follows
      ptx::mbarrier_wait(shared_.weight_empty(ring_.index), ring_.parity ^ 1U);
      ptx::mbarrier_arrive_if(shared_.weight_full(ring_.index), ptx::elect_one());
    }
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
      const std::uint32_t group = unit_ * Traits::kGroups;
      const std::uint32_t bytes = min(Traits::kGroups, p_.groups - group) * kTileBytes;
      const std::uint64_t tile = static_cast<std::uint64_t>(segment_.block) * p_.groups + group;
      ptx::mbarrier_expect(shared_.weight_full(ring_.index), bytes);
      ptx::bulk_load(shared_.weights(ring_.index), p_.tiles + tile * kTileBytes, bytes,
                     shared_.weight_full(ring_.index), policy_);
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

template <class Traits>
__device__ __forceinline__ void fetch_tokens(const DecodeParams& p, const CUtensorMap* map,
                                             const DecodeShared<Traits>& shared, float* scales,
                                             std::uint32_t lane) {
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
        ptx::mbarrier_expect(full, Traits::kTokenStageBytes);
#pragma unroll
        for (std::uint32_t kg = 0; kg < Traits::kGroups; ++kg)  // past K the copy writes zeros
          ptx::tensor_load(shared.tokens(ring.index) + kg * Traits::kTokenGroupBytes, map,
                           (unit * Traits::kGroups + kg) * kGroup, 0, full);
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
                                            const float* scales, std::uint32_t warp, std::uint32_t lane)
      : p_(p), shared_(shared), scales_(scales), group_(warp / 4), warp_(warp % 4), lane_(lane) {}

  __device__ __forceinline__ void run(Stopwatch<kVariant == Variant::profile>& watch) {
    if constexpr (Traits::kAhead) {
      wait_for_weights(watch);
      const std::uint32_t from = half_of(0);
      const std::uint32_t sigma = next_.load_first(from, warp_, lane_);
      next_.load_second(from, shared_.base + Traits::kTableOffset, sigma, warp_, lane_);
    }
    SegmentWalk walk(p_.plan, blockIdx.x);
    Segment segment;
    while (walk.next(segment)) {
      RowTerms terms;
      if constexpr (!Traits::kClusters) terms = RowTerms(p_.output, first_row(segment.block) + lane_ / 4);
      float acc[Traits::kAccumulators];
      multiply(segment, acc, watch);
      watch.stamp(Stamp::multiplied);
      if (segment.begin == 0 && segment.end == p_.plan.units) {
        if constexpr (Traits::kClusters) terms = RowTerms(p_.output, first_row(segment.block) + lane_ / 4);
#pragma unroll
        for (std::uint32_t j = 0; j < Traits::kBlocks; ++j)
          ptx::store_shared_16(sums() + 4096 * j, as_words(acc + 4 * j));
        emit(terms, segment.block, 0, 1, Traits::kBlocks);
      } else if constexpr (Traits::kClusters) {
        send(acc);
        watch.stamp(Stamp::stored);
        receive(segment.block);
      } else {
        const Exchange exchange = exchange_of(segment.block);
        uint4* slot = exchange.at(exchange.offset(exchange.me, 0));
        std::uint32_t own = p_.plan.all_shared() ? exchange.mine : Traits::kBlocks;
        std::uint32_t to = sums();
#pragma unroll
        for (std::uint32_t j = 0; j < Traits::kBlocks; ++j) {
          if (j == own) {  // stays here: sums() is not wanted for anything else
            ptx::store_shared_16(to, not_empty(as_words(acc + 4 * j)));
            to += 4096;
            own += exchange.workers;
          } else {
            publish(slot + 128 * j, as_words(acc + 4 * j));
          }
        }
      }
      if constexpr (Traits::kClusters) break;  // there is no other
    }
    if constexpr (!Traits::kClusters) {
      watch.stamp(Stamp::stored);
      reduce();
    }
    watch.stamp(Stamp::reduced);
  }

 private:
  __device__ __forceinline__ std::uint32_t first_row(std::uint32_t block) const {
    return block * kTileRows + group_ * kHalfRows + 16 * warp_;
  }
  // This thread's place for finished blocks, 4096 bytes apart.
  __device__ __forceinline__ std::uint32_t sums() const {
    return shared_.base + Traits::kSumOffset + 16 * (128 * group_ + 32 * warp_ + lane_);
  }
  __device__ __forceinline__ Exchange exchange_of(std::uint32_t block) const {
    const std::uint32_t offset = group_ * Traits::kBlocks;
    return Exchange(p_.plan, block, blockIdx.x, offset, p_.workspace + 128 * offset + 32 * warp_ + lane_,
                    2 * 128 * Traits::kBlocks);
  }
  // Where the CTA that stores a 16 x 8 block keeps a share's part of it: block `index` of both warpgroups'
  // belongs to CTA index mod shares of the cluster.
  __device__ __forceinline__ std::uint32_t part(std::uint32_t index, std::uint32_t share) const {
    return shared_.base + Traits::kSumOffset + 2048 * ((index & ~(p_.plan.shares - 1)) + share) +
           16 * (32 * warp_ + lane_);
  }
  __device__ __forceinline__ void send(const float (&acc)[Traits::kAccumulators]) const {
    const std::uint32_t shares = p_.plan.shares;
    if constexpr (Traits::kSumsInShared) {  // all warps of the cluster may still have sums where the parts go
      ptx::fence_async_proxy();             // this warp's have come back
      __syncwarp();
      ptx::mbarrier_arrive_cluster_if(shared_.all_ready(), lane_, lane_ < shares);
      ptx::mbarrier_wait(shared_.all_ready(), 0);
    }
#pragma unroll
    for (std::uint32_t j = 0; j < Traits::kBlocks; ++j) {
      const std::uint32_t index = group_ * Traits::kBlocks + j;
      const std::uint32_t owner = index & (shares - 1);
      const std::uint32_t to = part(index, shared_.rank);
      if (owner == shared_.rank)
        ptx::store_shared_16(to, as_words(acc + 4 * j));
      else
        ptx::store_async_16(ptx::in_cluster(to, owner), as_words(acc + 4 * j),
                            ptx::in_cluster(shared_.received(), owner));
    }
  }
  __device__ __forceinline__ void receive(std::uint32_t block) const {
    const std::uint32_t shares = p_.plan.shares;
    const std::uint32_t row = first_row(block);
    const RowTerms terms(p_.output, row + lane_ / 4);
    const float* scales = scales_ + 2 * (lane_ % 4);
    ptx::mbarrier_wait(shared_.scales_full(), 0);
    ptx::mbarrier_wait(shared_.received(), 0);
#pragma unroll 1
    for (std::uint32_t j = (shared_.rank - group_ * Traits::kBlocks) & (shares - 1); j < Traits::kBlocks;
         j += shares) {
      float v[4] = {0.0F, 0.0F, 0.0F, 0.0F};
#pragma unroll 1
      for (std::uint32_t share = 0; share < shares; ++share) {
        const uint4 w = ptx::load_shared_16(part(group_ * Traits::kBlocks + j, share));
        v[0] += __uint_as_float(w.x);
        v[1] += __uint_as_float(w.y);
        v[2] += __uint_as_float(w.z);
        v[3] += __uint_as_float(w.w);
      }
      finish_and_store(p_.output, terms, row, 8 * j, lane_, scales[8 * j], scales[8 * j + 1], v);
    }
  }

  // Stores `count` blocks of 8 tokens, first_block and every step-th from there on, from sums().
  __device__ __forceinline__ void emit(const RowTerms& terms, std::uint32_t block, std::uint32_t first_block,
                                       std::uint32_t step, std::uint32_t count) const {
    ptx::mbarrier_wait(shared_.scales_full(), 0);
    const std::uint32_t row = first_row(block);
    const float* scales = scales_ + 2 * (lane_ % 4);
#pragma unroll 1
    for (std::uint32_t i = 0; i < count; ++i) {
      const std::uint32_t j = first_block + i * step;
      const uint4 w = ptx::load_shared_16(sums() + 4096 * i);
      float v[4] = {__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z), __uint_as_float(w.w)};
      finish_and_store(p_.output, terms, row, 8 * j, lane_, scales[8 * j], scales[8 * j + 1], v);
    }
  }

  __device__ __forceinline__ std::uint32_t half_of(std::uint32_t stage) const {
    return shared_.weights(stage) + group_ * kHalfBytes;
  }
  __device__ __forceinline__ void wait_for_weights(Stopwatch<kVariant == Variant::profile>& watch) const {
    watch.begin_wait();
    ptx::mbarrier_wait(shared_.weight_full(weights_.index), weights_.parity);
    watch.end_wait(Waited::weights);
    watch.stamp_once(Stamp::first_weights);
  }
  __device__ __forceinline__ void release_weights(std::uint32_t stage) const {
    __syncwarp();
    ptx::mbarrier_arrive_if(shared_.weight_empty(stage), ptx::arrives(lane_, 0));
  }

  // acc = sum over the segment's K of w8 x8^T.
  __device__ __forceinline__ void multiply(const Segment& segment, float (&acc)[Traits::kAccumulators],
                                           Stopwatch<kVariant == Variant::profile>& watch) {
    const std::uint32_t table = shared_.base + Traits::kTableOffset;
    float sum[Traits::kSumsInShared ? 1 : Traits::kAccumulators];
    const std::uint32_t sums = this->sums();
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
        WeightFragment fragment[Traits::kAhead ? 1 : Traits::kGroups];
        if constexpr (!Traits::kAhead) {
          wait_for_weights(watch);
          const std::uint32_t half = half_of(weights_.index);
#pragma unroll
          for (std::uint32_t kg = 0; kg < Traits::kGroups; ++kg)
            fragment[kg].load(half + kg * kTileBytes, table, warp_, lane_);
          weights_.advance();
        } else {  // the next stage, whose first codes this unit's last steps load
          weights_.advance();
          wait_for_weights(watch);
        }
        const std::uint64_t descriptor = wgmma_descriptor(shared_.tokens(tokens_.index));
#pragma unroll
        for (std::uint32_t kg = 0; kg < Traits::kGroups; ++kg) {
          WeightFragment& codes = Traits::kAhead ? next_ : fragment[Traits::kAhead ? 0 : kg];
          std::uint32_t sigma = 0;
#pragma unroll
          for (std::uint32_t s = 0; s < 4; ++s) {
            wgmma_wait<3>();  // the multiply that read a[s] last is done
            if (kg == 0 && s == 3) release_tokens(tokens_.previous(), unit != start);
            codes.expand(s, a[s]);
            pin(a[s]);
            // Not before the last codes were used: an arrival may overtake loads that have not come back.
            if (kg + 1 == Traits::kGroups && s == 2) release_weights(weights_.previous());
            if constexpr (Traits::kAhead) {
              // No wait here: a branch between multiplies would serialise them (ptxas C7513).
              const std::uint32_t from = kg + 1 == Traits::kGroups
                                             ? half_of(weights_.index)
                                             : half_of(weights_.previous()) + (kg + 1) * kTileBytes;
              if (s == 1) sigma = next_.load_first(from, warp_, lane_);
              if (s == 3) {
                next_.load_second(from, table, sigma, warp_, lane_);
              }
            }
            if constexpr (kVariant == Variant::dump)
              dump_fragment(p_.dump, p_.output.rows, p_.groups, first_row(segment.block),
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
          const uint4 s = ptx::load_shared_16(sums + 4096 * j);
          v[0] += __uint_as_float(s.x);
          v[1] += __uint_as_float(s.y);
          v[2] += __uint_as_float(s.z);
          v[3] += __uint_as_float(s.w);
        }
        if (!last)
          ptx::store_shared_16(sums + 4096 * j, make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]),
                                                           __float_as_uint(v[2]), __float_as_uint(v[3])));
      }
    }
  }

  __device__ __forceinline__ void release_tokens(std::uint32_t stage, bool condition) const {
    ptx::mbarrier_arrive_if(shared_.token_empty(stage), condition && ptx::arrives(lane_, 0));
  }

  // Sums and stores this worker's blocks of 8 tokens of the row block that it shares.
  __device__ __forceinline__ void reduce() const {
    SegmentWalk walk(p_.plan, blockIdx.x);
    Segment segment;
    if (!walk.next(segment) || (segment.begin == 0 && segment.end == p_.plan.units)) return;
    const RowTerms terms(p_.output, first_row(segment.block) + lane_ / 4);
    const Exchange exchange = exchange_of(segment.block);
    if (exchange.mine >= Traits::kBlocks) return;
    const std::uint32_t count = (Traits::kBlocks - exchange.mine + exchange.workers - 1) / exchange.workers;
    float sum[4] = {0.0F, 0.0F, 0.0F, 0.0F};
    collect(
        exchange, count, p_.plan.all_shared(),
        [&](std::uint32_t i) { return ptx::load_shared_16(sums() + 4096 * i); },
        [&](uint4 v, bool last, std::uint32_t i) {
          sum[0] += __uint_as_float(v.x);
          sum[1] += __uint_as_float(v.y);
          sum[2] += __uint_as_float(v.z);
          sum[3] += __uint_as_float(v.w);
          if (!last) return;
          ptx::store_shared_16(sums() + 4096 * i, as_words(sum));
          sum[0] = sum[1] = sum[2] = sum[3] = 0.0F;
        });
    __syncwarp();
    emit(terms, segment.block, exchange.mine, exchange.workers, count);
  }

  const DecodeParams& p_;
  const DecodeShared<Traits>& shared_;
  const float* scales_;
  std::uint32_t group_, warp_, lane_;
  WeightFragment next_;
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
  const DecodeShared<Traits> shared{__shfl_sync(0xffffffffU, ptx::smem_address(shared_bytes), 0),
                                    Traits::kClusters ? ptx::cluster_rank() : 0};
  float* scales = reinterpret_cast<float*>(shared_bytes + Traits::kScaleOffset);
  Stopwatch<kVariant == Variant::profile> watch;
  watch.stamp(Stamp::started);

  // Once all CTAs are on the multiprocessors the next kernel's may come as soon as there is room.
  ptx::launch_next_kernel();
  WeightProducer<Traits> weights(p, shared);
  if (warp == 8) {
    if (ptx::elect_one()) {
      for (std::uint32_t i = 0; i < Traits::kWeightStages; ++i) {
        ptx::mbarrier_init(shared.weight_full(i), 1);
        ptx::mbarrier_init(shared.weight_empty(i), 8 * ptx::kWarpArrivals);
      }
      for (std::uint32_t i = 0; i < Traits::kTokenStages; ++i) {
        ptx::mbarrier_init(shared.token_full(i), 1);
        ptx::mbarrier_init(shared.token_empty(i), 8 * ptx::kWarpArrivals);
      }
      ptx::mbarrier_init(shared.scales_full(), 32);
      if constexpr (Traits::kClusters) {
        ptx::mbarrier_init(shared.received(), 1);
        ptx::mbarrier_init(shared.all_ready(), 8 * p.plan.shares);
        // Parts of 2048 bytes from each other CTA, of this one's share of the blocks.
        const std::uint32_t blocks = (2 * Traits::kBlocks + p.plan.shares - 1 - shared.rank) / p.plan.shares;
        ptx::mbarrier_expect(shared.received(), 2048 * blocks * (p.plan.shares - 1));
      }
      ptx::mbarrier_init_fence();
    }
    __syncwarp();
    weights.first();
  } else if (warp == 9) {
    if (ptx::elect_one()) ptx::tensor_prefetch(&token_map);
    __syncwarp();
  } else {
    build_table(reinterpret_cast<uint2*>(shared_bytes + Traits::kTableOffset), p.levels, threadIdx.x, 256);
  }
  __syncthreads();
  if constexpr (Traits::kClusters) ptx::cluster_sync();  // the others' barriers
  watch.stamp(Stamp::ready);

  if (warp < 8) {
    DecodeConsumer<Traits, kVariant>(p, shared, scales, warp, lane).run(watch);
    if (threadIdx.x == 0) watch.write(p.profile);
  } else if (warp == 8) {
    weights.rest();
  } else {
    fetch_tokens<Traits>(p, &token_map, shared, scales, lane);
  }
}

}  // namespace fireq::kernels
