#include "calib/kv_cache.hpp"

#include <algorithm>

#include "calib/simd.hpp"
#include "common/checked.hpp"
#include "common/error.hpp"

namespace fireq::calib {
namespace {
constexpr std::uint64_t kLanes = simd::kPanel;
constexpr const char* kWhat = "key/value cache";
}  // namespace

KvCache::KvCache(std::uint64_t sequences, std::uint64_t kv_heads, std::uint64_t head_dim,
                 std::uint64_t capacity)
    : sequences_(sequences),
      kv_heads_(kv_heads),
      head_dim_(head_dim),
      value_width_(checked_round_up(head_dim, kLanes, kWhat)) {
  reserve(capacity);
}

void KvCache::reserve(std::uint64_t capacity) {
  const std::uint64_t blocks = checked_round_up(capacity, kBlock, kWhat) / kBlock;
  if (blocks <= blocks_) return;
  const std::uint64_t before = blocks_;
  const std::uint64_t all = checked_mul(checked_mul(sequences_, kv_heads_, kWhat), blocks, kWhat);
  // One head after another: a longer sequence moves the heads apart, from the last to the first.
  const auto grow = [&](FloatBuffer& data, std::uint64_t per_block) {
    data.resize(checked_mul(all, per_block, kWhat), 0.0F);  // lanes past the last key are multiplied too
    if (sequences_ != 1 || before == 0) return;
    for (std::uint64_t head = kv_heads_; head-- > 1;) {
      const auto from = data.begin() + static_cast<std::ptrdiff_t>(head * before * per_block);
      const auto to = data.begin() + static_cast<std::ptrdiff_t>(head * blocks * per_block);
      std::copy_backward(from, from + static_cast<std::ptrdiff_t>(before * per_block),
                         to + static_cast<std::ptrdiff_t>(before * per_block));
    }
  };
  grow(keys_, kBlock * head_dim_);
  grow(values_, kBlock * value_width_);
  grow(key_scales_, kBlock);
  grow(value_scales_, kBlock);
  blocks_ = blocks;
}

void KvCache::put(std::uint64_t sequence, std::uint64_t head, std::uint64_t position,
                  std::span<const float> key, float key_scale, std::span<const float> value,
                  float value_scale) {
  if (sequence >= sequences_ || head >= kv_heads_ || position >= capacity() || key.size() != head_dim_ ||
      value.size() != head_dim_) {
    throw Error(ErrorKind::internal, "key outside the cache");
  }
  const std::uint64_t block = block_index(sequence, head, position / kBlock);
  const std::uint64_t row = position % kBlock;
  float* k = keys_.data() + block * kBlock * head_dim_ + row / kLanes * key_panel_stride() + row % kLanes;
  for (std::uint64_t i = 0; i < head_dim_; ++i) k[i * kLanes] = key[i];
  float* v = values_.data() + block * kBlock * value_width_ + row * kLanes;
  for (std::uint64_t i = 0; i < head_dim_; i += kLanes) {
    const std::uint64_t n = std::min(kLanes, head_dim_ - i);
    float* panel = v + i / kLanes * kBlock * kLanes;
    std::copy_n(value.data() + i, n, panel);
    std::fill(panel + n, panel + kLanes, 0.0F);  // multiplied, though nobody reads the result
  }
  key_scales_[block * kBlock + row] = key_scale;
  value_scales_[block * kBlock + row] = value_scale;
}

const float* KvCache::keys(std::uint64_t sequence, std::uint64_t head, std::uint64_t block) const noexcept {
  return keys_.data() + block_index(sequence, head, block) * kBlock * head_dim_;
}
const float* KvCache::values(std::uint64_t sequence, std::uint64_t head, std::uint64_t block) const noexcept {
  return values_.data() + block_index(sequence, head, block) * kBlock * value_width_;
}
const float* KvCache::key_scales(std::uint64_t sequence, std::uint64_t head,
                                 std::uint64_t block) const noexcept {
  return key_scales_.data() + block_index(sequence, head, block) * kBlock;
}
const float* KvCache::value_scales(std::uint64_t sequence, std::uint64_t head,
                                   std::uint64_t block) const noexcept {
  return value_scales_.data() + block_index(sequence, head, block) * kBlock;
}

}  // namespace fireq::calib
