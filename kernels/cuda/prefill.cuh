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
//
// The accumulators of FP8 wgmma keep about 13 bits below the running sum: at a K of more than kPromoteGroups
// groups, partial sums wait in the output staging buffer as scaled FP16 pairs (2^-12 relative: far below what
// bf16 output rounds away).
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/weight_tile.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace fireq::kernels {

inline constexpr std::uint32_t kPrefillThreads = 384;
inline constexpr std::uint32_t kPrefillCluster = 2;
inline constexpr std::uint32_t kPromoteGroups = 32;
inline constexpr std::uint32_t kRasterTokens = 2048;
inline constexpr std::uint32_t kPrefillSharedLimit = 232448;

struct PrefillParams {
  const std::uint8_t* tiles;
  const float* token_scale;
  OutputParams output;
  LevelsParam levels;
  std::uint8_t* dump;         // expanded operands [N, Kp], debug kernels only
  std::uint32_t groups;       // Kp / 128
  std::uint32_t row_tiles;    // ceil(N / 128)
  std::uint32_t token_tiles;  // ceil(M / kTokens)
  std::uint32_t chunk;        // groups between promotions
  float partial_scale;        // a power of two that brings any partial sum into FP16's range
  float partial_unscale;      // its inverse
  bool tensor_output;         // output rows are 16-byte aligned: stored by the copy engine
};

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
  static constexpr std::uint32_t kBarrierOffset = kWeightOffset + kStages * kTileBytes;
  static constexpr std::uint32_t kSharedBytes = kBarrierOffset + 16 * kStages;
  static_assert(kSharedBytes <= kPrefillSharedLimit);
};

template <class Traits>
struct PrefillShared {
  std::uint32_t base;
  std::uint32_t rank;
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
};

// The output tiles of one cluster, in raster order.
class TileWalk {
 public:
  __device__ __forceinline__ TileWalk(const PrefillParams& p, std::uint32_t tokens, std::uint32_t cluster,
                                      std::uint32_t clusters)
      : pairs_((p.row_tiles + kPrefillCluster - 1) / kPrefillCluster),
        token_tiles_(p.token_tiles),
        wide_(kRasterTokens / tokens),
        next_(cluster),
        step_(clusters) {}
  __device__ __forceinline__ bool next(std::uint32_t& row_pair, std::uint32_t& token_tile) {
    if (next_ >= pairs_ * token_tiles_) return false;
    const std::uint32_t group = next_ / (pairs_ * wide_);
    const std::uint32_t within = next_ - group * pairs_ * wide_;
    const std::uint32_t width = min(wide_, token_tiles_ - group * wide_);
    row_pair = within / width;
    token_tile = group * wide_ + within % width;
    next_ += step_;
    return true;
  }

 private:
  std::uint32_t pairs_, token_tiles_, wide_, next_, step_;
};

template <class Traits>
__device__ __forceinline__ void fetch_stages(const PrefillParams& p, const CUtensorMap* token_map,
                                             const PrefillShared<Traits>& shared, TileWalk walk) {
  ptx::wait_for_previous_kernel();
  RingPosition<Traits::kStages> ring;
  std::uint32_t row_pair, token_tile;
  while (walk.next(row_pair, token_tile)) {
    // With an odd number of row tiles the last pair's second CTA computes the last tile again and stores
    // nothing.
    const std::uint32_t tile = min(row_pair * kPrefillCluster + shared.rank, p.row_tiles - 1);
    const std::uint8_t* source = p.tiles + static_cast<std::uint64_t>(tile) * p.groups * kTileBytes;
    constexpr std::uint32_t kShare = Traits::kTokens / kPrefillCluster;
    const std::uint32_t first_token = token_tile * Traits::kTokens + shared.rank * kShare;
    for (std::uint32_t g = 0; g < p.groups; ++g) {
      ptx::mbarrier_wait(shared.empty(ring.index), ring.parity ^ 1U);
      if (ptx::elect_one()) {
        const std::uint32_t full = shared.full(ring.index);
        ptx::mbarrier_expect(full, kTileBytes + Traits::kTokenBytes);
        ptx::bulk_load(shared.weights(ring.index), source + static_cast<std::uint64_t>(g) * kTileBytes,
                       kTileBytes, full);
        ptx::tensor_load_multicast(shared.tokens(ring.index) + shared.rank * kShare * kGroup, token_map,
                                   g * kGroup, first_token, full, (1U << kPrefillCluster) - 1U);
      }
      __syncwarp();
      ring.advance();
    }
  }
}

template <class Traits, bool kDump>
class PrefillConsumer {
 public:
  __device__ __forceinline__ PrefillConsumer(const PrefillParams& p, const CUtensorMap* out_map,
                                             const PrefillShared<Traits>& shared, std::uint32_t warp,
                                             std::uint32_t lane)
      : p_(p), out_map_(out_map), shared_(shared), group_(warp / 4), warp_(warp % 4), lane_(lane) {}

