// quantization_config of a FireQ folder's config.json.
#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "common/error.hpp"
#include "formats/fireq_folder.hpp"
#include "formats/folder_rules.hpp"
#include "formats/model_config_json.hpp"
#include "formats/names.hpp"

namespace fireq::formats {
namespace {

using nlohmann::json;

constexpr std::uint64_t kFormatVersion = 1;
constexpr std::uint64_t kGroupSize = 128;
constexpr float kLargestMagnitude = 448;  // of FP8 E4M3
constexpr std::uint64_t kLargestConfig = std::uint64_t{1} << 24U;
constexpr std::uint64_t kLargestNumber = std::uint64_t{1} << 53U;
constexpr std::array<float, 8> kInt4{0, 1, 2, 3, 4, 5, 6, 7};
constexpr const char* kKey = "quantization_config";

// A key of a later version may change the meaning of the others, so unknown ones are refused by name.
void refuse_unknown(const JsonFields& fields, std::initializer_list<const char*> known) {
  for (const auto& item : fields.value().items()) {
    const std::string& key = item.key();
    const bool found = std::any_of(known.begin(), known.end(), [&](const char* k) { return key == k; });
    if (!found) fields.fail(key, "is unknown", {}, "the folder was made by a newer version of this program");
  }
}

void expect_text(const JsonFields& fields, const std::string& key, const std::string& only) {
  if (fields.text(key) != only) fields.fail(key, "has an unknown value", in_quotes(only));
}

void expect_number(const JsonFields& fields, const std::string& key, std::uint64_t only) {
  if (fields.count(key, 0, kLargestNumber) != only) {
    fields.fail(key, "has an unknown value", std::to_string(only));
  }
}

void read_levels(const JsonFields& fields, QuantizationConfig& out) {
  const json* const value = fields.find("levels");
  if (value == nullptr) fields.fail("levels", "is missing");
  if (value->is_string()) {
    if (value->get_ref<const std::string&>() != "int4") {
      fields.fail("levels", "names unknown levels", "\"int4\" or 8 magnitudes");
    }
    out.levels = kInt4;
  } else {
    if (!value->is_array() || value->size() != out.levels.size()) {
      fields.fail("levels", "is malformed", "\"int4\" or 8 magnitudes");
    }
    for (std::size_t i = 0; i < out.levels.size(); ++i) {
      if (!(*value)[i].is_number()) fields.fail("levels", "is malformed", "\"int4\" or 8 magnitudes");
      // Out of float's range the conversion is undefined, so the bound comes first.
      const auto magnitude = (*value)[i].get<double>();
      if (!(magnitude >= 0 && magnitude <= static_cast<double>(kLargestMagnitude))) {
        fields.fail("levels", "holds a magnitude out of range", "0 to 448");
      }
      out.levels[i] = static_cast<float>(magnitude);
      if (i > 0 && !(out.levels[i] > out.levels[i - 1])) {
        fields.fail("levels", "holds magnitudes that do not increase", "strictly increasing magnitudes");
      }
    }
  }
  out.levels_int4 = out.levels == kInt4;
}

void read_fixed_parts(const JsonFields& fields, QuantizationConfig& out) {
  expect_number(fields, "group_size", kGroupSize);
  const JsonFields activations = fields.object("activations");
  refuse_unknown(activations, {"dtype", "granularity", "dynamic"});
  expect_text(activations, "dtype", "e4m3");
  expect_text(activations, "granularity", "token");
  if (!activations.present("dynamic") || !activations.boolean_or("dynamic", false)) {
    activations.fail("dynamic", "has an unknown value", "true");
  }
  out.kv_cache = fields.find("kv_cache") != nullptr;
  if (!out.kv_cache) return;
  const JsonFields cache = fields.object("kv_cache");
  refuse_unknown(cache, {"bits", "scale", "granularity"});
  expect_number(cache, "bits", 4);
  expect_text(cache, "scale", "e4m3");
  expect_text(cache, "granularity", "token_head");
}

std::vector<std::string> module_names(const JsonFields& fields, const char* key) {
  std::vector<std::string> names;
  for (const json& name : fields.array(key)) {
    if (!name.is_string()) fields.fail(key, "holds something else than module names");
    names.push_back(name.get<std::string>());
  }
  return names;
}

json levels_json(const QuantizationConfig& config) {
  if (config.levels == kInt4) return "int4";
  json list = json::array();
  for (const float magnitude : config.levels) list.push_back(static_cast<double>(magnitude));  // exact
  return list;
}

std::optional<std::string> config_text(const std::string& folder, bool required) {
  if (!required && !path_exists(folder + "/config.json")) return std::nullopt;
  return read_text_inside_folder(folder, "config.json", kLargestConfig);
}

MeasuredCost read_measured(const JsonFields& fields) {
  refuse_unknown(fields, {"tokens", "nll", "delta_nll", "delta_nll_stderr", "kl", "kl_stderr"});
  const auto number = [&](const char* key) {
    const json* const value = fields.find(key);
    if (value == nullptr || !value->is_number() || !std::isfinite(value->get<double>())) {
      fields.fail(key, "is no number", "a finite number");
    }
    return value->get<double>();
  };
  MeasuredCost out;
  out.tokens = fields.count("tokens", 1, kLargestNumber);
  out.nll = number("nll");
  out.delta_nll = number("delta_nll");
  out.delta_nll_stderr = number("delta_nll_stderr");
  out.kl = number("kl");
  out.kl_stderr = number("kl_stderr");
  return out;
}

}  // namespace

ModulePrecision module_precision(const QuantizationConfig& quantization, std::string_view module) {
  const auto in = [&](const std::vector<std::string>& list) {
    return std::find(list.begin(), list.end(), module) != list.end();
  };
  if (in(quantization.fp8)) return ModulePrecision::fp8;
  const bool linear = module != kEmbeddingModule && module != kHeadModule;
  return linear && !in(quantization.ignore) ? ModulePrecision::int4 : ModulePrecision::original;
}

QuantizationConfig parse_quantization_config(std::string_view config_json,
                                             const std::string& path_for_errors) {
  const json root = parse_json(config_json, path_for_errors);
  const JsonFields fields = JsonFields(root, path_for_errors).object(kKey);
  expect_text(fields, "quant_method", "fireq");
  if (fields.count("format_version", 0, kLargestNumber) != kFormatVersion) {
    fields.fail("format_version", "is unknown", std::to_string(kFormatVersion),
                "the folder was made by another version of this program");
  }
  refuse_unknown(fields, {"quant_method", "format_version", "levels", "group_size", "row_scale", "layout",
                          "kv_cache", "activations", "ignore", "fp8", "recipe", "source", "calibration",
                          "measured", "tool_version"});
  QuantizationConfig out;
  out.group_size = kGroupSize;
  read_levels(fields, out);
  read_fixed_parts(fields, out);
  const std::string row_scale = fields.text("row_scale");
  if (row_scale != "row" && row_scale != "tensor") {
    fields.fail("row_scale", "has an unknown value", R"("row" or "tensor")");
  }
  out.row_scale_per_row = row_scale == "row";
  const std::string layout = fields.text("layout");
  if (layout != "row" && layout != "sm90") fields.fail("layout", "is unknown", R"("row" or "sm90")");
  out.layout = layout == "row" ? WeightLayout::row : WeightLayout::sm90;
  out.ignore = module_names(fields, "ignore");
  if (fields.find("fp8") != nullptr) out.fp8 = module_names(fields, "fp8");
  for (const std::string& name : out.fp8) {
    if (std::find(out.ignore.begin(), out.ignore.end(), name) != out.ignore.end()) {
      fields.fail("fp8", "names a module that ignore names too", "each module once, not " + name);
    }
  }
  out.recipe_json = fields.object("recipe").value().dump();
  const JsonFields source = fields.object("source");
  refuse_unknown(source, {"fingerprint"});
  out.source_fingerprint = source.text("fingerprint");
  if (fields.find("calibration") != nullptr) {
    const JsonFields calibration = fields.object("calibration");
    refuse_unknown(calibration, {"fingerprint", "tokens", "seed"});
    out.calibration_fingerprint = calibration.text("fingerprint");
    out.calibration_tokens = calibration.count("tokens", 0, kLargestNumber);
    const json* const seed = calibration.find("seed");
    if (seed == nullptr || !seed->is_number_unsigned()) calibration.fail("seed", "is no number", "0 or more");
    out.calibration_seed = seed->get<std::uint64_t>();
  }
  if (fields.find("measured") != nullptr) out.measured = read_measured(fields.object("measured"));
  out.tool_version = fields.text("tool_version");
  return out;
}

bool is_fireq_folder(const std::string& folder) {
  const std::optional<std::string> text = config_text(folder, false);
  if (!text) return false;
  const std::string path = folder + "/config.json";
  const json root = parse_json(*text, path);
  const JsonFields fields(root, path);
  return fields.find(kKey) != nullptr && fields.object(kKey).text_or("quant_method", "") == "fireq";
}

QuantizationConfig read_quantization_config(const std::string& folder) {
  return parse_quantization_config(*config_text(folder, true), folder + "/config.json");
}

std::string make_config_json(const std::string& source_config_json, const QuantizationConfig& quantization) {
  const std::string source_name = "config.json of the source";
  json root = parse_json(source_config_json, source_name);
  const JsonFields must_be_object(root, source_name);
  json calibration = nullptr;
  if (!quantization.calibration_fingerprint.empty()) {
    calibration = {{"fingerprint", quantization.calibration_fingerprint},
                   {"tokens", quantization.calibration_tokens},
                   {"seed", quantization.calibration_seed}};
  }
  json cache = nullptr;
  if (quantization.kv_cache) cache = {{"bits", 4}, {"scale", "e4m3"}, {"granularity", "token_head"}};
  json& q = root[kKey] = json::object();
  q["quant_method"] = "fireq";
  q["format_version"] = kFormatVersion;
  q["levels"] = levels_json(quantization);
  q["group_size"] = quantization.group_size;
  q["row_scale"] = quantization.row_scale_per_row ? "row" : "tensor";
  q["layout"] = quantization.layout == WeightLayout::row ? "row" : "sm90";
  q["kv_cache"] = std::move(cache);
  q["activations"] = {{"dtype", "e4m3"}, {"granularity", "token"}, {"dynamic", true}};
  q["ignore"] = quantization.ignore;
  if (!quantization.fp8.empty()) q["fp8"] = quantization.fp8;  // what knows no FP8 reads folders without
  q["recipe"] = parse_json(quantization.recipe_json, "recipe");
  q["source"] = {{"fingerprint", quantization.source_fingerprint}};
  q["calibration"] = std::move(calibration);
  if (const std::optional<MeasuredCost>& m = quantization.measured) {
    q["measured"] = {{"tokens", m->tokens},
                     {"nll", m->nll},
                     {"delta_nll", m->delta_nll},
                     {"delta_nll_stderr", m->delta_nll_stderr},
                     {"kl", m->kl},
                     {"kl_stderr", m->kl_stderr}};
  }
  q["tool_version"] = quantization.tool_version;
  std::string text = root.dump(2) + "\n";
  parse_quantization_config(text, "config.json");  // what is written can be read
  return text;
}

}  // namespace fireq::formats
