// Prefill GEMM for sm_90a: 128 output channels x kTokens tokens a CTA, both operands through shared memory,
// weights expanded to FP8 in registers on the way to wgmma.
//
//   warps 0-7    two consumer warpgroups of 64 rows each, m64nNk32, one commit a k32 step: while four
//   multiplies are in flight,
//                the next step's codes are expanded into the registers of the oldest
//   warp 8       producer: one bulk copy (weights) and one tensor copy (tokens) a stage of K = 128
//   warps 9-11   idle; they fill the producer's warpgroup so that setmaxnreg can give its registers to the
//   consumers
// CTAs are persistent, in clusters of two along N: each fetches half of the token tile for both. Work goes in
// groups of 2048 tokens, tokens fastest, so that a group's tokens and a few row tiles of weights stay in L2.
// SplitPlan divides it: what does not fill a whole round of clusters is cut along K, done first, and summed
// at the end from scaled FP16 partial sums in the workspace.
//
// The accumulators of FP8 wgmma keep about 13 bits below the running sum: at a K of more than kPromoteGroups
// groups, partial sums wait in the output staging buffer as scaled FP16 pairs (2^-12 relative: far below what
// bf16 output rounds away).
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/partials.cuh"
#include "kernels/cuda/prefill_producer.cuh"
#include "kernels/cuda/profile.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/weight_tile.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/split_plan.hpp"

namespace fireq::kernels {

template <class Traits, Variant kVariant>
class PrefillConsumer {
 public:
  __device__ __forceinline__ PrefillConsumer(const PrefillParams& p, const CUtensorMap* out_map,
                                             const PrefillShared<Traits>& shared, std::uint32_t warp,
                                             std::uint32_t lane)
      : p_(p),
        out_map_(out_map),
        shared_(shared),
        group_(warp / 4),
        warp_(warp % 4),
        lane_(lane),
        empties_(ptx::in_cluster(shared.empty(0), shared.cluster_rank ^ (lane % kPrefillCluster))) {}

  __device__ __forceinline__ void run(Stopwatch<kVariant == Variant::profile>& watch) {
    ptx::wait_for_previous_kernel();  // token scales and residual are its results
    SegmentWalk walk(p_.plan, worker());
    Segment segment;
    float acc[Traits::kAccumulators];
    start(watch);
    while (walk.next(segment)) {
      const BlockPlace place(p_, Traits::kTokens, segment.block);
      const std::uint32_t tile = place.row_pair * kPrefillCluster + shared_.rank();
      const std::uint32_t row = first_row(tile);
      const std::uint32_t first_token = place.token_tile * Traits::kTokens;
      const RowTerms terms(p_.output, row + 16 * warp_ + lane_ / 4);
      float scale[kScales];  // of token 32 i + lane
#pragma unroll
      for (std::uint32_t i = 0; i < kScales; ++i) scale[i] = token_scale(first_token + 32 * i + lane_);
      staging_free_ = false;
      std::uint32_t stop = segment.begin;
      const std::uint32_t earlier = group_ * Traits::kStages;
      for (std::uint32_t next = segment.begin + p_.chunk; stop != segment.end; next += p_.chunk) {
        const std::uint32_t g = stop;
        stop = promotion_after(g, next, segment.end, earlier);
        multiply(g, __shfl_sync(0xffffffffU, stop - g, 0), row, place.token_tile, acc, watch);
        watch.begin_wait();
        if (g != segment.begin) add_partial(acc);
        if (stop != segment.end) store_partial(acc);
        watch.end_wait(Waited::epilogue);
      }
      watch.stamp(Stamp::multiplied);
      if (tile >= p_.row_tiles) continue;
      watch.begin_wait();
      if (segment.begin == 0 && segment.end == p_.plan.units) {
        emit(terms, scale, row, first_token, acc);
      } else if (p_.cluster_shares > 1) {
        send(scale, acc);
        watch.stamp(Stamp::stored);
        receive(terms, row + 16 * warp_, first_token);
      } else {
        const Exchange exchange = exchange_of(segment.block);
        uint4* slot = exchange.at(exchange.offset(exchange.me, 0));
        std::uint32_t own = kPieces;
        if (p_.plan.all_shared()) {  // stays here: no other tile wants the staging buffer
          claim_staging();
          own = exchange.mine;
        }
        std::uint32_t to = sums();
#pragma unroll
        for (std::uint32_t i = 0; i < kPieces; ++i) {
          const uint4 v = pack(acc + 8 * i);
          if (i == own) {
            ptx::store_shared_16(to, not_empty(v));
            to += 4096;
            own += exchange.workers;
          } else {
            publish(slot + 128 * i, v);
          }
        }
      }
      watch.end_wait(Waited::epilogue);
    }
    if (p_.cluster_shares == 1) {
      watch.stamp(Stamp::stored);
      reduce();
    }
    watch.stamp(Stamp::reduced);
    if (first_thread()) ptx::store_wait_read();
  }

