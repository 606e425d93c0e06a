// Decode GEMM for sm_90a, up to 64 tokens a CTA: y[M, N] = (a r) (x8 w8^T), weights streamed once from
// memory.
//
// The weights are the register operand of wgmma (64 rows a warpgroup) and the tokens the shared-memory one,
// so that few tokens cost few columns, and codes are expanded to FP8 between a shared-memory load and the
// multiply, each once.
//   warps 0-7   two consumer warpgroups, one 64-row half of a 128-row tile each, or the same half with half
//               of K each
//   warp 8      fills the weight ring by bulk copies; never waits for the previous kernel, whose time it uses
//               to fill the ring
//   warp 9      waits for the previous kernel (programmatic dependent launch), then fills the token ring by
//               tensor copies
// One or two CTAs a multiprocessor; a CTA takes at most half of a multiprocessor's shared memory and
// registers, so that with one the next kernel's CTAs are resident, and their rings full, when this one ends.
//
// The matrix is divided in one of three ways (Division, decode_producer.cuh). Partial sums of blocks that
// CTAs of the grid share go through the workspace (partials.cuh); those of a block that is a cluster's, from
// the shared memory of one CTA to another's: each CTA sums and stores its share of the 16 x 8 blocks.
//
// Code that runs once a launch (epilogue, reduction) is kept in small loops over values in shared memory: its
// instructions come from the L2 each time, and unrolled they took longer than their work.
//
// The accumulators of FP8 wgmma keep about 13 bits below the running sum: every kPromoteK of K they are added
// to FP32 sums and cleared.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/decode_producer.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/partials.cuh"
#include "kernels/cuda/profile.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/weight_tile.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/split_plan.hpp"

namespace fireq::kernels {

enum NamedBarrier : std::uint32_t { kTokensMayCome = 1, kReady = 2 };

template <class Traits, Variant kVariant>
class DecodeConsumer {
 public:
  __device__ __forceinline__ DecodeConsumer(const DecodeParams& p, const DecodeShared<Traits>& shared,
                                            const float* scales, std::uint32_t warp, std::uint32_t lane)
      : p_(p), shared_(shared), scales_(scales), group_(warp / 4), warp_(warp % 4), lane_(lane) {
    if constexpr (Traits::kTokenTiles) {
      const TokenSpan span = token_span<Traits>(p);
      own_output_ = p.output;
      own_output_.tokens = span.count;
      own_output_.out += span.first * p.output.out_pitch;
      if (p.output.residual != nullptr) own_output_.residual += span.first * p.output.residual_pitch;
    }
  }

