// What differs between two folders of one model, original or FireQ each: weights as they act, one decoder
// layer of each in memory at a time (docs/diff.md).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "calib/weights.hpp"
#include "common/progress.hpp"

namespace fireq::calib {

// Everywhere: relative = |B - A| / |A| in the Frobenius norm, of values in FP32, sums in FP64. Where A is
// zero and B is not, 1.
struct LinearDifference {
  std::string name;
  std::uint64_t rows = 0, cols = 0;
  double relative = 0;  // of the weights as stored, dequantised: r * RN8(level * sigma) for packed ones
  bool equal = false;   // bit for bit
};

// A product of weights that smoothing cancels in, so that folders with different folds compare:
//   "q k"      q^T k of each pair of channels that RoPE turns, N cancels; times the norms before and after
//   "v o"      o v of each head: Lambda_1, powers of two and rotations cancel
//   "gate"     gate times the MLP's norm: Lambda_2 cancels
//   "up down"  down's column times up's row, of each channel, times the norm: Lambda_2 and Lambda_3 cancel
struct ProductDifference {
  std::uint64_t layer = 0;
  std::string name;
  double relative = 0;
};

// A tensor that is no matrix of a decoder layer's seven linears.
struct TensorDifference {
  std::string name;
  std::string a, b;                // "BF16 [512, 64]"; empty where the folder lacks it
  std::optional<double> relative;  // of floating-point tensors of one shape
};

struct FolderDifference {
  std::vector<LinearDifference> linears;    // worst first; then in the model's order
  std::vector<ProductDifference> products;  // likewise
  std::vector<TensorDifference> tensors;    // those that differ, in the order of their names
  bool same_folds = false;  // both have the same folds: the linears' figures mean what they say
};

// Error(input) when the two are not of one shape.
FolderDifference compare_folders(const WeightSource& a, const WeightSource& b, int threads,
                                 Progress& progress);

// Bytes of tensors by what they are for.
struct SizeByKind {
  std::uint64_t embedding = 0, head = 0, linears = 0, norms = 0, other = 0;
};
SizeByKind size_by_kind(const WeightSource& source);

}  // namespace fireq::calib