 private:
  static constexpr std::uint32_t kScales = Traits::kTokens / 32;
  static constexpr std::uint32_t kPieces = Traits::kTokens / 16;  // of 64 rows x 16 tokens

  // Asked for again rather than kept: it would cost a register that the accumulators need.
  __device__ __forceinline__ std::uint32_t worker() const {
    return blockIdx.x / kPrefillCluster;
  }
  __device__ __forceinline__ bool first_thread() const {
    return warp_ == 0 && lane_ == 0;
  }
  __device__ __forceinline__ std::uint32_t first_row(std::uint32_t tile) const {
    return tile * kTileRows + group_ * kHalfRows;
  }
  __device__ __forceinline__ float token_scale(std::uint32_t token) const {
    return token < p_.output.tokens ? __ldcg(p_.token_scale + token) : 0.0F;
  }
  __device__ __forceinline__ std::uint32_t staging() const {
    return shared_.base + Traits::kStagingOffset + group_ * Traits::kStagingBytes;
  }
  __device__ __forceinline__ void sync() const {
    ptx::named_barrier<128>(1 + group_);
  }
  // The tile before may still be on its way out of the staging buffer.
  __device__ __forceinline__ void claim_staging() {
    if (staging_free_) return;
    if (first_thread()) ptx::store_wait_read();
    sync();
    staging_free_ = true;
  }

  // The first stage's codes.
  __device__ __forceinline__ void start(Stopwatch<kVariant == Variant::profile>& watch) {
    wait_for(0, 0, watch);
    watch.stamp_once(Stamp::first_tokens);
    codes_.load(shared_.weights(0) + group_ * kHalfBytes, shared_.base + Traits::kTableOffset, warp_, lane_);
  }
  __device__ __forceinline__ void wait_for(std::uint32_t stage, std::uint32_t parity,
                                           Stopwatch<kVariant == Variant::profile>& watch) const {
    watch.begin_wait();
    ptx::mbarrier_wait(shared_.full(stage), parity);
    watch.end_wait(Waited::weights);
  }
  // acc = sum over `count` K groups from the ring's position on, `start` the first of them in the matrix.
  __device__ __forceinline__ void multiply(std::uint32_t start, std::uint32_t count, std::uint32_t row,
                                           std::uint32_t token_tile, float (&acc)[Traits::kAccumulators],
                                           Stopwatch<kVariant == Variant::profile>& watch) {
    constexpr std::uint32_t kStages = Traits::kStages;
    std::uint32_t a[4][4];
#pragma unroll
    for (std::uint32_t i = 0; i < Traits::kAccumulators; ++i) acc[i] = 0.0F;
    pin(acc);
    // `stage` is multiplied while the codes of `next` are loaded; the tokens of `before` are free then.
    const auto group = [&](std::uint32_t stage, std::uint32_t next, std::uint32_t parity,
                           std::uint32_t before, bool release_before, std::uint64_t descriptor) {
      wait_for(next, parity, watch);
      const std::uint32_t from = shared_.weights(next) + group_ * kHalfBytes;
      std::uint32_t sigma = 0;
#pragma unroll
      for (std::uint32_t s = 0; s < 4; ++s) {
        wgmma_wait<3>();  // the multiply that read a[s] last is done
        if (s == 3) release(before, release_before);
        codes_.expand(s, a[s]);
        pin(a[s]);
        if (s == 1) sigma = codes_.load_first(from, warp_, lane_);
        if (s ==
            2) {  // not before the codes were used: an arrival may overtake loads that have not come back
          __syncwarp();
          if (ptx::arrives(lane_, 0)) ptx::mbarrier_arrive(shared_.weight_empty(stage));
        }
        if (s == 3) codes_.load_second(from, shared_.base + Traits::kTableOffset, sigma, warp_, lane_);
        if constexpr (kVariant == Variant::dump)
          if (token_tile == 0)
            dump_fragment(p_.dump, p_.output.rows, p_.groups, row + 16 * warp_, start, s, lane_, a[s]);
        wgmma_fence();
        Wgmma<Traits::kTokens>::multiply(acc, a[s], descriptor + 2 * s);
        wgmma_commit();
      }
      ++start;
    };
    const std::uint64_t first_tokens = wgmma_descriptor(shared_.tokens(0));
    bool released = true;  // the stage before this one
    while (count != 0) {
      if (ring_.index == 0 && count >= kStages) {
        // A whole round of the ring: nothing is left to compute about its stages. The integer units are as
        // busy as the tensor cores, so that each instruction counts.
#pragma unroll
        for (std::uint32_t i = 0; i < kStages; ++i)
          group(i, (i + 1) % kStages, i + 1 == kStages ? ring_.parity ^ 1U : ring_.parity,
                (i + kStages - 1) % kStages, i != 0 || !released,
                first_tokens + i * (Traits::kTokenBytes / 16));
        ring_.parity ^= 1U;
        count -= kStages;
      } else {
        RingPosition<kStages> next = ring_;
        next.advance();
        group(ring_.index, next.index, next.parity, ring_.previous(), !released,
              wgmma_descriptor(ptx::uniform(shared_.tokens(ring_.index))));
        ring_ = next;
        --count;
      }
      released = false;
    }
    wgmma_wait<0>();
    pin(acc);
    release(ring_.previous(), true);
  }

