#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

#include "calib/recipe.hpp"
#include "common/error.hpp"

namespace fireq::calib {
namespace {

using nlohmann::json;
using testing::HasSubstr;

std::string usage_error(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::usage) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

TEST(Recipe, PresetsAreWhatTheDocumentationSays) {
  const Recipe rtn = preset_recipe("rtn");
  EXPECT_FALSE(rtn.needs_statistics());
  EXPECT_TRUE(rtn.weights.levels.is_int4());
  EXPECT_EQ(rtn.weights.row_scale, libquant::RowScale::row);
  EXPECT_FALSE(rtn.lambda2 || rtn.lambda3 || rtn.key_n || rtn.key_s);

  const Recipe paper = preset_recipe("paper");
  EXPECT_EQ(paper.weights.row_scale, libquant::RowScale::tensor);
  EXPECT_EQ(paper.weights.rounding, libquant::Rounding::value);
  EXPECT_TRUE(paper.lambda2 && paper.lambda3 && paper.key_n && paper.key_s);
  EXPECT_EQ(paper.lambda1, ValueScaling::off);
  EXPECT_DOUBLE_EQ(paper.lambda2_c, 0.0096);
  EXPECT_DOUBLE_EQ(paper.lambda3_c, 0.015);
  EXPECT_DOUBLE_EQ(paper.key_alpha, 8);
  EXPECT_DOUBLE_EQ(paper.key_beta, 8);
  EXPECT_EQ(paper.weights.search_low, 0);

  const Recipe fast = preset_recipe("fast");
  EXPECT_EQ(fast.weights.search_low, -7);
  EXPECT_EQ(fast.weights.search_high, 2);
  EXPECT_TRUE(fast.weighted_search);
  EXPECT_EQ(fast.weights.levels, libquant::Levels::normal());
  EXPECT_FALSE(fast.needs_text());

  const Recipe best = preset_recipe("best");
  EXPECT_TRUE(best.needs_text());
  EXPECT_TRUE(best.curvature && best.compensate && best.residual && best.output_curvature);
  EXPECT_EQ(best.weights.levels, libquant::Levels::normal());
  EXPECT_EQ(best.descent_passes, 3U);
  EXPECT_EQ(best.own_text, 1);
  EXPECT_EQ(best.tune_passes, 4U);
  EXPECT_EQ(best.tune_rate, 0.02);
  EXPECT_EQ(preset_recipe("fast").own_text, 0);
  EXPECT_EQ(preset_recipe("fast").tune_passes, 0U);
  EXPECT_EQ(best.key_factors, KeyFactors::moments);
  EXPECT_DOUBLE_EQ(best.key_n_exponent, 0.75);
  EXPECT_DOUBLE_EQ(best.key_s_exponent, 0.75);
  EXPECT_TRUE(best.value_rotation && best.key_centre);
  EXPECT_FALSE(best.keep_means);
  EXPECT_EQ(fast.key_factors, KeyFactors::moments);
  EXPECT_TRUE(fast.keep_means && fast.key_centre);
  EXPECT_EQ(fast.lambda1, ValueScaling::channel);
  for (const Recipe* r : {&fast, &best}) EXPECT_TRUE(r->keys_together && r->values_together);
  EXPECT_FALSE(paper.keep_means || paper.keys_together || paper.values_together);
}

TEST(Recipe, ForVllmEveryPresetKeepsToIntegersAndRows) {
  for (const char* name : {"rtn", "paper", "fast", "best"}) {
    const Recipe own = preset_recipe(name);
    const Recipe vllm = preset_recipe(name, Target::vllm);
    EXPECT_EQ(own.target, Target::fireq);
    EXPECT_FALSE(own.weights.pin_top_scale);
    EXPECT_EQ(vllm.target, Target::vllm);
    EXPECT_TRUE(vllm.weights.pin_top_scale);
    EXPECT_TRUE(vllm.weights.levels.is_int4());
    EXPECT_EQ(vllm.weights.row_scale, libquant::RowScale::row);
    EXPECT_FALSE(vllm.key_n || vllm.key_s || vllm.kv_cache || vllm.value_power_of_two || vllm.stream_kv);
    EXPECT_FALSE(vllm.keys_together || vllm.values_together || vllm.key_centre);
    // The rest is the preset's.
    EXPECT_EQ(vllm.lambda2, own.lambda2);
    EXPECT_EQ(vllm.curvature, own.curvature);
    EXPECT_EQ(vllm.weights.search_low, own.weights.search_low);
    // The recorded recipe says all of it.
    const std::string text = recipe_to_json(vllm);
    EXPECT_EQ(json::parse(text).at("for"), "vllm");
    const Recipe again = parse_recipe(text, "r.json");
    EXPECT_EQ(recipe_to_json(again), text);
    EXPECT_TRUE(again.weights.pin_top_scale);
  }
  EXPECT_EQ(json::parse(recipe_to_json(preset_recipe("fast"))).at("for"), "fireq");
  // The target is known before the other keys, wherever it stands; the command line's holds without one.
  EXPECT_TRUE(parse_recipe(R"({"weights": {"search": [-1, 1]}, "preset": "fast", "for": "vllm"})", "r.json")
                  .weights.levels.is_int4());
  EXPECT_EQ(parse_recipe(R"({"preset": "fast"})", "r.json", Target::vllm).target, Target::vllm);
  EXPECT_EQ(parse_recipe(R"({"for": "fireq"})", "r.json", Target::vllm).target, Target::fireq);
}

TEST(Recipe, TrainedLevelsNeedCurvature) {
  const Recipe r = parse_recipe(R"({"preset": "best", "weights": {"levels": "trained"}})", "r.json");
  EXPECT_TRUE(r.train_levels);
  EXPECT_EQ(r.weights.levels, libquant::Levels::normal());  // where they start
  EXPECT_EQ(json::parse(recipe_to_json(r)).at("weights").at("levels"), "trained");
  EXPECT_TRUE(parse_recipe(recipe_to_json(r), "r.json").train_levels);
  EXPECT_THAT(
      usage_error([] { parse_recipe(R"({"preset": "fast", "weights": {"levels": "trained"}})", "r.json"); }),
      HasSubstr("weights.levels"));
}

TEST(Recipe, RefusesWhatVllmCannotRun) {
  for (const auto& [text, key] :
       {std::pair{R"({"weights": {"levels": "normal"}})", "weights.levels"},
        std::pair{R"({"preset": "best", "weights": {"levels": "trained"}})", "weights.levels"},
        std::pair{R"({"weights": {"row_scale": "tensor"}})", "weights.row_scale"},
        std::pair{R"({"keys": {"s": true}})", "keys.s"}, std::pair{R"({"kv_cache": true})", "kv_cache"},
        std::pair{R"({"curvature": {"kv_stream": true}})", "curvature.kv_stream"}}) {
    const std::string message = usage_error([&] { parse_recipe(text, "r.json", Target::vllm); });
    EXPECT_THAT(message, HasSubstr("r.json: recipe key '" + std::string(key) + "': vLLM cannot run this"));
    EXPECT_NO_THROW(parse_recipe(text, "r.json")) << text;
  }
  EXPECT_TRUE(parse_recipe(R"({"keys": {"n": true}})", "r.json", Target::vllm).key_n);
  EXPECT_THAT(usage_error([] { parse_recipe(R"({"for": null})", "r.json"); }), HasSubstr("recipe key 'for'"));
}

TEST(Recipe, JsonKeepsEveryChoice) {
  for (const char* name : {"rtn", "paper", "fast", "best"}) {
    const std::string text = recipe_to_json(preset_recipe(name));
    EXPECT_EQ(recipe_to_json(parse_recipe(text, "r.json")), text) << name;
  }
  json custom = json::parse(recipe_to_json(preset_recipe("fast")));
  custom["weights"]["levels"] = {0.5, 1.25, 2, 3, 4, 5.5, 6, 7.75};
  custom["weights"]["search"] = {-3, 1};
  custom["smoothing"]["lambda1"] = "channel";
  custom["keys"]["top_k"] = 5;
  custom["kv_cache"] = false;
  const Recipe r = parse_recipe(custom.dump(), "r.json");
  EXPECT_FLOAT_EQ(r.weights.levels.magnitude[7], 7.75F);
  EXPECT_EQ(r.weights.search_low, -3);
  EXPECT_EQ(r.lambda1, ValueScaling::channel);
  EXPECT_EQ(r.key_top_k, 5U);
  EXPECT_FALSE(r.kv_cache);
  EXPECT_EQ(json::parse(recipe_to_json(r)), custom);
}

// Each key, one by one, changed to another valid value: the text must change and survive a round trip.
TEST(Recipe, EveryKeyIsReadAndWritten) {
  const json base = json::parse(recipe_to_json(preset_recipe("rtn")));
  const auto other = [](const std::string& key, const json& v) -> json {
    if (v.is_boolean()) return !v.get<bool>();
    if (key == "levels") return "normal";
    if (key == "row_scale") return "tensor";
    if (key == "rounding") return "product";
    if (key == "search") return json{-1, 1};
    if (key == "lambda1") return "scalar";
    if (key == "factors") return "moments";
    if (key == "top_k" || key.ends_with("passes")) return v.get<unsigned>() + 1;
    return v.get<double>() * 0.5 + 0.25;
  };
  int changed = 0;
  for (const auto& [section, object] : base.items()) {
    if (!object.is_object()) continue;
    for (const auto& [key, value] : object.items()) {
      json edit = base;
      edit[section][key] = other(key, value);
      const json back = json::parse(recipe_to_json(parse_recipe(edit.dump(), "r.json")));
      EXPECT_EQ(back, edit) << section << "." << key;
      ++changed;
    }
  }
  EXPECT_GE(changed, 20);
}

TEST(Recipe, RefusesUnknownKeysAndNamesTheNearest) {
  const std::string line =
      usage_error([] { parse_recipe(R"({"preset": "fast", "smoothing": {"lamda2": false}})", "my.json"); });
  EXPECT_THAT(line, HasSubstr("my.json"));
  EXPECT_THAT(line, HasSubstr("smoothing.lamda2"));
  EXPECT_THAT(line, HasSubstr("did you mean 'smoothing.lambda2'"));
  EXPECT_THAT(usage_error([] { parse_recipe(R"({"weigths": {}})", "r.json"); }), HasSubstr("weigths"));
  EXPECT_THAT(usage_error([] { parse_recipe(R"({"preset": "best?"})", "r.json"); }), HasSubstr("best?"));
}

TEST(Recipe, RefusesWrongTypesAndRanges) {
  const auto error = [](const std::string& text) {
    return usage_error([&] { parse_recipe(text, "r.json"); });
  };
  EXPECT_THAT(error(R"({"weights": {"row_scale": "column"}})"), HasSubstr("weights.row_scale"));
  EXPECT_THAT(error(R"({"weights": {"search": [1, 2]}})"), HasSubstr("weights.search"));
  EXPECT_THAT(error(R"({"weights": {"search": [-7]}})"), HasSubstr("[low, high]"));
  EXPECT_THAT(error(R"({"weights": {"levels": [0, 1, 2, 3, 4, 5, 6]}})"), HasSubstr("weights.levels"));
  EXPECT_THAT(error(R"({"weights": {"levels": [0, 1, 2, 3, 3, 5, 6, 7]}})"), HasSubstr("weights.levels"));
  EXPECT_THAT(error(R"({"keys": {"alpha": -1}})"), HasSubstr("keys.alpha"));
  EXPECT_THAT(error(R"({"keys": {"top_k": 1.5}})"), HasSubstr("keys.top_k"));
  EXPECT_THAT(error(R"({"keys": 3})"), HasSubstr("object"));
  EXPECT_THAT(error(R"({"kv_cache": "yes"})"), HasSubstr("true or false"));
  EXPECT_THAT(error(R"({"curvature": {"passes": -1}})"), HasSubstr("curvature.passes"));
  EXPECT_THAT(error(R"({"preset": "best", "weights": {"row_scale": "tensor"}})"), HasSubstr("curvature.use"));
  EXPECT_THAT(error("[1]"), HasSubstr("not a JSON object"));
  EXPECT_THAT(error("{"), HasSubstr("not valid JSON"));
  EXPECT_THAT(error(R"({"preset": 1})"), HasSubstr("preset"));
}

// docs/recipe.schema.json is what editors and CI jobs load; FIREQ_WRITE_SCHEMA=1 writes it anew.
TEST(Recipe, ShippedSchemaIsThatOfTheKeyTable) {
  const std::string path = std::string(FIREQ_SOURCE_DIR) + "/docs/recipe.schema.json";
  if (std::getenv("FIREQ_WRITE_SCHEMA") != nullptr) std::ofstream(path) << recipe_schema();
  std::ifstream file(path);
  const std::string shipped((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  EXPECT_EQ(shipped, recipe_schema()) << "run this test with FIREQ_WRITE_SCHEMA=1";
  // Every key that a resolved recipe has is in it.
  const json schema = json::parse(shipped);
  const json recipe = json::parse(recipe_to_json(preset_recipe("best")));
  for (const auto& [key, value] : recipe.items()) {
    ASSERT_TRUE(schema["properties"].contains(key)) << key;
    if (!value.is_object()) continue;
    for (const auto& [inner, unused] : value.items()) {
      EXPECT_TRUE(schema["properties"][key]["properties"].contains(inner)) << key << "." << inner;
    }
  }
}

TEST(Recipe, ModulesAreReadAndWritten) {
  const std::string text = R"({"preset": "rtn", "ignore": ["lm_head"], "embeddings": "fp8", "overrides": [
      {"match": "*down_proj", "precision": "fp8"}, {"match": "re:.*up", "weights": {"weighted_search": true}}]})";
  const Recipe r = parse_recipe(text, "r.json");
  ASSERT_EQ(r.overrides.size(), 2U);
  EXPECT_EQ(r.overrides[0].precision, formats::ModulePrecision::fp8);
  EXPECT_FALSE(r.weighted_search);
  EXPECT_TRUE(r.needs_statistics());  // the second override's search
  EXPECT_EQ(recipe_to_json(parse_recipe(recipe_to_json(r), "again")), recipe_to_json(r));

