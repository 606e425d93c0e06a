#include "formats/int4_scheme.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "common/error.hpp"
#include "formats/folder_rules.hpp"
#include "formats/model_config_json.hpp"
#include "formats/names.hpp"

namespace fireq::formats {
namespace {

using nlohmann::json;

constexpr std::uint64_t kLargestConfig = std::uint64_t{1} << 24U;
constexpr std::uint64_t kLargestGroup = std::uint64_t{1} << 24U;
constexpr const char* kKey = "quantization_config";

// -1 and an absent key mean one group a row.
std::uint64_t group_size(const JsonFields& fields) {
  const json* value = fields.find("group_size");
  if (value == nullptr || (value->is_number_integer() && *value == -1)) return 0;
  return fields.count("group_size", 1, kLargestGroup);
}

void require_four_bits(const JsonFields& fields, const std::string& key) {
  const json* bits = fields.find(key);
  if (bits == nullptr) fields.fail(key, "is missing", "4");
  if (!bits->is_number_integer() || *bits != 4)
    fields.fail(key, "is not read: " + json_excerpt(*bits) + " bits", "4");
}

std::string lower_text(const JsonFields& fields, const std::string& key, const std::string& otherwise) {
  return ascii_lower(fields.text_or(key, otherwise));
}

Int4Scheme parse_gptq(const JsonFields& fields) {
  require_four_bits(fields, "bits");
  Int4Scheme out;
  out.format = Int4Format::gptq;
  out.group_size = group_size(fields);
  out.any_order = fields.boolean_or("desc_act", false);
  out.symmetric = fields.boolean_or("sym", false);
  // Newer tools write both keys, alike; some only the second.
  const char* const key = fields.find("checkpoint_format") != nullptr ? "checkpoint_format" : "format";
  const std::string format = lower_text(fields, key, "gptq");
  if (format != "gptq" && format != "gptq_v2") fields.fail(key, "is not read", R"("gptq" or "gptq_v2")");
  if (fields.boolean_or("is_marlin_format", false)) fields.fail("is_marlin_format", "is not read", "false");
  if (lower_text(fields, "pack_dtype", "int32") != "int32")
    fields.fail("pack_dtype", "is not read", R"("int32")");
  out.zero_plus_one = format == "gptq";
  return out;
}

Int4Scheme parse_awq(const JsonFields& fields) {
  require_four_bits(fields,
                    fields.find("bits") == nullptr && fields.find("w_bit") != nullptr ? "w_bit" : "bits");
  Int4Scheme out;
  out.format = Int4Format::awq;
  const json* own = fields.find("q_group_size");
  if (fields.find("group_size") == nullptr && own != nullptr) {
    out.group_size = *own == -1 ? 0 : fields.count("q_group_size", 1, kLargestGroup);
  } else {
    out.group_size = group_size(fields);
  }
  for (const char* const key : {"version", "checkpoint_format", "format"}) {
    if (lower_text(fields, key, "gemm") != "gemm") fields.fail(key, "is not read", R"("gemm")");
  }
  out.zero_points = fields.boolean_or("zero_point", true);
  out.symmetric = !out.zero_points;
  return out;
}

// The weights' arguments of one config group.
Int4Scheme parse_group(const JsonFields& group) {
  const JsonFields weights = group.object("weights");
  require_four_bits(weights, "num_bits");
  if (weights.text_or("type", "int") != "int") weights.fail("type", "is not read", R"("int")");
  Int4Scheme out;
  out.format = Int4Format::compressed_tensors;
  out.zero_points = !weights.boolean_or("symmetric", true);
  const std::string strategy =
      weights.text_or("strategy", weights.find("group_size") == nullptr ? "channel" : "group");
  if (strategy != "group" && strategy != "channel")
    weights.fail("strategy", "is not read", R"("group" or "channel")");
  if (strategy == "group") out.group_size = weights.count("group_size", 1, kLargestGroup);
  // "weight" and "static" leave columns where they were; "group" (and true, an old spelling) needs an index.
  if (const json* order = weights.find("actorder"); order != nullptr)
    out.any_order =
        *order == true || (order->is_string() && ascii_lower(order->get<std::string>()) == "group");
  return out;
}

Int4Scheme parse_compressed(const JsonFields& fields) {
  const auto refuse_format = [](const JsonFields& where) {
    const std::string format = where.text_or("format", "pack-quantized");
    if (format != "pack-quantized" && format != "mixed-precision")
      where.fail("format", "is not read", R"("pack-quantized")");
  };
  refuse_format(fields);
  for (const char* key : {"transform_config", "sparsity_config"}) {
    const json* value = fields.find(key);
    if (value == nullptr || (value->is_object() && value->empty())) continue;
    if (fields.object(key).text_or("format", "") != "dense") fields.fail(key, "is not read", "none");
  }
  const JsonFields groups = fields.object("config_groups");
  std::optional<Int4Scheme> out;
  for (const auto& item : groups.value().items()) {
    const JsonFields group = groups.object(item.key());
    refuse_format(group);
    const Int4Scheme scheme = parse_group(group);
    if (out && *out != scheme)
      groups.fail(item.key(), "quantises otherwise than the groups before it", "one scheme for all linears");
    out = scheme;
  }
  if (!out) fields.fail("config_groups", "is empty", "a group with weights");
  return *out;
}

Int4Scheme parse_method(const JsonFields& fields, const std::string& method) {
  if (method == "gptq") return parse_gptq(fields);
  if (method == "awq") return parse_awq(fields);
  if (method == "compressed-tensors") return parse_compressed(fields);
  fields.fail("quant_method", "is not read",
              R"("compressed-tensors", "gptq" or "awq" with 4 bits, "fireq", or no quantization_config)",
              "start from the original model, or from a dequantised copy");
}

}  // namespace

std::string_view int4_method(Int4Format format) noexcept {
  switch (format) {
    case Int4Format::compressed_tensors:
      return "compressed-tensors";
    case Int4Format::gptq:
      return "gptq";
    case Int4Format::awq:
      break;
  }
  return "awq";
}

std::optional<Int4Scheme> parse_int4_scheme(std::string_view config_json,
                                            const std::string& path_for_errors) {
  const json root = parse_json(config_json, path_for_errors);
  const JsonFields fields(root, path_for_errors);
  if (fields.find(kKey) == nullptr) return std::nullopt;
  const JsonFields quantization = fields.object(kKey);
  return parse_method(quantization, quantization.text("quant_method"));
}

std::optional<Int4Scheme> read_int4_scheme(const std::string& folder) {
  const std::string path = folder + "/config.json";
  if (const auto scheme =
          parse_int4_scheme(read_text_inside_folder(folder, "config.json", kLargestConfig), path))
    return scheme;
  // Older tools say it in a file of its own.
  for (const auto& [name, method] :
       {std::pair{"quantize_config.json", "gptq"}, std::pair{"quant_config.json", "awq"}}) {
    const std::string own = folder + "/" + name;
    if (!path_exists(own)) continue;
    const json root = parse_json(read_text_inside_folder(folder, name, kLargestConfig), own);
    const JsonFields fields(root, own);
    return parse_method(fields, fields.text_or("quant_method", method));
  }
  return std::nullopt;
}

}  // namespace fireq::formats
