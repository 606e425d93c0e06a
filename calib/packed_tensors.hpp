// A quantised linear as the tensors of a FireQ folder, and back (docs/checkpoint-format.md).
#pragma once

#include <string>
#include <vector>

#include "formats/fireq_folder.hpp"
#include "formats/safetensors.hpp"
#include "libquant/fp8_linear.hpp"
#include "libquant/quantized_linear.hpp"

namespace fireq::calib {

template <typename T>
std::vector<std::byte> to_bytes(const std::vector<T>& values) {
  const auto bytes = std::as_bytes(std::span(values));
  return {bytes.begin(), bytes.end()};
}

formats::FireqWriter::Tensor owned_tensor(std::string name, Dtype dtype, std::vector<std::uint64_t> shape,
                                          std::vector<std::byte> bytes);

// `name` is the module's, such as "model.layers.0.mlp.up_proj". own_levels: its magnitudes are stored with
// it.
std::vector<formats::FireqWriter::Tensor> packed_tensors(const std::string& name,
                                                         const libquant::QuantizedLinear& q,
                                                         formats::WeightLayout layout, bool own_levels);
// A matrix in FP8, the same: NAME.weight and NAME.weight_scale.
std::vector<formats::FireqWriter::Tensor> fp8_tensors(const std::string& name, const libquant::Fp8Linear& q);

// Fills `out` (allocated: shape, the folder's levels, number of second-level scales) from a file that holds
// those tensors. Error(input) when one is missing, has another size or breaks a rule.
void read_packed(const formats::SafetensorsFile& file, const std::string& name, formats::WeightLayout layout,
                 libquant::QuantizedLinear& out);
// The same for FP8; `out` has its shape.
void read_fp8(const formats::SafetensorsFile& file, const std::string& name, libquant::Fp8Linear& out);

}  // namespace fireq::calib