  // One arrival a warp at both CTAs, whose producers write this stage.
  __device__ __forceinline__ void release(std::uint32_t stage, bool condition) const {
    __syncwarp();
    if constexpr (ptx::kWarpArrivals == 1) {
      if (condition && lane_ < kPrefillCluster) ptx::mbarrier_arrive_cluster(empties_ + 8 * stage);
    } else {
      ptx::mbarrier_arrive_if(shared_.empty(stage), condition);
      ptx::mbarrier_arrive_cluster_if(shared_.empty(stage), shared_.cluster_rank ^ 1U, condition);
    }
  }

  __device__ __forceinline__ uint4 pack(const float* v) const {
    return pack_halves(v, p_.partial);
  }
  __device__ __forceinline__ void add(uint4 packed, float* v) const {
    add_halves(packed, p_.partial, v);
  }

  __device__ __forceinline__ std::uint32_t partial_address(std::uint32_t i) const {
    return staging() + 2048 * i + 16 * (32 * warp_ + lane_);
  }
  __device__ __forceinline__ void store_partial(const float (&acc)[Traits::kAccumulators]) {
    claim_staging();
#pragma unroll
    for (std::uint32_t i = 0; i < kPieces; ++i) ptx::store_shared_16(partial_address(i), pack(acc + 8 * i));
  }
  __device__ __forceinline__ void add_partial(float (&acc)[Traits::kAccumulators]) const {
#pragma unroll
    for (std::uint32_t i = 0; i < kPieces; ++i) add(ptx::load_shared_16(partial_address(i)), acc + 8 * i);
  }

