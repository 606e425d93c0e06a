// Codes moved to a neighbour, and row scales fitted, where that keeps a row's mean output (docs/numerics.md,
// "Keeping the mean").
//
// For inputs of mean m and mean square s per channel, taken as independent about their means, the error e of
// a row costs sum_k (s_k - m_k^2) e_k^2 + (sum_k m_k e_k)^2: the second part is the output's mean error,
// which rounding each weight by itself leaves to chance.
#pragma once

#include <cstdint>
#include <span>

#include "libquant/quantized_linear.hpp"

namespace fireq::libquant {

// Revises rows [row_begin, row_begin + count) of `out`, quantised from w [count, K] before: twice over the
// channels in order, each code moves to the next magnitude or across the sign where the cost falls. Then, up
// to three times, the row scale becomes the storable one (bf16 over 56) nearest to that of least cost, within
// 0.8 and 1.25 times what it was, and the codes move again. Group scales stay, and so does a per-tensor
// scale. mean, mean_square [K]. A pure function of its arguments, FP32 products and FP64 sums.
void keep_row_means(std::span<const float> w, std::uint64_t row_begin, std::uint64_t count,
                    std::span<const float> mean, std::span<const float> mean_square, bool pin_top_scale,
                    QuantizedLinear& out);

}  // namespace fireq::libquant
