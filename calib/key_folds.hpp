// N, S and the shift of one layer's keys, from its statistics and the recipe.
#pragma once

#include <cstdint>
#include <vector>

#include "calib/recipe.hpp"
#include "formats/statistics.hpp"

namespace fireq::calib {

struct KeyFolds {
  std::vector<float> n;  // [KV heads, D]; 1 where off
  std::vector<float> s;  // [KV heads, D]; 1 where off
  // [KV heads, D] what is taken off the keys that N was folded into, after RoPE and before S; 0 on heads that
  // are not centred.
  std::vector<float> shift;
  // [KV heads, D (D + 1) / 2] what the cache's codes are chosen with (libquant/kv_rounding.hpp), or empty.
  std::vector<float> rounding;
};

// qk_norm: one N for all heads. Error(input) when the statistics do not fit those sizes.
KeyFolds key_folds(const Recipe& recipe, const formats::LayerStatistics& statistics, std::uint64_t kv_heads,
                   std::uint64_t head_dim, bool qk_norm);

}  // namespace fireq::calib
