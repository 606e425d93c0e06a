// A weight matrix in FP8: E4M3 values with one scale per row, W[n, k] = r[n] * w8[n, k]. What is kept at more
// than 4 bits is stored so (docs/numerics.md, "Weights in FP8").
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fireq::libquant {

struct Fp8Linear {
  std::uint64_t rows = 0, cols = 0;
  std::vector<std::uint8_t> codes;  // [rows, cols], E4M3 bytes without NaN
  std::vector<float> row_scales;    // r [rows], finite, above 0
};

// Same shape with both vectors allocated (codes 0, r 1).
Fp8Linear make_fp8_linear(std::uint64_t rows, std::uint64_t cols);

// r[n] = max(max_k |w|, 2^-100) / 448, w8 = RN8(w / r), both by IEEE division in FP32. `w` is [count, cols],
// rows row_begin, row_begin + 1, ... of the whole. Rows are independent of each other. Error(input) with
// found "NaN at [r, c]" or "infinity at [r, c]".
void quantize_fp8_rows(std::span<const float> w, std::uint64_t row_begin, std::uint64_t count,
                       Fp8Linear& out);

// Error(input): sizes, NaN codes, scales that are not finite and above 0. first_row: what messages call row
// 0.
void check_fp8_linear(const Fp8Linear& q, std::uint64_t first_row = 0);

}  // namespace fireq::libquant
