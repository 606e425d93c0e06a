// Checkpoints that other programs quantised to 4 bits: which format config.json says, and its parameters
// (docs/import.md has the tensors, and where each fact comes from).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace fireq::formats {

enum class Int4Format : std::uint8_t {
  compressed_tensors,  // pack-quantized
  gptq,
  awq  // GEMM packing
};

struct Int4Scheme {
  Int4Format format = Int4Format::gptq;
  std::uint64_t group_size = 0;  // along K; 0: one group a row ("channel", -1)
  bool zero_points = true;       // stored; else the zero is 8
  bool zero_plus_one = false;    // GPTQ's first convention: packed zeros are stored less one in each nibble
  bool symmetric = false;        // GPTQ, AWQ: the zero is 8, whichever convention stored ones follow
  bool any_order = false;        // columns belong to groups by an index that must be there (desc_act)
  bool operator==(const Int4Scheme&) const = default;
};

std::string_view int4_method(Int4Format format) noexcept;  // as quant_method says it

// nullopt for a folder that says nothing of quantisation. Error(input) naming the key for methods, numbers of
// bits, packings and options that are not read. Not for FireQ folders.
std::optional<Int4Scheme> read_int4_scheme(const std::string& folder);
std::optional<Int4Scheme> parse_int4_scheme(std::string_view config_json, const std::string& path_for_errors);

}  // namespace fireq::formats
