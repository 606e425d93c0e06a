// A FireQ folder becomes a checkpoint that other programs load, one decoder layer at a time (docs/export.md).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "calib/weights.hpp"
#include "common/progress.hpp"
#include "formats/fireq_folder.hpp"

namespace fireq::calib {

enum class ExportFormat : std::uint8_t {
  hf_dequantized,     // plain weights: FP32(r * RN8(level * sigma)) of every quantised linear, in `dtype`;
                      // everything else as it is
  compressed_tensors  // pack-quantized, preset W4AFP8; everything else in BF16, as vLLM runs it
};
std::string export_format_name(ExportFormat format);  // as on the command line

struct ExportOptions {
  std::string out;
  ExportFormat format = ExportFormat::hf_dequantized;
  Dtype dtype = Dtype::bf16;  // of the plain linears: bf16, f16 or f32; compressed_tensors: bf16 only
  // compressed_tensors: also write linears whose values vLLM changes when it makes its own scales.
  bool requantize = false;
  formats::FireqWriter::Mode mode = formats::FireqWriter::Mode::fresh;
  bool force = false;
  std::uint64_t shard_size = 5'000'000'000;
  int threads = 0;
  std::string tool_version;
};

struct ExportResult {
  struct Changed {
    std::string name;
    double relative_error = 0;  // of vLLM's values against the folder's own, Frobenius
    std::uint64_t rows = 0;     // of the linear that change
  };
  std::uint64_t bytes_before = 0, bytes_after = 0;  // tensor data
  std::uint64_t linears = 0;                        // packed (compressed_tensors) or dequantised
  std::vector<std::string> plain;                   // compressed_tensors: linears written as plain BF16
  std::vector<Changed> changed;                     // compressed_tensors with requantize
  std::vector<std::string> left_out;                // what the format has no place for, as sentences
  std::uint64_t resumed_layers = 0;
  double seconds = 0;
};

// Error(usage) for what the format cannot hold: levels that are not integers, per-tensor or searched scales
// that vLLM would change (unless `requantize`), a model without one linear whose N and K are multiples of
// 128. Error(input) for a damaged folder, and for values out of the range of `dtype`.
ExportResult export_model(const WeightSource& packed, const ExportOptions& options, formats::FileSystem& fs,
                          Progress& progress);

}  // namespace fireq::calib
