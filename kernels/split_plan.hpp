// How blocks (output tiles) are divided among workers (CTAs or clusters) that do not come out even: whole
// rounds of blocks, one a worker, and before them the remainder, each of its blocks cut along K into shares
// of the same size, one a worker. A worker has at most one share. Shares come first so that the partial sums
// travel while whole blocks are computed. Used on the host (tests, heuristics) and the device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FIREQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FIREQ_HOST_DEVICE inline
#endif

namespace fireq::kernels {

// Units are steps along K of one block (one pipeline stage each). blocks * units < 2^31.
struct SplitPlan {
  std::uint32_t blocks = 0;
  std::uint32_t units = 0;          // per block, >= 1
  std::uint32_t workers = 0;        // all that run
  std::uint32_t split_blocks = 0;   // blocks [0, split_blocks) are shared
  std::uint32_t split_workers = 0;  // workers [0, split_workers) have a share, none of them empty
  // The first `wide_blocks` shared blocks have shares + 1 workers, the others `shares`; within a block the
  // first (wide_)longer shares have a unit more than (wide_)share. Kept here so that the device divides
  // little.
  std::uint32_t shares = 1;
  std::uint32_t wide_blocks = 0;
  std::uint32_t share = 0, longer = 0;
  std::uint32_t wide_share = 0, wide_longer = 0;

  // First unit of a worker's share, in units of all split blocks.
  FIREQ_HOST_DEVICE std::uint32_t share_begin(std::uint32_t worker) const {
    const std::uint32_t wide = wide_blocks * (shares + 1);
    if (worker < wide) {
      const std::uint32_t block = worker / (shares + 1);
      const std::uint32_t i = worker - block * (shares + 1);
      return block * units + i * wide_share + (i < wide_longer ? i : wide_longer);
    }
    const std::uint32_t block = (worker - wide) / shares;
    const std::uint32_t i = worker - wide - block * shares;
    return (wide_blocks + block) * units + i * share + (i < longer ? i : longer);
  }
  FIREQ_HOST_DEVICE std::uint32_t first_worker(std::uint32_t block) const {
    return block * shares + (block < wide_blocks ? block : wide_blocks);
  }
  FIREQ_HOST_DEVICE std::uint32_t workers_of(std::uint32_t block) const {
    return shares + (block < wide_blocks ? 1U : 0U);
  }
  // No whole blocks follow the shares.
  FIREQ_HOST_DEVICE bool all_shared() const { return split_blocks == blocks; }
};

inline SplitPlan make_split_plan(std::uint32_t blocks, std::uint32_t units, std::uint32_t workers) {
  SplitPlan plan;
  plan.blocks = blocks;
  plan.units = units;
  plan.workers = workers;
  plan.split_blocks = blocks <= workers ? blocks : blocks % workers;
  if (plan.split_blocks == 0) return plan;
  plan.shares = workers / plan.split_blocks < units ? workers / plan.split_blocks : units;
  const std::uint32_t left = workers - plan.shares * plan.split_blocks;
  plan.wide_blocks = plan.shares == units ? 0 : left;  // < split_blocks
  plan.split_workers = plan.shares * plan.split_blocks + plan.wide_blocks;
  plan.share = units / plan.shares;
  plan.longer = units % plan.shares;
  plan.wide_share = units / (plan.shares + 1);
  plan.wide_longer = units % (plan.shares + 1);
  return plan;
}

// One worker's part of one block: units [begin, end).
struct Segment {
  std::uint32_t block = 0;
  std::uint32_t begin = 0;
  std::uint32_t end = 0;
};

// Walks a worker's segments in order: its share of a split block, then whole blocks.
class SegmentWalk {
 public:
  FIREQ_HOST_DEVICE SegmentWalk(const SplitPlan& plan, std::uint32_t worker)
      : plan_(plan), worker_(worker), shares_(worker < plan.split_workers ? 1U : 0U) {}
  FIREQ_HOST_DEVICE bool next(Segment& s) { return at(turn_++, s); }
  // The turn-th segment; if there is none, false, and s as it was. Little is kept between two of them.
  FIREQ_HOST_DEVICE bool at(std::uint32_t turn, Segment& s) const {
    if (turn < shares_) {
      const std::uint32_t begin = plan_.share_begin(worker_);
      s.block = begin / plan_.units;
      s.begin = begin - s.block * plan_.units;
      s.end = s.begin + plan_.share_begin(worker_ + 1) - begin;
      return true;
    }
    const std::uint32_t block = plan_.split_blocks + worker_ + (turn - shares_) * plan_.workers;
    if (block >= plan_.blocks) return false;
    s.block = block;
    s.begin = 0;
    s.end = plan_.units;
    return true;
  }

 private:
  const SplitPlan& plan_;
  std::uint32_t worker_, shares_;
  std::uint32_t turn_ = 0;
};

// ---- Prefill's promotions: the accumulators of FP8 multiplies are added to sums kept more exactly, and
// cleared, after at most so many K groups.
inline constexpr std::uint32_t kPromoteGroups = 24;

// Groups between two promotions for a K of `groups`: even chunks, in whole rounds of a ring of `stages`, of
// more than one round. stages <= kPromoteGroups / 2.
constexpr std::uint32_t prefill_chunk(std::uint32_t groups, std::uint32_t stages) {
  const std::uint32_t chunks = groups == 0 ? 1 : (groups + kPromoteGroups - 1) / kPromoteGroups;
  const std::uint32_t rounds = ((groups + chunks - 1) / chunks + stages - 1) / stages;
  const std::uint32_t most = kPromoteGroups / stages;
  return (rounds < 2 ? 2 : rounds < most ? rounds : most) * stages;
}
// Where the chunk that begins at group g of a segment ends. next: where it would in even chunks; the second
// warpgroup promotes a round `earlier` than the first, which multiplies meanwhile.
FIREQ_HOST_DEVICE std::uint32_t promotion_after(std::uint32_t g, std::uint32_t next, std::uint32_t end,
                                                std::uint32_t earlier) {
  return end - g <= kPromoteGroups ? end : next - earlier;
}

}  // namespace fireq::kernels
