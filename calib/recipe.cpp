#include "calib/recipe.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <string_view>
#include <vector>

#include "common/error.hpp"
#include "common/nearest.hpp"
#include "formats/model_config_json.hpp"

namespace fireq::calib {
namespace {

using formats::ModulePrecision;
using libquant::Levels;
using libquant::Rounding;
using libquant::RowScale;
using nlohmann::json;

// A value of a recipe that has the wrong type or lies outside its range; parse_recipe adds path and key.
[[noreturn]] void refuse(std::string expected, const json& found) {
  throw Error(ErrorKind::usage, "value is not allowed")
      .expected(std::move(expected))
      .found(formats::json_excerpt(found));
}

double number_in(const json& v, double low, double high) {
  if (!v.is_number()) refuse("a number", v);
  const double x = v.get<double>();
  if (!(x >= low && x <= high)) refuse("a number from " + json(low).dump() + " to " + json(high).dump(), v);
  return x;
}

bool boolean(const json& v) {
  if (!v.is_boolean()) refuse("true or false", v);
  return v.get<bool>();
}

template <typename T, std::size_t N>
using Choices = std::array<std::pair<std::string_view, T>, N>;

template <typename T, std::size_t N>
T choose(const Choices<T, N>& choices, const json& v) {
  std::string expected;
  for (const auto& [name, value] : choices) {
    if (v.is_string() && v.get_ref<const std::string&>() == name) return value;
    expected += (expected.empty() ? "\"" : ", \"") + std::string(name) + "\"";
  }
  refuse("one of " + expected, v);
}

template <typename T, std::size_t N>
std::string_view name_of(const Choices<T, N>& choices, T value) {
  for (const auto& [name, candidate] : choices) {
    if (candidate == value) return name;
  }
  throw Error(ErrorKind::internal, "recipe holds a value without a name");
}

constexpr Choices<RowScale, 2> kRowScales{{{"row", RowScale::row}, {"tensor", RowScale::tensor}}};
constexpr Choices<Rounding, 2> kRoundings{{{"value", Rounding::value}, {"product", Rounding::product}}};
constexpr Choices<ValueScaling, 3> kValueScalings{
    {{"off", ValueScaling::off}, {"channel", ValueScaling::channel}, {"scalar", ValueScaling::scalar}}};
constexpr Choices<ModulePrecision, 3> kPrecisions{{{"int4", ModulePrecision::int4},
                                                   {"fp8", ModulePrecision::fp8},
                                                   {"original", ModulePrecision::original}}};
constexpr Choices<ModulePrecision, 2> kTablePrecisions{
    {{"original", ModulePrecision::original}, {"fp8", ModulePrecision::fp8}}};
constexpr Choices<Target, 2> kTargets{{{"fireq", Target::fireq}, {"vllm", Target::vllm}}};
constexpr const char* kTargetKey = "for";
constexpr const char* kWeights = "weights";

constexpr Choices<KeyFactors, 2> kKeyFactors{
    {{"maxima", KeyFactors::maxima}, {"moments", KeyFactors::moments}}};

constexpr const char* kTrained = "trained";

Levels levels_from(const json& v) {
  if (v.is_string()) {
    if (v == "int4") return Levels::int4();
    if (v == "normal") return Levels::normal();
  }
  if (!v.is_array() || v.size() != 8) refuse(R"("int4", "normal", "trained" or 8 increasing magnitudes)", v);
  Levels levels;
  for (std::size_t i = 0; i < 8; ++i) levels.magnitude[i] = static_cast<float>(number_in(v[i], 0, 448));
  libquant::check_levels(levels);
  return levels;
}

json levels_to(const Levels& levels) {
  const std::string name = levels.name();
  if (name != "custom") return name;
  json list = json::array();
  for (const float m : levels.magnitude) list.push_back(static_cast<double>(m));
  return list;
}

struct Field {
  std::string_view section, key;  // section "" is the top level
  std::function<void(Recipe&, const json&)> set;
  std::function<json(const Recipe&)> get;
  json schema;
};

json number_schema(double low, double high) {
  return {{"type", "number"}, {"minimum", low}, {"maximum", high}};
}

json whole_schema(double low, double high) {
  return {{"type", "integer"}, {"minimum", low}, {"maximum", high}};
}

// Whole, as JSON Schema has it: 4.0 is, too.
bool is_whole(const json& v) {
  return v.is_number() && std::floor(v.get<double>()) == v.get<double>();
}

template <typename T, std::size_t N>
Field choice(std::string_view section, std::string_view key, const Choices<T, N>& choices,
             T Recipe::*member) {
  json names = json::array();
  for (const auto& [name, value] : choices) names.push_back(name);
  return {section,
          key,
          [&choices, member](Recipe& r, const json& v) { r.*member = choose(choices, v); },
          [&choices, member](const Recipe& r) { return json(name_of(choices, r.*member)); },
          {{"enum", names}}};
}

Field flag(std::string_view section, std::string_view key, bool Recipe::*member) {
  return {section,
          key,
          [member](Recipe& r, const json& v) { r.*member = boolean(v); },
          [member](const Recipe& r) { return json(r.*member); },
          {{"type", "boolean"}}};
}

Field number(std::string_view section, std::string_view key, double Recipe::*member, double low,
             double high) {
  return {section, key, [=](Recipe& r, const json& v) { r.*member = number_in(v, low, high); },
          [member](const Recipe& r) { return json(r.*member); }, number_schema(low, high)};
}

Field count(std::string_view section, std::string_view key, std::uint64_t Recipe::*member, double high,
            const char* expected) {
  return {section, key,
          [=](Recipe& r, const json& v) {
            if (!is_whole(v)) refuse(expected, v);
            r.*member = static_cast<std::uint64_t>(number_in(v, 0, high));
          },
          [member](const Recipe& r) { return json(r.*member); }, whole_schema(0, high)};
}

template <typename T, std::size_t N>
Field weight_choice(std::string_view key, const Choices<T, N>& choices,
                    T libquant::WeightQuantizerOptions::*member) {
  json names = json::array();
  for (const auto& [name, value] : choices) names.push_back(name);
  return {kWeights,
          key,
          [&choices, member](Recipe& r, const json& v) { r.weights.*member = choose(choices, v); },
          [&choices, member](const Recipe& r) { return json(name_of(choices, r.weights.*member)); },
          {{"enum", names}}};
}

std::vector<Field> weight_fields() {
  const json magnitudes = {
      {"type", "array"}, {"items", number_schema(0, 448)}, {"minItems", 8}, {"maxItems", 8}};
  const json search = {{"type", "array"},
                       {"prefixItems", {whole_schema(-32, 0), whole_schema(0, 32)}},
                       {"minItems", 2},
                       {"maxItems", 2}};
  return {
      {kWeights,
       "levels",
       [](Recipe& r, const json& v) {
         r.train_levels = v == kTrained;
         r.weights.levels = r.train_levels ? Levels::normal() : levels_from(v);
       },
       [](const Recipe& r) { return r.train_levels ? json(kTrained) : levels_to(r.weights.levels); },
       {{"anyOf", {{{"enum", {"int4", "normal", kTrained}}}, magnitudes}}}},
      weight_choice("row_scale", kRowScales, &libquant::WeightQuantizerOptions::row_scale),
      weight_choice("rounding", kRoundings, &libquant::WeightQuantizerOptions::rounding),
      {kWeights, "search",
       [](Recipe& r, const json& v) {
         if (!v.is_array() || v.size() != 2 || !is_whole(v[0]) || !is_whole(v[1])) {
           refuse("[low, high] whole numbers of scale codes, for example [-7, 2]", v);
         }
         r.weights.search_low = static_cast<int>(number_in(v[0], -32, 0));
         r.weights.search_high = static_cast<int>(number_in(v[1], 0, 32));
       },
       [](const Recipe& r) {
         return json{r.weights.search_low, r.weights.search_high};
       },
       search},
      flag(kWeights, "weighted_search", &Recipe::weighted_search),
      flag(kWeights, "keep_means", &Recipe::keep_means),
      {kWeights, "tensor_search_threshold",
       [](Recipe& r, const json& v) {
         r.weights.tensor_search_threshold = static_cast<float>(number_in(v, 0x1p-20, 448));
       },
       [](const Recipe& r) { return json(static_cast<double>(r.weights.tensor_search_threshold)); },
       number_schema(0x1p-20, 448)},
  };
}

// Modules.

constexpr std::string_view kOverrideKeys[] = {"match", "precision", "weights"};

const std::string& pattern_text(const json& v) {
  if (!v.is_string() || v.get_ref<const std::string&>().empty()) refuse("a pattern, as text", v);
  return v.get_ref<const std::string&>();
}

void set_ignore(Recipe& r, const json& v) {
  if (!v.is_array()) refuse("a list of patterns", v);
  r.ignore.clear();
  for (const json& pattern : v) r.ignore.push_back(pattern_text(pattern));
}

void apply(Recipe& recipe, std::string_view section, const json& object);

// What an override says of weights, checked as a recipe's own keys are.
void check_weight_keys(const Recipe& recipe, const json& keys) {
  if (!keys.is_object()) refuse(R"(an object with keys of "weights")", keys);
  if (keys.contains("row_scale")) {
    throw Error(ErrorKind::usage, "value is not allowed")
        .expected(R"(any key of "weights" but row_scale, which is one for the folder)")
        .found("row_scale");
  }
  Recipe scratch = recipe;
  apply(scratch, kWeights, keys);
}

void set_overrides(Recipe& r, const json& v) {
  if (!v.is_array()) refuse(R"(a list of objects {"match", "precision", "weights"})", v);
  r.overrides.clear();
  r.override_needs_statistics = false;
  for (const json& item : v) {
    if (!item.is_object() || !item.contains("match")) refuse(R"(objects with a key "match")", item);
    Override o;
    for (const auto& entry : item.items()) {
      const std::string& key = entry.key();
      const json& value = entry.value();
      if (key == "match") {
        o.match = pattern_text(value);
      } else if (key == "precision") {
        o.precision = choose(kPrecisions, value);
      } else if (key == "weights") {
        check_weight_keys(r, value);
        o.weights_json = value.dump();
        r.override_needs_statistics |=
            value.value("weighted_search", false) || value.value("keep_means", false);
      } else {
        throw Error(ErrorKind::usage, "recipe key 'overrides." + key + "' is not known")
            .hint("did you mean 'overrides." +
                  nearest_name(key, {std::begin(kOverrideKeys), std::end(kOverrideKeys)}) + "'?");
      }
    }
    r.overrides.push_back(std::move(o));
  }
}

json overrides_to(const Recipe& r) {
  json list = json::array();
  for (const Override& o : r.overrides) {
    json item = {{"match", o.match}};
    if (o.precision) item["precision"] = name_of(kPrecisions, *o.precision);
    if (!o.weights_json.empty()) item["weights"] = json::parse(o.weights_json);
    list.push_back(std::move(item));
  }
  return list;
}

std::vector<Field> module_fields() {
  const json pattern = {{"type", "string"}, {"minLength", 1}};
  json keys = json::object();
  for (const Field& f : weight_fields()) {
    if (f.key != "row_scale") keys[std::string(f.key)] = f.schema;
  }
  json names = json::array();
  for (const auto& [name, value] : kPrecisions) names.push_back(name);
  const json weights = {{"type", "object"}, {"properties", keys}, {"additionalProperties", false}};
  const json item = {
      {"type", "object"},
      {"properties", {{"match", pattern}, {"precision", {{"enum", names}}}, {"weights", weights}}},
      {"required", json::array({"match"})},
      {"additionalProperties", false}};
  return {
      {"",
       "ignore",
       set_ignore,
       [](const Recipe& r) { return json(r.ignore); },
       {{"type", "array"}, {"items", pattern}}},
      {"", "overrides", set_overrides, overrides_to, {{"type", "array"}, {"items", item}}},
      choice("", "embeddings", kTablePrecisions, &Recipe::embeddings),
      choice("", "head", kTablePrecisions, &Recipe::head),
  };
}

const std::vector<Field>& fields() {
  static const std::vector<Field> all = [] {
    std::vector<Field> list = weight_fields();
    std::vector<Field> rest = {
        flag("curvature", "use", &Recipe::curvature),
        number("curvature", "damping", &Recipe::curvature_damping, 1e-6, 10),
        count("curvature", "passes", &Recipe::descent_passes, 100, "a whole number"),
        flag("curvature", "compensate", &Recipe::compensate),
        number("curvature", "ridge", &Recipe::target_ridge, 1e-6, 10),
        flag("curvature", "residual", &Recipe::residual),
        flag("curvature", "token_weights", &Recipe::token_weights),
        flag("curvature", "outputs", &Recipe::output_curvature),
        number("curvature", "output_damping", &Recipe::output_damping, 1e-6, 1e3),
        number("curvature", "own_text", &Recipe::own_text, 0, 16),
        count("curvature", "tune_passes", &Recipe::tune_passes, 64, "a whole number"),
        number("curvature", "tune_rate", &Recipe::tune_rate, 1e-4, 1),
        number("curvature", "tune_weights_per_token", &Recipe::tune_weights_per_token, 0, 1e9),
        flag("curvature", "kv_stream", &Recipe::stream_kv),
        choice("smoothing", "lambda1", kValueScalings, &Recipe::lambda1),
        number("smoothing", "lambda1_c", &Recipe::lambda1_c, 1e-6, 1e3),
        number("smoothing", "lambda1_scalar", &Recipe::lambda1_scalar, 1e-3, 1e3),
        flag("smoothing", "lambda2", &Recipe::lambda2),
        number("smoothing", "lambda2_c", &Recipe::lambda2_c, 1e-6, 1e3),
        flag("smoothing", "lambda3", &Recipe::lambda3),
        number("smoothing", "lambda3_c", &Recipe::lambda3_c, 1e-6, 1e3),
        flag("keys", "n", &Recipe::key_n),
        flag("keys", "s", &Recipe::key_s),
        choice("keys", "factors", kKeyFactors, &Recipe::key_factors),
        flag("keys", "centre", &Recipe::key_centre),
        flag("keys", "together", &Recipe::keys_together),
        number("keys", "alpha", &Recipe::key_alpha, 1e-3, 448),
        number("keys", "beta", &Recipe::key_beta, 1e-3, 448),
        number("keys", "n_exponent", &Recipe::key_n_exponent, 0, 2),
        number("keys", "s_exponent", &Recipe::key_s_exponent, 0, 2),
        count("keys", "top_k", &Recipe::key_top_k, 65536, "a whole number; 0 means head_dim / 16"),
        flag("values", "power_of_two", &Recipe::value_power_of_two),
        flag("values", "rotate", &Recipe::value_rotation),
        flag("values", "together", &Recipe::values_together),
        flag("", "kv_cache", &Recipe::kv_cache),
        choice("", kTargetKey, kTargets, &Recipe::target),
    };
    std::move(rest.begin(), rest.end(), std::back_inserter(list));
    std::vector<Field> modules = module_fields();
    std::move(modules.begin(), modules.end(), std::back_inserter(list));
    return list;
  }();
  return all;
}

std::string full_name(std::string_view section, std::string_view key) {
  return section.empty() ? std::string(key) : std::string(section) + "." + std::string(key);
}

[[noreturn]] void unknown_key(const std::string& name) {
  std::vector<std::string> known{"preset"};
  for (const Field& f : fields()) {
    known.push_back(full_name(f.section, f.key));
    if (!f.section.empty()) known.emplace_back(f.section);
  }
  throw Error(ErrorKind::usage, "recipe key '" + name + "' is not known")
      .hint("did you mean '" + nearest_name(name, known) + "'?");
}

void apply(Recipe& recipe, std::string_view section, const json& object) {
  for (const auto& item : object.items()) {
    const std::string& key = item.key();  // plain names: clang 14's lambdas cannot capture bindings
    const json& value = item.value();
    if (section.empty() && (key == "preset" || key == kTargetKey)) continue;  // read before the others
    const auto field = std::find_if(fields().begin(), fields().end(),
                                    [&](const Field& f) { return f.section == section && f.key == key; });
    if (field != fields().end()) {
      try {
        field->set(recipe, value);
      } catch (Error& e) {
        if (e.message().starts_with("recipe key")) throw;  // of a key inside this one
        throw Error(ErrorKind::usage, "recipe key '" + full_name(section, key) + "': " + e.message())
            .expected(e.expected())
            .found(e.found());
      }
      continue;
    }
    const bool is_section = section.empty() && std::any_of(fields().begin(), fields().end(),
                                                           [&](const Field& f) { return f.section == key; });
    if (!is_section) unknown_key(full_name(section, key));
    if (!value.is_object()) {
      throw Error(ErrorKind::usage, "recipe key '" + key + "' holds the wrong type")
          .expected("an object")
          .found(value.type_name());
    }
    apply(recipe, key, value);
  }
}

// With the checks of every JSON file (no key twice, bounded nesting), and of another kind: a recipe is part
// of what the user asks for. Comments are allowed, because recipes are written by people.
json parse_text(const std::string& text, const std::string& path) {
  try {
    return formats::parse_json(text, path, formats::JsonComments::allowed);
  } catch (const Error& e) {
    Error error(ErrorKind::usage, "recipe: " + e.message());
    error.path(path).expected(e.expected()).found(e.found());
    if (e.offset()) error.offset(*e.offset());
    throw error;
  }
}

// vLLM multiplies integers with FP8 scales that it makes itself, and holds keys and values in BF16 or FP8.
void set_target(Recipe& r, Target target) {
  r.target = target;
  const bool vllm = target == Target::vllm;
  r.weights.pin_top_scale = vllm;
  if (!vllm) return;
  r.weights.levels = Levels::int4();
  r.train_levels = false;
  r.weights.row_scale = RowScale::row;
  r.key_n = r.key_s = r.key_centre = false;
  r.keys_together = r.values_together = false;
  r.value_power_of_two = r.stream_kv = false;
  r.kv_cache = false;
}

Recipe preset_for_fireq(const std::string& name) {
  Recipe r;
  r.preset = name;
  if (name == "rtn") return r;
  if (name == "paper" || name == "fast" || name == "best") {
    r.lambda2 = r.lambda3 = true;
    r.key_n = r.key_s = true;
    if (name == "paper") {
      r.weights.row_scale = RowScale::tensor;
    } else {
      r.weights.levels = Levels::normal();
      r.weights.rounding = Rounding::product;
      r.weights.search_low = -7;
      r.weights.search_high = 2;
      r.weighted_search = true;
      r.key_factors = KeyFactors::moments;
      r.key_n_exponent = r.key_s_exponent = 0.75;
      r.key_centre = r.keys_together = r.values_together = true;
    }
    if (name == "fast") {
      r.keep_means = true;
      r.lambda1 = ValueScaling::channel;
    }
    if (name == "best") {
      r.curvature = r.output_curvature = true;
      r.own_text = 1;
      r.tune_passes = 4;
      r.value_rotation = true;
    }
    return r;
  }
  throw Error(ErrorKind::usage, "unknown preset '" + name + "'")
      .expected("rtn, paper, fast or best")
      .found(name);
}

Target target_from(const json& v) {
  try {
    return choose(kTargets, v);
  } catch (Error& e) {
    throw Error(ErrorKind::usage, std::string("recipe key '") + kTargetKey + "': " + e.message())
        .expected(e.expected())
        .found(e.found());
  }
}

// Keys below the preset may ask for what the target cannot run.
void check_target(const Recipe& r) {
  if (r.target != Target::vllm) return;
  const auto require = [](bool met, const char* key, const char* expected, const std::string& found) {
    if (met) return;
    throw Error(ErrorKind::usage, std::string("recipe key '") + key + "': vLLM cannot run this")
        .expected(expected)
        .found(found)
        .hint("leave the key out, or quantise without --for vllm");
  };
  require(r.weights.levels.is_int4(), "weights.levels", "\"int4\"",
          r.train_levels ? kTrained : r.weights.levels.name());
  require(r.weights.row_scale == RowScale::row, "weights.row_scale", "\"row\"", "\"tensor\"");
  require(!r.key_s, "keys.s", "false: S needs a hook between RoPE and the cache", "true");
  require(!r.key_centre, "keys.centre", "false: the mean is taken off between RoPE and the cache", "true");
  require(!r.keys_together, "keys.together", "false: there is no INT4 cache", "true");
  require(!r.values_together, "values.together", "false: there is no INT4 cache", "true");
  require(!r.kv_cache, "kv_cache", "false", "true");
  require(!r.stream_kv, "curvature.kv_stream", "false", "true");
  for (const Override& o : r.overrides) {
    if (o.weights_json.empty()) continue;
    const Levels levels = with_weight_keys(r, o.weights_json).weights.levels;
    require(levels.is_int4(), "overrides.weights.levels", "\"int4\"", levels.name());
  }
}

}  // namespace

Recipe preset_recipe(const std::string& name, Target target) {
  Recipe r = preset_for_fireq(name);
  set_target(r, target);
  return r;
}
Recipe parse_recipe(const std::string& json_text, const std::string& path_for_errors, Target target) {
  try {
    const json root = parse_text(json_text, path_for_errors);
    if (!root.is_object()) {
      throw Error(ErrorKind::usage, "recipe is not a JSON object").found(root.type_name());
    }
    std::string preset = "rtn";
    if (const auto it = root.find("preset"); it != root.end()) {
      if (!it->is_string()) {
        throw Error(ErrorKind::usage, "recipe key 'preset' holds the wrong type")
            .expected("a string")
            .found(formats::json_excerpt(*it));
      }
      preset = it->get<std::string>();
    }
    if (const auto it = root.find(kTargetKey); it != root.end()) target = target_from(*it);
    Recipe recipe = preset_recipe(preset, target);
    apply(recipe, "", root);
    check_target(recipe);
    if (recipe.curvature && recipe.weights.row_scale != RowScale::row) {
      throw Error(ErrorKind::usage, "recipe key 'curvature.use' needs a scale per row")
          .expected("weights.row_scale \"row\"")
          .found("\"tensor\"");
    }
    if (recipe.train_levels && !recipe.curvature) {
      throw Error(ErrorKind::usage, "recipe key 'weights.levels': only curvature can train levels")
          .expected("curvature.use true, or other levels")
          .found("\"trained\"");
    }
    return recipe;
  } catch (const json::exception& e) {
    throw Error(ErrorKind::usage, std::string("recipe is not valid JSON: ") + e.what()).path(path_for_errors);
  } catch (Error& e) {
    e.path_if_unset(path_for_errors);
    throw;
  }
}

std::string recipe_to_json(const Recipe& recipe) {
  json root = {{"preset", recipe.preset}};
  for (const Field& f : fields()) {
    if (f.section.empty()) {
      root[std::string(f.key)] = f.get(recipe);
    } else {
      root[std::string(f.section)][std::string(f.key)] = f.get(recipe);
    }
  }
  return root.dump();
}

Recipe with_weight_keys(Recipe recipe, const std::string& weights_json) {
  apply(recipe, kWeights, json::parse(weights_json));
  return recipe;
}

std::string precision_name(ModulePrecision precision) {
  return std::string(name_of(kPrecisions, precision));
}

std::string recipe_schema() {
  const json presets = {"rtn", "paper", "fast", "best"};
  json root = {{"$schema", "https://json-schema.org/draft/2020-12/schema"},
               {"title", "FireQ recipe"},
               {"description", "docs/recipes.md says what the keys mean"},
               {"type", "object"},
               {"additionalProperties", false},
               {"properties", {{"preset", {{"enum", presets}}}}}};
  json& properties = root["properties"];
  for (const Field& f : fields()) {
    if (f.section.empty()) {
      properties[std::string(f.key)] = f.schema;
      continue;
    }
    json& section = properties[std::string(f.section)];
    section["type"] = "object";
    section["additionalProperties"] = false;
    section["properties"][std::string(f.key)] = f.schema;
  }
  return root.dump(2) + "\n";
}

}  // namespace fireq::calib
