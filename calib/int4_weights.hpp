// Matrices that other programs quantised to 4 bits, dequantised: w[n, k] = scale[n, g] * (q[n, k] - zero[n,
// g]), where g is the group of column k. q and zero are whole numbers from 0 to 15, so that the product of an
// F16 or BF16 scale is exact in FP32. docs/import.md has the tensors.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "formats/checkpoint.hpp"
#include "formats/int4_scheme.hpp"

namespace fireq::calib {

// Names of a module's tensors that are parts of it in one of the formats; none where it is stored otherwise.
std::vector<std::string> int4_parts(const formats::CheckpointReader& reader, const std::string& module);
// Type of its scales; nullopt where there are none.
std::optional<Dtype> int4_scale_dtype(const formats::CheckpointReader& reader, const std::string& module);

// One matrix with its scales, zeros and groups decoded, to read rows of.
class Int4Table {
 public:
  std::uint64_t rows() const noexcept { return rows_; }
  // FP32 rows [begin, begin + out.size() / cols) into out. Any number of threads may ask at once.
  void values(std::uint64_t begin, std::span<float> out) const;

 private:
  friend class Int4Weights;
  void compressed_tensors_rows(std::uint64_t begin, std::uint64_t end, std::span<float> out) const;
  void gptq_rows(std::uint64_t begin, std::uint64_t end, std::span<float> out) const;
  void awq_rows(std::uint64_t begin, std::uint64_t end, std::span<float> out) const;
  std::uint32_t word(std::uint64_t index) const noexcept;
  float weight(std::uint64_t row, std::uint64_t col, std::uint32_t code) const noexcept;

  formats::Int4Format format_ = formats::Int4Format::gptq;
  std::uint64_t rows_ = 0, cols_ = 0, groups_ = 0;
  std::vector<std::uint64_t> group_;  // [cols]
  std::vector<float> zero_;           // [groups, rows]
  std::vector<float> scale_;          // [rows, groups] in compressed-tensors, else [groups, rows]
  TensorView codes_;
};

class Int4Weights {
 public:
  Int4Weights(const formats::CheckpointReader& reader, const formats::Int4Scheme& scheme)
      : reader_(reader), scheme_(scheme) {}

  const formats::Int4Scheme& scheme() const noexcept { return scheme_; }
  // The module ("model.layers.0.mlp.up_proj") is stored quantised.
  bool holds(const std::string& module) const;
  // Presence, dtype and shape of its tensors; Error(input) naming the first that is wrong.
  void check(const std::string& module, std::uint64_t rows, std::uint64_t cols) const;
  // After check(). Error(input) for a scale that is not finite and a group that is not there.
  Int4Table table(const std::string& module, std::uint64_t rows, std::uint64_t cols) const;
  // All of it, FP32 [rows, cols].
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
