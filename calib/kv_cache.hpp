// Keys and values of one layer as attention reads them, for one or more sequences.
//
// Keys: panels of 32 keys, [head_dim][32]. Values: blocks of 128 keys, each in panels of 32 channels,
// [128 keys][32]. Quantised ones are stored as their codes (-7 ... 7) with the scale of their (token, KV
// head).
#pragma once

#include <cstdint>
#include <span>

#include "calib/buffer.hpp"

namespace fireq::calib {

class KvCache {
 public:
  static constexpr std::uint64_t kBlock = 128;  // keys per block of P8 and of the running maximum

  KvCache() = default;
  KvCache(std::uint64_t sequences, std::uint64_t kv_heads, std::uint64_t head_dim, std::uint64_t capacity);

  // Room for `capacity` tokens per sequence, keeping what one sequence holds (several: emptied).
  void reserve(std::uint64_t capacity);

  // key and value [head_dim] of one token; scales are 1 for what is not quantised.
  void put(std::uint64_t sequence, std::uint64_t head, std::uint64_t position, std::span<const float> key,
           float key_scale, std::span<const float> value, float value_scale);

  std::uint64_t sequences() const noexcept { return sequences_; }
  std::uint64_t kv_heads() const noexcept { return kv_heads_; }
  std::uint64_t head_dim() const noexcept { return head_dim_; }
  std::uint64_t capacity() const noexcept { return blocks_ * kBlock; }

  // Block `block` of one sequence and head: keys in kBlock/32 panels, key_panel_stride() apart; values in
  // ceil(head_dim/32) panels, kBlock * 32 apart; scales [kBlock].
  const float* keys(std::uint64_t sequence, std::uint64_t head, std::uint64_t block) const noexcept;
  const float* values(std::uint64_t sequence, std::uint64_t head, std::uint64_t block) const noexcept;
  const float* key_scales(std::uint64_t sequence, std::uint64_t head, std::uint64_t block) const noexcept;
  const float* value_scales(std::uint64_t sequence, std::uint64_t head, std::uint64_t block) const noexcept;
  std::uint64_t key_panel_stride() const noexcept { return head_dim_ * 32; }

 private:
  std::uint64_t block_index(std::uint64_t sequence, std::uint64_t head, std::uint64_t block) const noexcept {
    return (sequence * kv_heads_ + head) * blocks_ + block;
  }

  std::uint64_t sequences_ = 0, kv_heads_ = 0, head_dim_ = 0;
  std::uint64_t blocks_ = 0;       // per sequence and head
  std::uint64_t value_width_ = 0;  // head_dim rounded up to panels
  FloatBuffer keys_, values_, key_scales_, value_scales_;
};

}  // namespace fireq::calib
