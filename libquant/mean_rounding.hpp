// Codes moved to a neighbour where that keeps a row's mean output (docs/numerics.md, "Keeping the mean").
//
// For inputs of mean m and mean square s per channel, taken as independent about their means, the error e of
// a row costs sum_k (s_k - m_k^2) e_k^2 + (sum_k m_k e_k)^2: the second part is the output's mean error,
// which rounding each weight by itself leaves to chance.
#pragma once

#include <cstdint>
#include <span>

#include "libquant/quantized_linear.hpp"

namespace fireq::libquant {

// Revises the codes of rows [row_begin, row_begin + count) of `out`, quantised from w [count, K] before:
// twice over the channels in order, each code moves to the next magnitude or across the sign where the cost
// falls. Scales stay. mean, mean_square [K]. A pure function of its arguments, FP32 products and FP64 sums.
void keep_row_means(std::span<const float> w, std::uint64_t row_begin, std::uint64_t count,
                    std::span<const float> mean, std::span<const float> mean_square, QuantizedLinear& out);

}  // namespace fireq::libquant