  __device__ __forceinline__ void run(TileWalk walk) {
    std::uint32_t row_pair, token_tile;
    float acc[Traits::kAccumulators];
    while (walk.next(row_pair, token_tile)) {
      const std::uint32_t tile = row_pair * kPrefillCluster + shared_.rank;
      const std::uint32_t row = tile * kTileRows + group_ * kHalfRows;  // of this warpgroup
      const RowTerms terms(p_.output, row + 16 * warp_ + lane_ / 4);
      staging_free_ = false;
      for (std::uint32_t g = 0; g < p_.groups; g += p_.chunk) {
        const std::uint32_t stop = min(g + p_.chunk, p_.groups);
        multiply(g, stop, row, token_tile, acc);
        if (g != 0) add_partial(acc);
        if (stop != p_.groups) store_partial(acc);
      }
      if (tile < p_.row_tiles) emit(terms, row, token_tile * Traits::kTokens, acc);
    }
    if (first_thread()) ptx::store_wait_read();
  }

 private:
  __device__ __forceinline__ bool first_thread() const { return warp_ == 0 && lane_ == 0; }
  __device__ __forceinline__ std::uint32_t staging() const {
    return shared_.base + Traits::kStagingOffset + group_ * Traits::kStagingBytes;
  }
  __device__ __forceinline__ void sync() const { ptx::named_barrier<128>(1 + group_); }
  // The tile before may still be on its way out of the staging buffer.
  __device__ __forceinline__ void claim_staging() {
    if (staging_free_) return;
    if (first_thread()) ptx::store_wait_read();
    sync();
    staging_free_ = true;
  }

  __device__ __forceinline__ void multiply(std::uint32_t start, std::uint32_t stop, std::uint32_t row,
                                           std::uint32_t token_tile, float (&acc)[Traits::kAccumulators]) {
    const std::uint32_t table = shared_.base + Traits::kTableOffset;
    std::uint32_t a[4][4];
#pragma unroll
    for (std::uint32_t i = 0; i < Traits::kAccumulators; ++i) acc[i] = 0.0F;
    pin(acc);
    for (std::uint32_t g = start; g < stop; ++g) {
      ptx::mbarrier_wait(shared_.full(ring_.index), ring_.parity);
      WeightFragment fragment;
      fragment.load(shared_.weights(ring_.index) + group_ * kHalfBytes, table, warp_, lane_);
      const std::uint64_t descriptor = wgmma_descriptor(shared_.tokens(ring_.index));
#pragma unroll
      for (std::uint32_t s = 0; s < 4; ++s) {
        wgmma_wait<3>();  // the multiply that read a[s] last is done
        if (s == 3) release(ring_.previous(), g != start);
        fragment.expand(s, a[s]);
        pin(a[s]);
        if constexpr (kDump)
          if (token_tile == 0)
            dump_fragment(p_.dump, p_.output.rows, p_.groups, row + 16 * warp_, g, s, lane_, a[s]);
        wgmma_fence();
        Wgmma<Traits::kTokens>::multiply(acc, a[s], descriptor + 2 * s);
        wgmma_commit();
      }
      ring_.advance();
    }
    wgmma_wait<0>();
    pin(acc);
    release(ring_.previous(), true);
  }

  // One arrival a warp at both CTAs, whose producers write this stage.
  __device__ __forceinline__ void release(std::uint32_t stage, bool condition) const {
    ptx::mbarrier_arrive_cluster_if(shared_.empty(stage), lane_, condition && lane_ < kPrefillCluster);
  }

