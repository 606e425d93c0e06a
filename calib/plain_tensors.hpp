// Weights as plain tensors in F32, F16 or BF16, and FP8 matrices of a FireQ folder as values.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "formats/checkpoint.hpp"
#include "formats/fireq_folder.hpp"

namespace fireq::calib {

// values(begin, out) gives elements [begin, begin + out.size()) of a [rows, cols] tensor, whole rows at a
// time; called from several threads. Error(input) naming tensor and value when one is out of dtype's range;
// `path` is added to errors without one.
formats::FireqWriter::Tensor plain_tensor(const std::string& name, Dtype dtype,
                                          std::vector<std::uint64_t> shape,
                                          const std::function<void(std::uint64_t, std::span<float>)>& values,
                                          const std::string& path, int threads);

// NAME.weight and NAME.weight_scale of a FireQ folder, whose shapes are checked already.
class Fp8Table {
 public:
  // reader outlives this.
  Fp8Table(const formats::CheckpointReader& reader, std::string module);
  std::uint64_t rows() const noexcept { return weight_.shape[0]; }
  std::uint64_t cols() const noexcept { return weight_.shape[1]; }
  float row_scale(std::uint64_t row) const;
  // Operands of `count` rows [count, cols]. Error(input) for what check_fp8_linear refuses.
  void operands(std::uint64_t row, std::uint64_t count, std::span<float> out) const;
  // FP32(r * w8) from element `begin` on, whole rows.
  void values(std::uint64_t begin, std::span<float> out) const;

 private:
  std::string module_, file_;
  TensorView weight_, scale_;
};

}  // namespace fireq::calib
