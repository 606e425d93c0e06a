// How the codes of one key, or one value, are chosen together (docs/numerics.md, "Rounding together").
//
// A key's rounding error e [D] costs a score q . e: in the mean square e H e^T, H the second moment of the
// queries that meet the key. A value's costs e H e^T in o_proj's outputs, H = the sum of W^T W over the
// columns W of o_proj that it feeds. With H + lambda I = U U^T, U upper triangular, either is the sum over
// channels j of (sum over i <= j of e_i U_ij)^2: each code can make up for those before it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fireq::libquant {

// Numbers of one head's factor: row i of the triangle, D - i numbers, after row i - 1. The first of a row is
// U_ii^2 over the largest of them, the weight of channel i; then U_ij / U_jj for j > i.
constexpr std::uint64_t kv_rounding_size(std::uint64_t head_dim) {
  return head_dim * (head_dim + 1) / 2;
}

// The factor of one head, each number rounded to BF16. moment [D, D] symmetric, positive semidefinite, in any
// unit; lambda = 1 % of its mean diagonal, more where rounding leaves no factor. A moment of zeros has the
// factor of the unit matrix. Error(input) when a number is not finite.
std::vector<float> kv_rounding(std::span<const double> moment, std::uint64_t head_dim);

// Replaces x [D] by its codes as floats (-7 ... 7) and returns sigma's value, as quantize_kv_in_place does.
// Codes are chosen from channel 0 on, each the nearest to its value and what makes up for the channels before
// it, under each sigma whose E4M3 code is up to 3 above that of max|x| / 7, and of a key also 1 below; the
// one with the least error is taken. (A smaller sigma clips. Attention takes means over values, in which
// clipping, of one sign, does not cancel as rounding does.) FP32 in the order written, the sum of errors
// FP64. Error(input) as quantize_kv_in_place.
enum class KvPart : bool { key, value };
float quantize_kv_together(std::span<float> x, std::span<const float> factor, KvPart part);

}  // namespace fireq::libquant
