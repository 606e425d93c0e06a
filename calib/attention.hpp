// Causal attention of some query rows of one KV head over its keys, in blocks of 128 keys (absolute key index
// a multiple of 128) with a running maximum. docs/forward-pass.md, "Attention", defines every rounding.
#pragma once

#include <cstddef>
#include <cstdint>

#include "calib/buffer.hpp"
#include "calib/kv_cache.hpp"

namespace fireq::calib {

// Rows of queries that share a KV head: row i at position[i] (ascending) sees keys
// [position[i] + 1 - window, position[i]] (window 0: from the first).
struct QueryRows {
  static constexpr std::size_t kMost = 32;
  std::size_t count = 0;     // <= kMost
  const float* q = nullptr;  // [count, head_dim], row stride `stride`
  std::size_t stride = 0;
  float scale[kMost] = {};  // softmax scale times the query's FP8 scale
  std::uint64_t position[kMost] = {};
};

struct AttentionMode {
  std::uint64_t window = 0;
  bool key_scales = false;  // keys are codes: scores times their scales
  bool value_scales = false;
  bool fp8_p = false;
};

struct AttentionArea {
  FloatBuffer scores, part, sum, result;
};

// out [count, head_dim] (row stride out_stride) = softmax(scale * q k^T) v.
void attend(const KvCache& cache, std::uint64_t sequence, std::uint64_t head, const QueryRows& rows,
            const AttentionMode& mode, AttentionArea& area, float* out, std::size_t out_stride);

}  // namespace fireq::calib