  // The staging buffer holds [token][64 rows] bf16, the 16-byte chunk c of a token at c ^ (token % 8).
  __device__ __forceinline__ std::uint32_t staged(std::uint32_t token, std::uint32_t chunk) const {
    return staging() + token * 128 + ((chunk ^ (token & 7U)) << 4U);
  }
  // Chunk i of this thread: 8 rows of one token.
  struct Chunk {
    std::uint32_t token, row;  // of the output
    std::uint32_t address;
    bool whole;          // all 8 rows exist
    std::uint32_t rows;  // how many of them
  };
  __device__ __forceinline__ Chunk chunk_of(std::uint32_t i, std::uint32_t row,
                                            std::uint32_t first_token) const {
    const std::uint32_t index = 128 * i + 32 * warp_ + lane_;
    Chunk c;
    c.token = first_token + index / 8;
    c.row = row + index % 8 * 8;
    c.address = staged(index / 8, index % 8);
    c.whole = c.token < p_.output.tokens && c.row + 8 <= p_.output.rows;
    c.rows = c.token < p_.output.tokens && c.row < p_.output.rows ? min(8U, p_.output.rows - c.row) : 0;
    return c;
  }
  __device__ __forceinline__ void load_residual(std::uint32_t row, std::uint32_t first_token) const {
#pragma unroll 4
    for (std::uint32_t i = 0; i < Traits::kTokens / 16; ++i) {
      const Chunk c = chunk_of(i, row, first_token);
      const std::uint16_t* source = p_.output.residual + c.token * p_.output.residual_pitch + c.row;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (p_.vector_residual && c.whole) {
        v = __ldcg(reinterpret_cast<const uint4*>(source));
      } else {
        std::uint32_t w[4] = {0, 0, 0, 0};
#pragma unroll
        for (std::uint32_t j = 0; j < 8; ++j)
          if (j < c.rows) w[j / 2] |= static_cast<std::uint32_t>(__ldcg(source + j)) << (16 * (j % 2));
        v = make_uint4(w[0], w[1], w[2], w[3]);
      }
      ptx::store_shared_16(c.address, v);
    }
  }
  __device__ __forceinline__ void copy_out(std::uint32_t row, std::uint32_t first_token) const {
#pragma unroll 1
    for (std::uint32_t i = 0; i < Traits::kTokens / 16; ++i) {
      const Chunk c = chunk_of(i, row, first_token);
      const uint4 v = ptx::load_shared_16(c.address);
      const std::uint32_t w[4] = {v.x, v.y, v.z, v.w};
      std::uint16_t* to = p_.output.out + c.token * p_.output.out_pitch + c.row;
      if (p_.tensor_output && c.whole) {
        *reinterpret_cast<uint4*>(to) = v;
      } else {
#pragma unroll
        for (std::uint32_t j = 0; j < 8; ++j)
          if (j < c.rows) to[j] = static_cast<std::uint16_t>(w[j / 2] >> (16 * (j % 2)));
      }
    }
  }

  __device__ __forceinline__ void emit(const RowTerms& terms, const float (&scale)[kScales],
                                       std::uint32_t row, std::uint32_t first_token,
                                       float (&acc)[Traits::kAccumulators]) {
    // Other threads may still read partial sums or the tile before from the staging buffer.
    if (staging_free_) sync();
    claim_staging();
    const bool residual = p_.output.residual != nullptr;
    if (residual) {
      load_residual(row, first_token);
      sync();
    }
    // Matrix q of a move: tokens of block j + q / 2, rows 8 (q % 2) on: 16-byte chunk 2 warp + q % 2.
    const std::uint32_t matrix = lane_ / 8;
    const std::uint32_t at = staged((matrix / 2) * 8 + lane_ % 8, 2 * warp_ + matrix % 2);
#pragma unroll
    for (std::uint32_t j = 0; j < Traits::kTokens / 8; j += 2) {
      std::uint32_t w[4];
      if (residual) ptx::load_matrices_transposed(at + j * 1024, w);
#pragma unroll
      for (std::uint32_t b = 0; b < 2; ++b) {
        float* v = acc + 4 * (j + b);
        const std::uint32_t from = (j + b) % 4 * 8 + 2 * (lane_ % 4);
        const float a0 = __shfl_sync(0xffffffffU, scale[(j + b) / 4], static_cast<int>(from));
        const float a1 = __shfl_sync(0xffffffffU, scale[(j + b) / 4], static_cast<int>(from + 1));
#pragma unroll
        for (std::uint32_t i = 0; i < 2; ++i) {
          v[2 * i] = __fmul_rn(__fmul_rn(a0, terms.scale[i]), v[2 * i]) + terms.bias[i];
          v[2 * i + 1] = __fmul_rn(__fmul_rn(a1, terms.scale[i]), v[2 * i + 1]) + terms.bias[i];
          if (residual) {
            v[2 * i] += __uint_as_float(w[2 * b + i] << 16U);
            v[2 * i + 1] += __uint_as_float(w[2 * b + i] & 0xffff0000U);
          }
          w[2 * b + i] = ptx::pack_bf16(v[2 * i], v[2 * i + 1]);
        }
      }
      ptx::store_matrices_transposed(at + j * 1024, w[0], w[1], w[2], w[3]);
    }
    // The copy engine clips a box at the matrix's edge in steps of 16 bytes: it would write behind a row
    // whose length is no multiple of that.
    const bool by_engine = p_.tensor_output && (p_.output.rows % 8 == 0 || row + kHalfRows <= p_.output.rows);
    if (by_engine) ptx::fence_async_proxy();
    sync();
    if (!by_engine) {
      copy_out(row, first_token);
    } else if (first_thread()) {
      ptx::tensor_store(out_map_, staging(), row, first_token);
      ptx::store_commit();
    }
  }