  __device__ __forceinline__ void run(Stopwatch<kVariant == Variant::profile>& watch) {
    wait_for_weights(0, 0, watch);
    codes_.load(half_of(0), shared_.base + Traits::kTableOffset, warp_, lane_);
    Segment segment;
    for (std::uint32_t turn = 0; SegmentWalk(p_.plan, blockIdx.x).at(turn, segment); ++turn) {
      RowTerms terms;
      if constexpr (kTermsEarly) terms = RowTerms(output(), first_row(segment.block) + lane_ / 4);
      float acc[Traits::kAccumulators];
      multiply(segment, acc, watch);
      watch.stamp(Stamp::multiplied);
      // What the loop wanted the registers of. Not in clusters or with few tokens: code that runs once comes
      // from the L2.
      if constexpr (Traits::kRounds && !Traits::kClusters) {
        find_itself();
        SegmentWalk(p_.plan, ptx::block_index()).at(turn, segment);
      }
      const bool whole = Traits::kClusters ? !Traits::kHalves && p_.plan.shares == 1
                                           : segment.begin == 0 && segment.end == p_.plan.units;
      if (whole) {
        if constexpr (!kTermsEarly) terms = RowTerms(output(), first_row(segment.block) + lane_ / 4);
#pragma unroll
        for (std::uint32_t j = 0; j < Traits::kBlocks; ++j)
          ptx::store_shared_16(sums() + 4096 * j, as_words(acc + 4 * j));
        emit(terms, segment.block, 0, 1, Traits::kBlocks,
             ResidualPairs(output(), first_row(segment.block), 0, lane_));
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
  static constexpr bool kTermsEarly = !Traits::kClusters && !Traits::kRounds;

  __device__ __forceinline__ void find_itself() {
    const std::uint32_t warp = ptx::warp_index();
    group_ = warp / 4;
    warp_ = warp % 4;
    lane_ = ptx::lane_index();
  }
  __device__ __forceinline__ std::uint32_t first_row(std::uint32_t block) const {
    return block * Traits::kBlockRows + (Traits::kHalves ? 0 : group_ * kHalfRows) + 16 * warp_;
  }
  __device__ __forceinline__ const OutputParams& output() const {
    if constexpr (Traits::kTokenTiles) return own_output_;
    return p_.output;
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
  // Where the CTA that stores a 16 x 8 block keeps a part of it: block `index`, counted over both warpgroups
  // where they have different rows, belongs to CTA index mod shares of the cluster.
  __device__ __forceinline__ std::uint32_t part(std::uint32_t index, std::uint32_t number) const {
    const std::uint32_t first = (index & ~(p_.plan.shares - 1)) * Traits::kParts;
    return shared_.base + Traits::kSumOffset + 2048 * (first + number) + 16 * (32 * warp_ + lane_);
  }
  __device__ __forceinline__ void send(const float (&acc)[Traits::kAccumulators]) const {
    const std::uint32_t shares = p_.plan.shares;
    // All warps of the cluster may still have sums, or read tokens, where the parts go.
    if constexpr (Traits::kSumsInShared || Traits::kPartsInTokens) {
      ptx::fence_async_proxy();  // this warp's have come back
      __syncwarp();
      ptx::mbarrier_arrive_cluster_if(shared_.all_ready(), lane_, lane_ < shares);
      ptx::mbarrier_wait(shared_.all_ready(), 0);
    }
#pragma unroll
    for (std::uint32_t j = 0; j < Traits::kBlocks; ++j) {
      const std::uint32_t index = Traits::kHalves ? j : group_ * Traits::kBlocks + j;
      const std::uint32_t owner = index & (shares - 1);
      const std::uint32_t to = part(index, Traits::kHalves ? 2 * shared_.rank + group_ : shared_.rank);
      if (owner == shared_.rank)
        ptx::store_shared_16(to, as_words(acc + 4 * j));
      else
        ptx::store_async_16(ptx::in_cluster(to, owner), as_words(acc + 4 * j),
                            ptx::in_cluster(shared_.received(), owner));
    }
    if constexpr (Traits::kHalves) {
      __syncwarp();
      ptx::mbarrier_arrive_if(shared_.received(), ptx::arrives(lane_, 0));
    }
  }
  __device__ __forceinline__ void receive(std::uint32_t block) const {
    const std::uint32_t shares = p_.plan.shares;
    const std::uint32_t row = first_row(block);
    const RowTerms terms(output(), row + lane_ / 4);
    const float* scales = scales_ + 2 * (lane_ % 4);
    const std::uint32_t first = Traits::kHalves ? shared_.rank + group_ * shares
                                                : (shared_.rank - group_ * Traits::kBlocks) & (shares - 1);
    ResidualPairs residual(output(), row, 8 * first, lane_);
    ptx::mbarrier_wait(shared_.scales_full(), 0);
    ptx::mbarrier_wait(shared_.received(), 0);
#pragma unroll 1
    for (std::uint32_t j = first; j < Traits::kBlocks; j += Traits::kParts * shares) {
      if (j != first) residual = ResidualPairs(output(), row, 8 * j, lane_);
      float v[4] = {0.0F, 0.0F, 0.0F, 0.0F};
#pragma unroll 1
      for (std::uint32_t number = 0; number < Traits::kParts * shares; ++number) {
        const uint4 w = ptx::load_shared_16(part(Traits::kHalves ? j : group_ * Traits::kBlocks + j, number));
        v[0] += __uint_as_float(w.x);
        v[1] += __uint_as_float(w.y);
        v[2] += __uint_as_float(w.z);
        v[3] += __uint_as_float(w.w);
      }
      finish_and_store(output(), terms, row, 8 * j, lane_, scales[8 * j], scales[8 * j + 1], v, residual);
    }
  }

  // Stores `count` blocks of 8 tokens, first_block and every step-th from there on, from sums(). residual: of
  // the first.
  __device__ __forceinline__ void emit(const RowTerms& terms, std::uint32_t block, std::uint32_t first_block,
                                       std::uint32_t step, std::uint32_t count,
                                       ResidualPairs residual) const {
    ptx::mbarrier_wait(shared_.scales_full(), 0);
    const std::uint32_t row = first_row(block);
    const float* scales = scales_ + 2 * (lane_ % 4);
#pragma unroll 1
    for (std::uint32_t i = 0; i < count; ++i) {
      const std::uint32_t j = first_block + i * step;
      const uint4 w = ptx::load_shared_16(sums() + 4096 * i);
      float v[4] = {__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z), __uint_as_float(w.w)};
      if (i != 0) residual = ResidualPairs(output(), row, 8 * j, lane_);
      finish_and_store(output(), terms, row, 8 * j, lane_, scales[8 * j], scales[8 * j + 1], v, residual);
    }
  }

  __device__ __forceinline__ std::uint32_t half_of(std::uint32_t stage) const {
    return shared_.weights(stage) + group_ * Traits::kWarpgroupStep;
  }
  __device__ __forceinline__ void wait_for_weights(std::uint32_t stage, std::uint32_t parity,
                                                   Stopwatch<kVariant == Variant::profile>& watch) const {
    watch.begin_wait();
    ptx::mbarrier_wait(shared_.weight_full(stage), parity);
    watch.end_wait(Waited::weights);
    watch.stamp_once(Stamp::first_weights);
  }

  // The tokens' ring beside stage `i` of the weights' round, from which it follows where they are in step.
  __device__ __forceinline__ RingPosition<Traits::kTokenStages> token_place(std::uint32_t i) const {
    if constexpr (Traits::kInStep) {
      constexpr std::uint32_t kStages = Traits::kTokenStages;
      const std::uint32_t rounds_before = Traits::kWeightStages / kStages % 2 == 1 ? weights_.parity : 0;
      return {i % kStages, (rounds_before ^ (i / kStages)) & 1U};
    } else {
      return tokens_;
    }
  }
  // Where a unit's operands are: its stages in both rings, the weights' next one, and the tokens' one before.
  struct Place {
    std::uint32_t weights, next, next_parity;
    std::uint32_t tokens, tokens_parity, before;
  };
  // acc += this unit's w8 x8^T, while the codes of the next are loaded.
  __device__ __forceinline__ void multiply_unit(const Segment& segment, std::uint32_t unit, const Place& at,
                                                bool release_before, std::uint64_t descriptor,
                                                float (&acc)[Traits::kAccumulators], std::uint32_t (&a)[4][4],
                                                Stopwatch<kVariant == Variant::profile>& watch) {
    wait_for_weights(at.next, at.next_parity, watch);
#pragma unroll
    for (std::uint32_t kg = 0; kg < Traits::kGroups; ++kg) {
      const bool last_group = kg + 1 == Traits::kGroups;
      const std::uint32_t from =
          last_group ? half_of(at.next) : half_of(at.weights) + (kg + 1) * Traits::kGroupStep;
      std::uint32_t sigma = 0;
#pragma unroll
      for (std::uint32_t s = 0; s < 4; ++s) {
        wgmma_wait<3>();  // the multiply that read a[s] last is done
        if (kg == 0 && s == 3) release_tokens(at.before, release_before);
        codes_.expand(s, a[s]);
        pin(a[s]);
        // Not before the last codes were used: an arrival may overtake loads that have not come back.
        if (last_group && s == 2) release_weights(at.weights);
        // No wait here: a branch between multiplies would serialise them (ptxas C7513).
        if (s == 1) sigma = codes_.load_first(from, warp_, lane_);
        if (s == 3) codes_.load_second(from, shared_.base + Traits::kTableOffset, sigma, warp_, lane_);
        if constexpr (kVariant == Variant::dump)
          dump_fragment(p_.dump, p_.output.rows, p_.groups, first_row(segment.block),
                        unit * Traits::kStageGroups + (Traits::kHalves ? group_ * Traits::kGroups : 0) + kg,
                        s, lane_, a[s]);
        if (kg == 0 && s == 0) {
          watch.begin_wait();
          ptx::mbarrier_wait(shared_.token_full(at.tokens), at.tokens_parity);
          watch.end_wait(Waited::tokens);
          watch.stamp_once(Stamp::first_tokens);
        }
        wgmma_fence();
        Wgmma<Traits::kTokens>::multiply(acc, a[s],
                                         descriptor + kg * (Traits::kTokenGroupBytes / 16) + 2 * s);
        wgmma_commit();
      }
    }
  }
  // acc = sum over the segment's K of w8 x8^T.
  __device__ __forceinline__ void multiply(const Segment& segment, float (&acc)[Traits::kAccumulators],
                                           Stopwatch<kVariant == Variant::profile>& watch) {
    constexpr std::uint32_t kRound = Traits::kWeightStages;
    Sums sum;
    std::uint32_t a[4][4];
    const auto descriptor_of = [&](std::uint32_t stage) {
      return wgmma_descriptor(shared_.tokens(stage) +
                              (Traits::kHalves ? group_ * Traits::kGroups * Traits::kTokenGroupBytes : 0));
    };

    std::uint32_t unit = segment.begin;  // for dumps alone: the loop wants its register
    bool first_chunk = true;
    for (std::uint32_t left = segment.end - segment.begin; left != 0;) {
      std::uint32_t chunk = min(left, Traits::kChunk);
      left -= chunk;
#pragma unroll
      for (std::uint32_t i = 0; i < Traits::kAccumulators; ++i) acc[i] = 0.0F;
      pin(acc);
      bool released = true;  // the tokens' stage before
      while (chunk != 0) {
        if (Traits::kRounds && weights_.index == 0 && chunk >= kRound) {
          // A whole round of the weights' ring, and one or more of the tokens': nothing is left to compute
          // about their stages. The integer units are as busy as memory, so that each instruction counts.
          const std::uint64_t first = descriptor_of(0);
#pragma unroll
          for (std::uint32_t i = 0; i < kRound; ++i) {
            const RingPosition<Traits::kTokenStages> tokens = token_place(i);
            const Place at{
                i,
                (i + 1) % kRound,
                i + 1 == kRound ? weights_.parity ^ 1U : weights_.parity,
                tokens.index,
                tokens.parity,
                Traits::kInStep ? (i + Traits::kTokenStages - 1) % Traits::kTokenStages : tokens.previous()};
            multiply_unit(segment, unit++, at, i != 0 || !released,
                          Traits::kInStep ? first + tokens.index * (Traits::kTokenStageBytes / 16)
                                          : descriptor_of(tokens.index),
                          acc, a, watch);
            if constexpr (!Traits::kInStep) tokens_.advance();
          }
          weights_.parity ^= 1U;
          chunk -= kRound;
        } else {
          RingPosition<Traits::kWeightStages> next = weights_;
          next.advance();
          const RingPosition<Traits::kTokenStages> tokens = token_place(weights_.index);
          const Place at{weights_.index, next.index,    next.parity,
                         tokens.index,   tokens.parity, tokens.previous()};
          multiply_unit(segment, unit++, at, !released, descriptor_of(tokens.index), acc, a, watch);
          weights_ = next;
          if constexpr (!Traits::kInStep) tokens_.advance();
          --chunk;
        }
        released = false;
      }
      wgmma_wait<0>();
      pin(acc);
      release_tokens(token_place(weights_.index).previous(), true);
      promote(first_chunk, left == 0, sum, acc);
      first_chunk = false;
    }
  }

  // Sums between promotions where they stay in registers: FP32, or scaled FP16.
  struct Sums {
    float v[Traits::kSumsInShared || Traits::kSumsInHalves ? 1 : Traits::kAccumulators];
    uint4 halves[Traits::kSumsInHalves ? Traits::kAccumulators / 8 : 1];
  };
  // Adds a chunk's accumulators to the sums; after the last chunk acc holds the total.
  __device__ __forceinline__ void promote(bool first, bool last, Sums& sum,
                                          float (&acc)[Traits::kAccumulators]) {
    if constexpr (Traits::kSumsInHalves) {
#pragma unroll
      for (std::uint32_t i = 0; i < Traits::kAccumulators / 8; ++i) {
        if (!first) add_halves(sum.halves[i], p_.partial, acc + 8 * i);
        if (!last) sum.halves[i] = pack_halves(acc + 8 * i, p_.partial);
      }
    } else if constexpr (!Traits::kSumsInShared) {
#pragma unroll
      for (std::uint32_t i = 0; i < Traits::kAccumulators; ++i) {
        sum.v[i] = first ? acc[i] : sum.v[i] + acc[i];
        acc[i] = sum.v[i];
      }
    } else {
      find_itself();
      const std::uint32_t sums = this->sums();
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

  __device__ __forceinline__ void release_weights(std::uint32_t stage) const {
    __syncwarp();
    if (ptx::arrives(lane_, 0)) ptx::mbarrier_arrive(shared_.weight_empty(stage));
  }
  __device__ __forceinline__ void release_tokens(std::uint32_t stage, bool condition) const {
    if (condition && ptx::arrives(lane_, 0)) ptx::mbarrier_arrive(shared_.token_empty(stage));
  }

  // Sums and stores this worker's blocks of 8 tokens of the row block that it shares.
  __device__ __forceinline__ void reduce() {
    Segment segment;
    if (!SegmentWalk(p_.plan, ptx::block_index()).at(0, segment) ||
        (segment.begin == 0 && segment.end == p_.plan.units))
      return;
    const RowTerms terms(output(), first_row(segment.block) + lane_ / 4);
    const Exchange exchange = exchange_of(segment.block);
    if (exchange.mine >= Traits::kBlocks) return;
    const std::uint32_t count = (Traits::kBlocks - exchange.mine + exchange.workers - 1) / exchange.workers;
    ResidualPairs residual;
    const auto ask_for_residual = [&] {
      residual = ResidualPairs(output(), first_row(segment.block), 8 * exchange.mine, lane_);
    };
    if constexpr (!Traits::kRounds) ask_for_residual();
    const std::uint32_t sums = this->sums();
    float sum[4] = {0.0F, 0.0F, 0.0F, 0.0F};
    collect(
        exchange, count, p_.plan.all_shared(),
        [&](std::uint32_t i) { return ptx::load_shared_16(sums + 4096 * i); },
        [&](uint4 v, bool last, std::uint32_t i) {
          sum[0] += __uint_as_float(v.x);
          sum[1] += __uint_as_float(v.y);
          sum[2] += __uint_as_float(v.z);
          sum[3] += __uint_as_float(v.w);
          if (!last) return;
          ptx::store_shared_16(sums + 4096 * i, as_words(sum));
          sum[0] = sum[1] = sum[2] = sum[3] = 0.0F;
        });
    __syncwarp();
    if constexpr (Traits::kRounds) {  // no registers left for it before
      find_itself();
      ask_for_residual();
    }
    emit(terms, segment.block, exchange.mine, exchange.workers, count, residual);
  }

  const DecodeParams& p_;
  const DecodeShared<Traits>& shared_;
  const float* scales_;
  std::uint32_t group_, warp_, lane_;
  OutputParams own_output_;  // of this CTA's tokens, where there are several tiles of them
  WeightFragment codes_;     // of the weight ring's stage
  RingPosition<Traits::kWeightStages> weights_;
  RingPosition<Traits::kTokenStages> tokens_;
};

// A CTA without work, on a multiprocessor that would be free else: the next kernel's CTAs, which come while
// this kernel's still hold one place of two on every other multiprocessor, would go there in pairs. It stays
// until they have come.
__device__ __forceinline__ void keep_place(std::uint32_t nanoseconds) {
  ptx::launch_next_kernel();
  // Its CTAs' places are the next kernel's; and no CTA may end before that kernel has, or the next would not
  // wait for it.
  ptx::wait_for_previous_kernel();
  __nanosleep(nanoseconds);
}

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

  if constexpr (Traits::kClusters) {
    if (blockIdx.x >= p.plan.workers) return keep_place(p.keep_nanoseconds);
  }
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
        // In halves the other warpgroup sums too what this one has put in place.
        ptx::mbarrier_init(shared.received(), Traits::kHalves ? 1 + 8 * ptx::kWarpArrivals : 1);
        ptx::mbarrier_init(shared.all_ready(), 8 * p.plan.shares);
        // Parts of 2048 bytes of this CTA's share of the blocks, from each other CTA.
        const std::uint32_t all = (Traits::kHalves ? 1 : 2) * Traits::kBlocks;
        const std::uint32_t blocks = (all + p.plan.shares - 1 - shared.rank) / p.plan.shares;
        ptx::mbarrier_expect(shared.received(), 2048 * blocks * Traits::kParts * (p.plan.shares - 1));
      }
      ptx::mbarrier_init_fence();
    }
    __syncwarp();
    // Tokens wait for the barriers alone, consumers for the table and the cluster's other CTAs too.
    ptx::named_barrier_arrive<64>(kTokensMayCome);
    ptx::named_barrier_arrive<288>(kReady);
    weights.first();
  } else if (warp == 9) {
    if (ptx::elect_one()) ptx::tensor_prefetch(&token_map);
    __syncwarp();
    ptx::named_barrier<64>(kTokensMayCome);
  } else {
    build_table(reinterpret_cast<uint2*>(shared_bytes + Traits::kTableOffset), p.levels, threadIdx.x, 256);
    ptx::named_barrier<288>(kReady);
  }
  if constexpr (Traits::kClusters) ptx::cluster_arrive();
  watch.stamp(Stamp::ready);

  if (warp < 8) {
    // The others' barriers. (Without a cluster the wait would be one for all warps of the CTA, which never
    // come.)
    if (Traits::kClusters && p.plan.shares > 1) ptx::cluster_wait();
    DecodeConsumer<Traits, kVariant>(p, shared, scales, warp, lane).run(watch);
    if (threadIdx.x == 0) watch.write(p.profile);
  } else if (warp == 8) {
    weights.rest();
  } else {
    fetch_tokens<Traits>(p, &token_map, shared, scales, lane);
  }
}

}  // namespace fireq::kernels
