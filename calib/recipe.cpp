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
constexpr Choices<Target, 2> kTargets{{{"fireq", Target::fireq}, {"vllm", Target::vllm}}};
constexpr const char* kTargetKey = "for";

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
};

Field flag(std::string_view section, std::string_view key, bool Recipe::*member) {
  return {section, key, [member](Recipe& r, const json& v) { r.*member = boolean(v); },
          [member](const Recipe& r) { return json(r.*member); }};
}

Field number(std::string_view section, std::string_view key, double Recipe::*member, double low,
             double high) {
  return {section, key, [=](Recipe& r, const json& v) { r.*member = number_in(v, low, high); },
          [member](const Recipe& r) { return json(r.*member); }};
}

Field count(std::string_view section, std::string_view key, std::uint64_t Recipe::*member, double high,
            const char* expected) {
  return {section, key,
          [=](Recipe& r, const json& v) {
            if (!v.is_number_unsigned()) refuse(expected, v);
            r.*member = static_cast<std::uint64_t>(number_in(v, 0, high));
          },
          [member](const Recipe& r) { return json(r.*member); }};
}

std::vector<Field> weight_fields() {
  return {
      {"weights", "levels",
       [](Recipe& r, const json& v) {
         r.train_levels = v == kTrained;
         r.weights.levels = r.train_levels ? Levels::normal() : levels_from(v);
       },
       [](const Recipe& r) { return r.train_levels ? json(kTrained) : levels_to(r.weights.levels); }},
      {"weights", "row_scale", [](Recipe& r, const json& v) { r.weights.row_scale = choose(kRowScales, v); },
       [](const Recipe& r) { return json(name_of(kRowScales, r.weights.row_scale)); }},
      {"weights", "rounding", [](Recipe& r, const json& v) { r.weights.rounding = choose(kRoundings, v); },
       [](const Recipe& r) { return json(name_of(kRoundings, r.weights.rounding)); }},
      {"weights", "search",
       [](Recipe& r, const json& v) {
         if (!v.is_array() || v.size() != 2 || !v[0].is_number_integer() || !v[1].is_number_integer()) {
           refuse("[low, high] whole numbers of scale codes, for example [-7, 2]", v);
         }
         const double low = number_in(v[0], -32, 0);
         const double high = number_in(v[1], 0, 32);
         r.weights.search_low = static_cast<int>(low);
         r.weights.search_high = static_cast<int>(high);
       },
       [](const Recipe& r) {
         return json{r.weights.search_low, r.weights.search_high};
       }},
      flag("weights", "weighted_search", &Recipe::weighted_search),
      {"weights", "tensor_search_threshold",
       [](Recipe& r, const json& v) {
         r.weights.tensor_search_threshold = static_cast<float>(number_in(v, 0x1p-20, 448));
       },
       [](const Recipe& r) { return json(static_cast<double>(r.weights.tensor_search_threshold)); }},
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
        flag("curvature", "kv_stream", &Recipe::stream_kv),
        {"smoothing", "lambda1", [](Recipe& r, const json& v) { r.lambda1 = choose(kValueScalings, v); },
         [](const Recipe& r) { return json(name_of(kValueScalings, r.lambda1)); }},
        number("smoothing", "lambda1_c", &Recipe::lambda1_c, 1e-6, 1e3),
        number("smoothing", "lambda1_scalar", &Recipe::lambda1_scalar, 1e-3, 1e3),
        flag("smoothing", "lambda2", &Recipe::lambda2),
        number("smoothing", "lambda2_c", &Recipe::lambda2_c, 1e-6, 1e3),
        flag("smoothing", "lambda3", &Recipe::lambda3),
        number("smoothing", "lambda3_c", &Recipe::lambda3_c, 1e-6, 1e3),
        flag("keys", "n", &Recipe::key_n),
        flag("keys", "s", &Recipe::key_s),
        {"keys", "factors", [](Recipe& r, const json& v) { r.key_factors = choose(kKeyFactors, v); },
         [](const Recipe& r) { return json(name_of(kKeyFactors, r.key_factors)); }},
        flag("keys", "centre", &Recipe::key_centre),
        number("keys", "alpha", &Recipe::key_alpha, 1e-3, 448),
        number("keys", "beta", &Recipe::key_beta, 1e-3, 448),
        number("keys", "n_exponent", &Recipe::key_n_exponent, 0, 2),
        number("keys", "s_exponent", &Recipe::key_s_exponent, 0, 2),
        count("keys", "top_k", &Recipe::key_top_k, 65536, "a whole number; 0 means head_dim / 16"),
        flag("values", "power_of_two", &Recipe::value_power_of_two),
        flag("values", "rotate", &Recipe::value_rotation),
        flag("", "kv_cache", &Recipe::kv_cache),
        {"", kTargetKey, [](Recipe& r, const json& v) { r.target = choose(kTargets, v); },
         [](const Recipe& r) { return json(name_of(kTargets, r.target)); }},
    };
    std::move(rest.begin(), rest.end(), std::back_inserter(list));
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
    }
    if (name == "best") {
      r.curvature = r.output_curvature = true;
      r.key_factors = KeyFactors::moments;
      r.key_n_exponent = r.key_s_exponent = 0.75;
      r.key_centre = true;
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
  require(!r.kv_cache, "kv_cache", "false", "true");
  require(!r.stream_kv, "curvature.kv_stream", "false", "true");
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

}  // namespace fireq::calib