  // ---- sums of a block that a cluster's CTAs share: piece i is summed and stored by the CTA with share i
  // mod shares, in whose token stages the other CTAs put their parts.
  __device__ __forceinline__ std::uint32_t own_share() const {
    return shared_.cluster_rank / kPrefillCluster;
  }
  // This thread's word of one share's part of a piece.
  __device__ __forceinline__ std::uint32_t part(std::uint32_t piece, std::uint32_t share) const {
    const std::uint32_t shares = p_.cluster_shares;
    const std::uint32_t place = (piece / shares * 2 + group_) * shares + share;
    return shared_.base + Traits::kTokenOffset + 2048 * place + 16 * (32 * warp_ + lane_);
  }
  __device__ __forceinline__ std::uint32_t scale_address(std::uint32_t token) const {
    return shared_.base + Traits::kScaleOffset + 4 * token;
  }
  __device__ __forceinline__ void keep_scales(const float (&scale)[kScales]) const {
    if (group_ != 0 || warp_ != 0) return;
#pragma unroll
    for (std::uint32_t i = 0; i < kScales; ++i) ptx::store_shared_4(scale_address(32 * i + lane_), scale[i]);
  }
  __device__ __forceinline__ void send(const float (&scale)[kScales],
                                       const float (&acc)[Traits::kAccumulators]) const {
    const std::uint32_t shares = p_.cluster_shares;
    // Parts come where other warps and CTAs may still multiply from: each says when it no longer does.
    ptx::fence_async_proxy();
    __syncwarp();
    ptx::mbarrier_arrive_cluster_if(shared_.all_ready(), kPrefillCluster * lane_ + shared_.rank(),
                                    lane_ < shares);
    keep_scales(scale);
    ptx::mbarrier_wait(shared_.all_ready(), 0);
    std::uint32_t owner = 0;
#pragma unroll
    for (std::uint32_t i = 0; i < kPieces; ++i) {
      const uint4 v = pack(acc + 8 * i);
      const std::uint32_t to = part(i, own_share());
      const std::uint32_t cta = kPrefillCluster * owner + shared_.rank();
      if (cta == shared_.cluster_rank)
        ptx::store_shared_16(to, v);
      else
        ptx::store_async_16(ptx::in_cluster(to, cta), v, ptx::in_cluster(shared_.received(), cta));
      owner = owner + 1 == shares ? 0 : owner + 1;
    }
    ptx::named_barrier<256>(3);  // the scales
  }
  __device__ __forceinline__ void receive(const RowTerms& terms, std::uint32_t row,
                                          std::uint32_t first_token) const {
    const std::uint32_t shares = p_.cluster_shares;
    ptx::mbarrier_wait(shared_.received(), 0);
#pragma unroll 1
    for (std::uint32_t i = own_share(); i < kPieces; i += shares) {
      const ResidualPairs residual[2] = {{p_.output, row, first_token + 16 * i, lane_},
                                         {p_.output, row, first_token + 16 * i + 8, lane_}};
      float v[8] = {};
#pragma unroll 1
      for (std::uint32_t share = 0; share < shares; ++share) add(ptx::load_shared_16(part(i, share)), v);
#pragma unroll
      for (std::uint32_t b = 0; b < 2; ++b) {
        const std::uint32_t token = 16 * i + 8 * b;
        const uint2 a = ptx::load_shared_8(scale_address(token + 2 * (lane_ % 4)));
        float block[4] = {v[4 * b], v[4 * b + 1], v[4 * b + 2], v[4 * b + 3]};
        finish_and_store(p_.output, terms, row, first_token + token, lane_, __uint_as_float(a.x),
                         __uint_as_float(a.y), block, residual[b]);
      }
    }
  }

