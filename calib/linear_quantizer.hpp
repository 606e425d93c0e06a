// One matrix at a time, from original weights to 4 bits or FP8. Rows are independent, so that any split over
// threads gives the same bytes.
#pragma once

#include <cstdint>
#include <span>

#include "calib/modules.hpp"
#include "calib/weights.hpp"
#include "libquant/fp8_linear.hpp"
#include "libquant/quantized_linear.hpp"

namespace fireq::calib {

// What a linear's inputs are like, each [cols] or empty.
struct InputMoments {
  std::span<const float> mean, mean_square;
};

// To 4 bits, from FP32 rows. Moments weigh the search's error and say which means to keep where the choice
// asks. saturated_groups is set with per-tensor scales (see TensorScaleSearch).
libquant::QuantizedLinear quantize_folded(const LinearWeights& w, const ModuleChoice& choice,
                                          const InputMoments& inputs, int threads,
                                          std::uint64_t& saturated_groups);
// The same straight from the checkpoint's bytes, when nothing is folded into them.
libquant::QuantizedLinear quantize_raw(const TensorView& view, const ModuleChoice& choice,
                                       const InputMoments& inputs, int threads,
                                       std::uint64_t& saturated_groups);

// To FP8 with a scale per row.
libquant::Fp8Linear quantize_fp8(std::span<const float> weight, std::uint64_t rows, std::uint64_t cols,
                                 int threads);
libquant::Fp8Linear quantize_fp8(const TensorView& view, int threads);

}  // namespace fireq::calib
