// Matrices that other programs quantised to 4 bits, dequantised: w[n, k] = scale[n, g] * (q[n, k] - zero[n,
// g]), where g is the group of column k. q and zero are whole numbers from 0 to 15, so that the product of an
// F16 or BF16 scale is exact in FP32. docs/import.md has the tensors.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "formats/checkpoint.hpp"
#include "formats/int4_scheme.hpp"

namespace fireq::calib {

// Names of a module's tensors that are parts of it in one of the formats; none where it is stored otherwise.
std::vector<std::string> int4_parts(const formats::CheckpointReader& reader, const std::string& module);
// Type of its scales; nullopt where there are none.
std::optional<Dtype> int4_scale_dtype(const formats::CheckpointReader& reader, const std::string& module);

class Int4Weights {
 public:
  Int4Weights(const formats::CheckpointReader& reader, const formats::Int4Scheme& scheme)
      : reader_(reader), scheme_(scheme) {}

  const formats::Int4Scheme& scheme() const noexcept { return scheme_; }
  // The module ("model.layers.0.mlp.up_proj") is stored quantised.
  bool holds(const std::string& module) const;
  // Presence, dtype and shape of its tensors; Error(input) naming the first that is wrong.
  void check(const std::string& module, std::uint64_t rows, std::uint64_t cols) const;
  // FP32 [rows, cols], after check(). Error(input) for a scale that is not finite and a group that is not
  // there.
  std::vector<float> load(const std::string& module, std::uint64_t rows, std::uint64_t cols,
                          int threads) const;
  void release(const std::string& module) const;

 private:
  struct Names {
    std::string codes, scales, zeros, groups;
  };
  Names names(const std::string& module) const;
  std::uint64_t groups_of(std::uint64_t cols) const;
  std::vector<std::uint32_t> words(const std::string& name) const;
  std::vector<std::uint64_t> group_of_column(const std::string& name, std::uint64_t cols) const;
  void require_middle(const std::string& name, const std::vector<std::uint32_t>& packed) const;
  std::vector<float> offsets(const std::string& name, std::uint64_t rows, std::uint64_t groups) const;

  const formats::CheckpointReader& reader_;
  formats::Int4Scheme scheme_;
};

}  // namespace fireq::calib