  __device__ __forceinline__ std::uint32_t partial_address(std::uint32_t i) const {
    return staging() + 2048 * i + 16 * (32 * warp_ + lane_);
  }
  __device__ __forceinline__ void store_partial(const float (&acc)[Traits::kAccumulators]) {
    claim_staging();
#pragma unroll
    for (std::uint32_t i = 0; i < Traits::kAccumulators / 8; ++i) {
      std::uint32_t w[4];
#pragma unroll
      for (std::uint32_t j = 0; j < 4; ++j) {
        const __half2 h = __floats2half2_rn(acc[8 * i + 2 * j] * p_.partial_scale,
                                            acc[8 * i + 2 * j + 1] * p_.partial_scale);
        w[j] = *reinterpret_cast<const std::uint32_t*>(&h);
      }
      ptx::store_shared_16(partial_address(i), make_uint4(w[0], w[1], w[2], w[3]));
    }
  }
  __device__ __forceinline__ void add_partial(float (&acc)[Traits::kAccumulators]) const {
#pragma unroll
    for (std::uint32_t i = 0; i < Traits::kAccumulators / 8; ++i) {
      const uint4 v = ptx::load_shared_16(partial_address(i));
      const std::uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (std::uint32_t j = 0; j < 4; ++j) {
        const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&w[j]));
        acc[8 * i + 2 * j] = __fmaf_rn(f.x, p_.partial_unscale, acc[8 * i + 2 * j]);
        acc[8 * i + 2 * j + 1] = __fmaf_rn(f.y, p_.partial_unscale, acc[8 * i + 2 * j + 1]);
      }
    }
  }

  __device__ __forceinline__ void emit(const RowTerms& terms, std::uint32_t row, std::uint32_t first_token,
                                       float (&acc)[Traits::kAccumulators]) {
    if (p_.tensor_output) {
      // The partial sums of other threads may still be in the staging buffer: all of them have to be read
      // first.
      if (staging_free_) sync();
      claim_staging();
    }
    const std::uint32_t m = lane_ % 8;
    const std::uint32_t matrix = lane_ / 8;
    // Matrix q of a store: tokens of block j + q / 2, rows 8 (q % 2) on: 16-byte chunk 2 warp + q % 2 of the
    // token's 128 bytes.
    const std::uint32_t to =
        staging() + ((matrix / 2) * 8 + m) * 128 + (((2 * warp_ + matrix % 2) ^ m) << 4U);
#pragma unroll
    for (std::uint32_t j = 0; j < Traits::kTokens / 8; j += 2) {
      float v[2][4];
#pragma unroll
      for (std::uint32_t b = 0; b < 2; ++b) {
#pragma unroll
        for (std::uint32_t i = 0; i < 4; ++i) v[b][i] = acc[4 * (j + b) + i];
        const std::uint32_t token = first_token + 8 * (j + b) + 2 * (lane_ % 4);
        const float a0 = token < p_.output.tokens ? __ldcg(p_.token_scale + token) : 0.0F;
        const float a1 = token + 1 < p_.output.tokens ? __ldcg(p_.token_scale + token + 1) : 0.0F;
        finish_block(p_.output, terms, row + 16 * warp_ + lane_ / 4, token, a0, a1, v[b]);
        if (!p_.tensor_output)
          store_block(p_.output, row + 16 * warp_, first_token + 8 * (j + b), lane_, v[b]);
      }
      if (p_.tensor_output)
        ptx::store_matrices_transposed(to + j * 1024, ptx::pack_bf16(v[0][0], v[0][1]),
                                       ptx::pack_bf16(v[0][2], v[0][3]), ptx::pack_bf16(v[1][0], v[1][1]),
                                       ptx::pack_bf16(v[1][2], v[1][3]));
    }
    if (p_.tensor_output) {
      ptx::fence_async_proxy();
      sync();
      if (first_thread()) {
        ptx::tensor_store(out_map_, staging(), row, first_token);
        ptx::store_commit();
      }
    }
  }

  const PrefillParams& p_;
  const CUtensorMap* out_map_;
  const PrefillShared<Traits>& shared_;
  std::uint32_t group_, warp_, lane_;
  bool staging_free_ = false;
  RingPosition<Traits::kStages> ring_;
};

template <class Traits, bool kDump>
__global__ void __launch_bounds__(kPrefillThreads, 1)
    prefill_kernel(const __grid_constant__ CUtensorMap token_map, const __grid_constant__ CUtensorMap out_map,
                   const __grid_constant__ PrefillParams p) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  const std::uint32_t warp = __shfl_sync(0xffffffffU, threadIdx.x / 32, 0);
  const std::uint32_t lane = ptx::lane_index();
  const PrefillShared<Traits> shared{__shfl_sync(0xffffffffU, ptx::smem_address(shared_bytes), 0),
                                     ptx::cluster_rank()};
  if (warp == 8 && ptx::elect_one()) {
    ptx::tensor_prefetch(&token_map);
    ptx::tensor_prefetch(&out_map);
    for (std::uint32_t i = 0; i < Traits::kStages; ++i) {
      ptx::mbarrier_init(shared.full(i), 1);
      ptx::mbarrier_init(shared.empty(i), 8 * kPrefillCluster);
    }
    ptx::mbarrier_init_fence();
  }
  build_table(reinterpret_cast<uint2*>(shared_bytes + Traits::kTableOffset), p.levels, threadIdx.x,
              kPrefillThreads);
  ptx::cluster_sync();
  ptx::launch_next_kernel();

  const TileWalk walk(p, Traits::kTokens, blockIdx.x / kPrefillCluster, gridDim.x / kPrefillCluster);
  if (warp < 8) {
    ptx::registers_increase<232>();
    PrefillConsumer<Traits, kDump>(p, &out_map, shared, warp, lane).run(walk);
  } else {
    ptx::registers_decrease<40>();
    if (warp == 8) fetch_stages<Traits>(p, &token_map, shared, walk);
  }
  // A CTA must not leave while the other may still write its shared memory or its barriers.
  __syncwarp();
  ptx::cluster_sync();
}

}  // namespace fireq::kernels
