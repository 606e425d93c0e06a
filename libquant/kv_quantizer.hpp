// INT4 key/value cache and FP8 queries and probabilities (docs/numerics.md, "KV cache"). FP32 IEEE arithmetic
// in the order written. Error(input) for keys, values or queries that are not finite, naming the channel;
// Error(internal) for sizes that do not match.
#pragma once

#include <cstdint>
#include <span>

namespace fireq::libquant {

inline constexpr std::uint64_t kKeyBlock = 128;  // keys per block of P8

// The E4M3 byte of sigma = RN8(max|x| / 7), at least 2^-9.
std::uint8_t kv_scale_code(std::span<const float> x);

// One (token, KV head) vector of length D. Codes are sign-magnitude nibbles of -7..7 (8 never occurs), packed
// two per byte, element 2i low. sigma = RN8(max/7), at least 2^-9. Returns sigma as its E4M3 byte.
std::uint8_t quantize_kv(std::span<const float> x, std::span<std::uint8_t> nibbles);
void dequantize_kv(std::span<const std::uint8_t> nibbles, std::uint8_t sigma, std::span<float> out);

// Replaces x by its codes as floats (-7..7) and returns sigma's value: what attention multiplies.
float quantize_kv_in_place(std::span<float> x);

// Q: FP8 with one scale per (token, head): x becomes decode(RN8(x / a)), returns a = max(max|x|, 2^-20) /
// 448.
float quantize_query_in_place(std::span<float> x);

// P8 for one query row over one block of keys: p[j] (softmax numerators or probabilities, >= 0) times
// sigma_v[j] becomes RN8((448 * p) * sigma_v / m), m = max of sigma_v over the block. p is replaced by the
// FP8 values; returns m / 448, the factor to apply in FP32 to the block's sum. sigma_v may be empty (V not
// quantised: all ones).
float quantize_probabilities_in_place(std::span<float> p, std::span<const float> sigma_v);

}  // namespace fireq::libquant
