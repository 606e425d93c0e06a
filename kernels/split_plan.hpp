// How row blocks are divided among workers (CTAs or clusters) when a GEMM has fewer or more blocks than
// workers: the first `split_blocks` blocks are cut along K into equal shares, one per worker; every worker
// then takes whole blocks. Splitting first lets the partial sums travel while the whole blocks are computed.
// With fewer blocks than workers every block may instead be cut by itself, into equal shares: no worker then
// has parts of two blocks, and sums once ("even"). Used on the host (tests, heuristics) and the device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FIREQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FIREQ_HOST_DEVICE inline
#endif

namespace fireq::kernels {

// Units are steps along K of one block (one pipeline stage each). split_blocks * units < 2^31.
struct SplitPlan {
  std::uint32_t blocks = 0;
  std::uint32_t units = 0;          // per block, >= 1
  std::uint32_t workers = 0;        // all that run
  std::uint32_t split_blocks = 0;   // blocks [0, split_blocks) are shared
  std::uint32_t split_workers = 0;  // workers [0, split_workers) have a share, none of them empty
  // Shares: the first `longer` workers take share + 1 units, the others `share`. Kept here so that the device
  // divides as little as possible: a 64-bit division costs as much as fetching a stage.
  std::uint32_t share = 0;
  std::uint32_t longer = 0;
  // Even plans: the first `wide_blocks` blocks have shares + 1 workers, the others `shares`; within a block
  // the first (wide_)longer shares have a unit more than (wide_)share.
  std::uint32_t shares = 0;  // 0: not even
  std::uint32_t wide_blocks = 0;
  std::uint32_t wide_share = 0;
  std::uint32_t wide_longer = 0;

  FIREQ_HOST_DEVICE std::uint32_t split_units() const { return split_blocks * units; }
  // First unit of a worker's share, in units of all split blocks.
  FIREQ_HOST_DEVICE std::uint32_t share_begin(std::uint32_t worker) const {
    if (shares == 0) return worker * share + (worker < longer ? worker : longer);
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
    return shares == 0 ? worker_of(block * units)
                       : block * shares + (block < wide_blocks ? block : wide_blocks);
  }
  FIREQ_HOST_DEVICE std::uint32_t last_worker(std::uint32_t block) const {
    return shares == 0 ? worker_of(block * units + units - 1) : first_worker(block + 1) - 1;
  }

 private:
  FIREQ_HOST_DEVICE std::uint32_t worker_of(std::uint32_t unit) const {
    const std::uint32_t border = longer * (share + 1);
    return unit < border ? unit / (share + 1) : longer + (unit - border) / share;
  }
};

// `minimum_share`: a remainder that would give a worker fewer units than this is split together with one more
// round of blocks, so that no worker handles crumbs.
inline SplitPlan make_split_plan(std::uint32_t blocks, std::uint32_t units, std::uint32_t workers,
                                 std::uint32_t minimum_share) {
  SplitPlan plan;
  plan.blocks = blocks;
  plan.units = units;
  plan.workers = workers;
  plan.split_blocks = blocks % workers;
  const bool crumbs = plan.split_blocks != 0 && static_cast<std::uint64_t>(plan.split_blocks) * units <
                                                    static_cast<std::uint64_t>(minimum_share) * workers;
  if (crumbs && blocks >= workers) plan.split_blocks += workers;
  const std::uint32_t total = plan.split_units();
  plan.split_workers = total < workers ? (total == 0 ? 1 : total) : workers;
  plan.share = total / plan.split_workers;
  plan.longer = total % plan.split_workers;
  return plan;
}

// The remainder cut block by block: a worker has at most one part of a shared block.
inline SplitPlan make_even_plan(std::uint32_t blocks, std::uint32_t units, std::uint32_t workers) {
  SplitPlan plan;
  plan.blocks = blocks;
  plan.units = units;
  plan.workers = workers;
  plan.split_blocks = blocks <= workers ? blocks : blocks % workers;
  if (plan.split_blocks == 0) {
    plan.split_workers = 1;
    return plan;
  }
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

// Walks a worker's segments in order: its share of the split blocks, then whole blocks.
class SegmentWalk {
 public:
  FIREQ_HOST_DEVICE SegmentWalk(const SplitPlan& plan, std::uint32_t worker) : plan_(plan) {
    const bool shares = plan.split_blocks != 0 && worker < plan.split_workers;
    position_ = shares ? plan.share_begin(worker) : 0;
    end_ = shares ? plan.share_begin(worker + 1) : 0;
    whole_ = plan.split_blocks + worker;
  }
  FIREQ_HOST_DEVICE bool next(Segment& s) {
    if (position_ < end_) {
      s.block = position_ / plan_.units;
      s.begin = position_ - s.block * plan_.units;
      const std::uint32_t left = end_ - position_;
      s.end = s.begin + left < plan_.units ? s.begin + left : plan_.units;
      position_ += s.end - s.begin;
      return true;
    }
    if (whole_ >= plan_.blocks) return false;
    s.block = whole_;
    s.begin = 0;
    s.end = plan_.units;
    whole_ += plan_.workers;
    return true;
  }

 private:
  const SplitPlan& plan_;
  std::uint32_t position_, end_, whole_;
};

// A worker has at most two partial segments: the tail of its first block (slot 0) and the head of its last
// (slot 1).
FIREQ_HOST_DEVICE std::uint32_t partial_slot(const SplitPlan& plan, std::uint32_t worker,
                                             std::uint32_t block) {
  return plan.share_begin(worker) / plan.units == block ? 0 : 1;
}

}  // namespace fireq::kernels