  const auto refused = [](const std::string& keys) {
    return usage_error([&] { parse_recipe("{" + keys + "}", "r.json"); });
  };
  EXPECT_THAT(refused(R"("ignor": [])"), HasSubstr("did you mean 'ignore'"));
  EXPECT_THAT(refused(R"("ignore": "x")"), HasSubstr("'ignore'"));
  EXPECT_THAT(refused(R"("overrides": [{"precision": "fp8"}])"), HasSubstr("match"));
  EXPECT_THAT(refused(R"("overrides": [{"match": "*", "precison": "fp8"}])"),
              HasSubstr("did you mean 'overrides.precision'"));
  EXPECT_THAT(refused(R"("overrides": [{"match": "*", "precision": "int8"}])"),
              HasSubstr("\"int4\", \"fp8\", \"original\""));
  EXPECT_THAT(refused(R"("overrides": [{"match": "*", "weights": {"levls": "int4"}}])"),
              HasSubstr("did you mean 'weights.levels'"));
  EXPECT_THAT(refused(R"("overrides": [{"match": "*", "weights": {"row_scale": "row"}}])"),
              HasSubstr("one for the folder"));
  EXPECT_THAT(refused(R"("for": "vllm", "overrides": [{"match": "*", "weights": {"levels": "normal"}}])"),
              HasSubstr("overrides.weights.levels"));
  EXPECT_THAT(refused(R"("head": "int4")"), HasSubstr("'head'"));
}

}  // namespace
}  // namespace fireq::calib
