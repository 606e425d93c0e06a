// Magnitudes learned for one linear, under the curvature of its output error (curvature.hpp).
//
// Given scales, signs and indices, the error (w - v) H (w - v)^T of a row is a quadratic in the 8 magnitudes:
// v = sum over i of level_i b_i, b_i the signed scales of the weights with index i. Rounding and the least of
// the sum of these quadratics take turns over some of the rows, as long as the error falls.
#pragma once

#include <cstdint>
#include <span>

#include "libquant/curvature_quantizer.hpp"

namespace fireq::libquant {

struct LevelTraining {
  std::uint64_t most_rows = 192;  // spread over all
  unsigned rounds = 8;
};

// Levels for w [rows, curvature.cols], largest 8 (as normal-float ones), from `start`; `start` where nothing
// is better. row_weight: empty, or [rows] what the error of each row counts for. The same for any number of
// threads. Throws as quantize_with_curvature does.
Levels train_levels(std::span<const float> w, std::uint64_t rows, const CurvatureFactor& curvature,
                    std::span<const float> row_weight, const CurvatureQuantizerOptions& options,
                    const Levels& start, const LevelTraining& training, int threads);

}  // namespace fireq::libquant
