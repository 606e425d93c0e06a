#include "formats/export_folder.hpp"

#include <nlohmann/json.hpp>

#include "common/error.hpp"
#include "formats/folder_rules.hpp"
#include "formats/model_config_json.hpp"

namespace fireq::formats {
namespace {

using nlohmann::json;

constexpr const char* kRecordKey = "fireq_export";
constexpr std::uint64_t kRecordVersion = 1;
constexpr std::uint64_t kLargestRecord = std::uint64_t{1} << 24U;

std::string torch_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16:
      return "bfloat16";
    case Dtype::f16:
      return "float16";
    case Dtype::f32:
      return "float32";
    default:
      throw Error(ErrorKind::internal, "not a type of plain weights").found(std::string(dtype_name(dtype)));
  }
}

json plain_config(const std::string& text, Dtype dtype) {
  const std::string name = "config.json";
  json root = parse_json(text, name);
  const JsonFields must_be_object(root, name);
  root.erase("quantization_config");
  // transformers 4 writes torch_dtype, 5 writes dtype and reads both.
  root[root.contains("dtype") && !root.contains("torch_dtype") ? "dtype" : "torch_dtype"] = torch_name(dtype);
  if (root.contains("dtype")) root["dtype"] = torch_name(dtype);
  return root;
}

}  // namespace

std::string make_export_record(const ExportRecord& record) {
  const json root = {{kRecordKey, kRecordVersion},
                     {"format", record.format},
                     {"dtype", torch_name(record.dtype)},
                     {"recipe", parse_json(record.recipe_json, "recipe")},
                     {"source", {{"fingerprint", record.source_fingerprint}}},
                     {"left_out", record.left_out},
                     {"tool_version", record.tool_version}};
  return root.dump(2) + "\n";
}

bool is_export_folder(const std::string& folder) {
  const std::string name(kExportFile);
  if (!path_exists(folder + "/" + name)) return false;
  try {
    const json root = parse_json(read_text_inside_folder(folder, name, kLargestRecord), name);
    return root.is_object() && root.contains(kRecordKey);
  } catch (const Error&) {
    return false;
  }
}

std::string plain_config_json(const std::string& fireq_config_json, Dtype dtype) {
  return plain_config(fireq_config_json, dtype).dump(2) + "\n";
}

std::string compressed_tensors_config_json(const std::string& fireq_config_json,
                                           const std::vector<std::string>& ignore) {
  const char* const format = "pack-quantized";
  json root = plain_config(fireq_config_json, Dtype::bf16);
  json not_quantised = json::array({"lm_head"});
  for (const std::string& name : ignore) not_quantised.push_back(name);
  const json weights = {{"num_bits", 4},     {"type", "int"},    {"symmetric", true},  {"strategy", "group"},
                        {"group_size", 128}, {"dynamic", false}, {"actorder", nullptr}};
  const json inputs = {
      {"num_bits", 8}, {"type", "float"}, {"symmetric", true}, {"strategy", "token"}, {"dynamic", true}};
  root["quantization_config"] = {{"quant_method", "compressed-tensors"},
                                 {"format", format},
                                 {"quantization_status", "compressed"},
                                 {"global_compression_ratio", nullptr},
                                 {"kv_cache_scheme", nullptr},
                                 {"ignore", std::move(not_quantised)},
                                 {"config_groups",
                                  {{"group_0",
                                    {{"targets", json::array({"Linear"})},
                                     {"format", format},
                                     {"weights", weights},
                                     {"input_activations", inputs},
                                     {"output_activations", nullptr}}}}}};
  return root.dump(2) + "\n";
}

}  // namespace fireq::formats