  __device__ __forceinline__ Exchange exchange_of(std::uint32_t block) const {
    // A worker's place holds both CTAs' tiles, two warpgroups each.
    const std::uint32_t part = shared_.rank() * 2 + group_;
    return Exchange(p_.plan, block, worker(), group_ * kPieces,
                    p_.workspace + part * (128 * kPieces) + 32 * warp_ + lane_,
                    2 * kPrefillCluster * 128 * kPieces);
  }
  // This thread's place for finished sums in the staging buffer: two times 16 bytes a piece, 4096 bytes
  // apart.
  __device__ __forceinline__ std::uint32_t sums() const {
    return staging() + 16 * (32 * warp_ + lane_);
  }
  // Sums and stores this worker's pieces of the block that it shares.
  __device__ __forceinline__ void reduce() {
    Segment segment;
    if (!SegmentWalk(p_.plan, worker()).at(0, segment) || segment.block >= p_.plan.split_blocks ||
        (segment.begin == 0 && segment.end == p_.plan.units))
      return;
    const BlockPlace place(p_, Traits::kTokens, segment.block);
    const std::uint32_t tile = place.row_pair * kPrefillCluster + shared_.rank();
    if (tile >= p_.row_tiles) return;
    const bool keeps = p_.plan.all_shared();
    if (!keeps) {
      staging_free_ = false;
      claim_staging();
    }
    const std::uint32_t row = first_row(tile) + 16 * warp_;
    const RowTerms terms(p_.output, row + lane_ / 4);
    const Exchange exchange = exchange_of(segment.block);
    const std::uint32_t mine = exchange.mine;
    if (mine >= kPieces) return;
    const std::uint32_t count = (kPieces - mine + exchange.workers - 1) / exchange.workers;
    // Scales of the pieces' tokens, 32 a register: asked for together, and while the sums come.
    const std::uint32_t first_token = place.token_tile * Traits::kTokens;
    constexpr std::uint32_t kKept =
        (Traits::kTokens + 63) / 64;  // two workers at least: half of the pieces at most
    float scale[kKept];
#pragma unroll
    for (std::uint32_t k = 0; k < kKept; ++k) {
      const std::uint32_t i = 2 * k + lane_ / 16;
      scale[k] =
          i < count ? token_scale(first_token + 16 * (mine + i * exchange.workers) + lane_ % 16) : 0.0F;
    }
    const std::uint32_t sums = this->sums();
    float sum[8] = {};
    collect(
        exchange, count, keeps, [&](std::uint32_t i) { return ptx::load_shared_16(sums + 4096 * i); },
        [&](uint4 v, bool last, std::uint32_t i) {
          add(v, sum);
          if (!last) return;
          ptx::store_shared_16(sums + 4096 * i, as_words(sum));
          ptx::store_shared_16(sums + 4096 * i + 2048, as_words(sum + 4));
#pragma unroll
          for (std::uint32_t k = 0; k < 8; ++k) sum[k] = 0.0F;
        });
    __syncwarp();
    const auto token_of = [&](std::uint32_t i) {
      return first_token + 16 * (mine + i / 2 * exchange.workers) + 8 * (i % 2);
    };
    ResidualPairs residual(p_.output, row, token_of(0), lane_);
#pragma unroll
    for (std::uint32_t k = 0; k < kKept; ++k) {
      // Code that runs once comes from the L2: a loop of it is faster than its copies.
#pragma unroll 1
      for (std::uint32_t i = 4 * k; i < min(4 * k + 4, 2 * count); ++i) {
        const std::uint32_t from = i % 4 * 8 + 2 * (lane_ % 4);
        const float a0 = __shfl_sync(0xffffffffU, scale[k], static_cast<int>(from));
        const float a1 = __shfl_sync(0xffffffffU, scale[k], static_cast<int>(from + 1));
        const uint4 w = ptx::load_shared_16(sums + 2048 * i);
        const ResidualPairs next(p_.output, row, token_of(i + 1), lane_);
        float v[4] = {__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z), __uint_as_float(w.w)};
        finish_and_store(p_.output, terms, row, token_of(i), lane_, a0, a1, v, residual);
        residual = next;
      }
    }
  }

