// Checkpoints for other programs, made from a FireQ folder: their config.json, and the file that says where
// they come from.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "common/tensor.hpp"

namespace fireq::formats {

// What an export holds beside the checkpoint's own files: its format, its source, what was left out.
inline constexpr std::string_view kExportFile = "fireq-export.json";

struct ExportRecord {
  std::string format;  // "hf-dequantized", "compressed-tensors"
  Dtype dtype = Dtype::bf16;
  std::string recipe_json, source_fingerprint, tool_version;  // of the FireQ folder
  std::vector<std::string> left_out;                          // for people
};
std::string make_export_record(const ExportRecord& record);

// FOLDER holds an export of this program (and may be replaced with --force). Never throws on its content.
bool is_export_folder(const std::string& folder);

// The FireQ folder's config.json without quantization_config; torch_dtype (dtype where the source says it so)
// becomes `dtype`. Error(input) when the text is no JSON object.
std::string plain_config_json(const std::string& fireq_config_json, Dtype dtype);

// The same in BF16 with the quantization_config of compressed-tensors' preset W4AFP8
// (docs/checkpoint-format.md, "Export"). `ignore` names the modules that are not quantised beside lm_head.
std::string compressed_tensors_config_json(const std::string& fireq_config_json,
                                           const std::vector<std::string>& ignore);

}  // namespace fireq::formats
