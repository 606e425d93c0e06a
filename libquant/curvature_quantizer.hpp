// The weight quantiser that rounds a row's weights together, under the curvature of its output error
// (curvature.hpp): least (w - v) H (w - v)^T over what the format can hold, v = r * (+-RN8(level * sigma)).
//
// 1. Greedy, column by column: with H = U U^T the error is the sum over columns j of ((w - v) U)_j^2, and
// term
//    j knows only columns up to j. So each weight is rounded to the operand nearest to what would cancel its
//    term. (The same numbers as GPTQ's, which carries errors forward through a factor of H^-1; looking back
//    through H's own factor needs no inverse.) At the start of a group of 128 its scale is searched, with the
//    squared errors weighted by U_jj^2; the three best are then tried in full.
// 2. Passes of coordinate descent on the exact quadratic: for each group the scale and with it the codes,
// then
//    the row scale by least squares. Each step keeps the error or lowers it.
#pragma once

#include <cstdint>
#include <span>

#include "libquant/curvature.hpp"
#include "libquant/quantized_linear.hpp"

namespace fireq::libquant {

struct CurvatureQuantizerOptions {
  RowScale row_scale = RowScale::row;  // tensor: out.row_scales[0] must be set, and stays
  int search_low = -7;                 // E4M3 codes around RN8(max / top level), as WeightQuantizerOptions
  int search_high = 2;
  unsigned passes = 3;  // of coordinate descent
  int scale_step = 2;   // codes that a group scale may move in one pass
  // The row scale stays between these multiples of the one it began with. It moves in steps of bf16(56 r).
  float row_low = 0.8F;
  float row_high = 1.25F;
  // As WeightQuantizerOptions, for RowScale::row: one group of a row keeps the scale 56, and r, at least
  // 1 / 28672, moves instead. A row that begins at the least r keeps it.
  bool pin_top_scale = false;
};

// Sums over rows of w H w^T and of (w - v) H (w - v)^T, H with its damping.
struct CurvatureError {
  double reference = 0;
  double greedy = 0;  // after step 1
  double final = 0;   // after step 2
};

// Quantises all rows of w [out.rows, K] into `out` (allocated; its levels are used). Products never exceed
// the format's limits (sigma <= 56 with row scales). The same bytes for any thread count. Throws as
// quantize_rows does for a non-finite weight.
//
// outputs: null, or the curvature G [N, N] of whatever the outputs y = W x serve (a mean of g g^T, g its
// gradient for y), factored as the inputs' is. The error is then the trace of G (w - v) H (w - v)^T and rows
// are rounded together too: row after row makes up for the rows before it, in the way that columns do, and
// the passes use the whole of it. Needs 20 N K bytes and 16 KB a row.
CurvatureError quantize_with_curvature(std::span<const float> w, const CurvatureFactor& curvature,
                                       const CurvatureQuantizerOptions& options, int threads,
                                       QuantizedLinear& out, const CurvatureFactor* outputs = nullptr);

}  // namespace fireq::libquant
