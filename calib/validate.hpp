// Checks a FireQ folder: every rule of the format, each linear's decode and error against the folded
// original, and its product against a double-precision reference of the definition.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "calib/weights.hpp"
#include "common/progress.hpp"

namespace fireq::calib {

struct ValidateOptions {
  const WeightSource* folded_reference = nullptr;  // fold_like(): same shapes, FP32
  std::uint64_t product_tokens = 4;                // random FP8 tokens per linear
  std::uint64_t seed = 0;
  int threads = 0;
};

struct WorstGroup {
  std::uint64_t row = 0, group = 0;
  double relative_error = 0;
};

struct LinearCheck {
  std::string name;
  std::uint64_t rows = 0, cols = 0;
  formats::ModulePrecision precision = formats::ModulePrecision::int4;
  std::optional<double> relative_error, snr_db;  // Frobenius, against the reference's folded weights
  std::optional<WorstGroup> worst_group;         // of 128 columns, whatever the precision
  double product_relative_error = 0;             // FP32 path against FP64 on random activations
  double subnormal_scales = 0;                   // share of group scales under 2^-6; 4 bits only
};

// `packed` is an opened FireQ folder (open_weights already checked names, dtypes and shapes). Throws
// Error(input) for the first content rule that is broken, naming the tensor.
std::vector<LinearCheck> validate_linears(const WeightSource& packed, const ValidateOptions& options,
                                          Progress& progress);

}  // namespace fireq::calib