  const PrefillParams& p_;
  const CUtensorMap* out_map_;
  const PrefillShared<Traits>& shared_;
  std::uint32_t group_, warp_, lane_;
  bool staging_free_ = false;
  std::uint32_t empties_;  // the empty barriers of the CTA at which this lane arrives
  RingPosition<Traits::kStages> ring_;
  WeightFragment codes_;  // of the ring's stage
};

template <class Traits, Variant kVariant>
__global__ void __launch_bounds__(kPrefillThreads, 1)
    prefill_kernel(const __grid_constant__ CUtensorMap token_map, const __grid_constant__ CUtensorMap out_map,
                   const __grid_constant__ PrefillParams p) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  const std::uint32_t warp = __shfl_sync(0xffffffffU, threadIdx.x / 32, 0);
  const PrefillShared<Traits> shared{__shfl_sync(0xffffffffU, ptx::smem_address(shared_bytes), 0),
                                     ptx::cluster_rank()};
  const std::uint32_t worker = blockIdx.x / kPrefillCluster;  // a cluster of several pairs: one after another
  Stopwatch<kVariant == Variant::profile> watch;
  watch.stamp(Stamp::started);
  ptx::launch_next_kernel();
  const PrefillProducer<Traits> producer(p, &token_map, shared, worker);
  if (warp == 8) {
    if (ptx::elect_one()) {
      for (std::uint32_t i = 0; i < Traits::kStages; ++i) {
        ptx::mbarrier_init(shared.full(i), 1);
        ptx::mbarrier_init(shared.empty(i), 8 * kPrefillCluster * ptx::kWarpArrivals);
        ptx::mbarrier_init(shared.weight_empty(i), 8 * ptx::kWarpArrivals);
      }
      if (p.cluster_shares > 1) {
        ptx::mbarrier_init(shared.all_ready(), 8 * p.cluster_shares);
        ptx::mbarrier_init(shared.received(), 1);
        // From each other CTA, of both warpgroups, 2048 bytes a piece that is this CTA's.
        const std::uint32_t share = shared.cluster_rank / kPrefillCluster;
        const std::uint32_t pieces = (Traits::kTokens / 16 + p.cluster_shares - 1 - share) / p.cluster_shares;
        ptx::mbarrier_expect(shared.received(), 2 * 2048 * pieces * (p.cluster_shares - 1));
      }
      ptx::mbarrier_init_fence();
    }
    __syncwarp();
    ptx::cluster_arrive();
    producer.fetch_first_weights();
  } else if (warp == 9) {
    ptx::cluster_arrive();
    if (ptx::elect_one()) {
      ptx::tensor_prefetch(&token_map);
      ptx::tensor_prefetch(&out_map);
    }
    __syncwarp();
  } else {
    ptx::cluster_arrive();
    if (warp < 8)
      build_table(reinterpret_cast<uint2*>(shared_bytes + Traits::kTableOffset), p.levels, threadIdx.x, 256);
  }
  ptx::cluster_wait();  // both CTAs' barriers
  watch.stamp(Stamp::ready);
  if (warp < 8) {
    ptx::registers_increase<232>();
    ptx::named_barrier<256>(3);                                                 // the table
    const std::uint32_t again = __shfl_sync(0xffffffffU, threadIdx.x / 32, 0);  // not kept: see worker()
    PrefillConsumer<Traits, kVariant>(p, &out_map, shared, again, ptx::lane_index()).run(watch);
    if (threadIdx.x == 0) watch.write(p.profile);
  } else {
    ptx::registers_decrease<40>();
    if (warp == 8) producer.run();
  }
  // A CTA must not leave while the other may still write its shared memory or its barriers.
  __syncwarp();
  ptx::cluster_sync();
}

}  // namespace fireq::kernels
