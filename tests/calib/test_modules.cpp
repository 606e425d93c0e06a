// Which modules a recipe's patterns choose, and what they get.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "calib/modules.hpp"
#include "common/error.hpp"

namespace fireq::calib {
namespace {

using formats::ModulePrecision;
using testing::ElementsAre;
using testing::HasSubstr;

formats::ModelConfig three_layers() {
  formats::ModelConfig config;
  config.layers = 3;
  return config;
}

Modules resolve(const std::string& keys, bool tied = false) {
  return {parse_recipe("{" + keys + "}", "r.json"), three_layers(), tied};
}

std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::usage);
    return e.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

TEST(Modules, GlobsMatchWholeNames) {
  EXPECT_TRUE(ModulePattern("model.layers.0.*").matches("model.layers.0.mlp.up_proj"));
  EXPECT_FALSE(ModulePattern("model.layers.0.*").matches("model.layers.10.mlp.up_proj"));
  EXPECT_FALSE(ModulePattern("model.layers.0").matches("model.layers.0.mlp.up_proj"));
  EXPECT_FALSE(ModulePattern("down_proj").matches("model.layers.0.mlp.down_proj"));
  EXPECT_TRUE(ModulePattern("*.[qk]_proj").matches("model.layers.2.self_attn.k_proj"));
  EXPECT_TRUE(ModulePattern("model.layers.?.mlp.*").matches("model.layers.2.mlp.gate_proj"));
}

TEST(Modules, LaterOverridesWinAndIgnoreWinsOverAll) {
  const Modules m = resolve(R"("ignore": ["model.layers.0.mlp.*"], "overrides": [
      {"match": "*down_proj", "precision": "fp8", "weights": {"levels": "normal"}},
      {"match": "*down_proj", "weights": {"search": [-3, 1]}},
      {"match": "model.layers.2.*", "precision": "original"},
      {"match": "model.layers.2.mlp.down_proj", "precision": "int4"},
      {"match": "lm_head", "precision": "fp8"}])");
  EXPECT_EQ(m.linear(0, kDown).precision, ModulePrecision::original);
  EXPECT_EQ(m.linear(0, kQ).precision, ModulePrecision::int4);
  EXPECT_EQ(m.linear(1, kDown).precision, ModulePrecision::fp8);
  EXPECT_EQ(m.linear(2, kQ).precision, ModulePrecision::original);
  EXPECT_EQ(m.linear(2, kDown).precision, ModulePrecision::int4);
  EXPECT_EQ(m.linear(2, kDown).weights.levels, libquant::Levels::normal());
  EXPECT_EQ(m.linear(2, kDown).weights.search_low, -3);
  EXPECT_TRUE(m.linear(1, kUp).weights.levels.is_int4());
  EXPECT_EQ(m.linear(1, kUp).weights.search_low, 0);
  EXPECT_EQ(m.ignored().size(), 3U + 6U);
  EXPECT_THAT(m.fp8(), ElementsAre("model.layers.1.mlp.down_proj", "lm_head"));
  EXPECT_TRUE(m.chosen(2, kDown));
  EXPECT_FALSE(m.chosen(1, kUp));
}

TEST(Modules, WhatMatchesNothingIsRefusedWithTheNearest) {
  EXPECT_THAT(error_of([] { resolve(R"("ignore": ["model.layers.1.mlp.dwn_proj"])"); }),
              HasSubstr("the nearest module is model.layers.1.mlp.down_proj"));
  EXPECT_THAT(error_of([] { resolve(R"("overrides": [{"match": "lm_hed", "precision": "fp8"}])"); }),
              HasSubstr("the nearest module is lm_head"));
}

TEST(Modules, EmbeddingAndHead) {
  EXPECT_THAT(resolve(R"("embeddings": "fp8", "head": "fp8")").fp8(),
              ElementsAre("model.embed_tokens", "lm_head"));
  EXPECT_THAT(resolve(R"("embeddings": "fp8")", true).fp8(), ElementsAre("model.embed_tokens"));
  EXPECT_THAT(resolve(R"("head": "fp8", "ignore": ["lm_head"])").fp8(), ElementsAre());
  EXPECT_THAT(error_of([] { resolve(R"("head": "fp8")", true); }), HasSubstr("the head follows"));
  EXPECT_THAT(error_of([] { resolve(R"("overrides": [{"match": "*", "precision": "int4"}])"); }),
              HasSubstr("model.embed_tokens cannot be in 4 bits"));
}

TEST(Modules, RegularExpressionsMatchFromTheBeginning) {
#ifndef FIREQ_TEST_WITH_REGEX
  EXPECT_THAT(error_of([] { ModulePattern("re:.*"); }), HasSubstr("no regular expressions"));
#else
  EXPECT_TRUE(ModulePattern("re:.*down_proj$").matches("model.layers.0.mlp.down_proj"));
  EXPECT_FALSE(ModulePattern("re:down_proj").matches("model.layers.0.mlp.down_proj"));
  EXPECT_TRUE(ModulePattern(R"(re:model\.layers\.[01]\.)").matches("model.layers.1.mlp.up_proj"));
  EXPECT_FALSE(ModulePattern(R"(re:model\.layers\.[01]\.)").matches("model.layers.11.mlp.up_proj"));
  EXPECT_THAT(error_of([] { ModulePattern("re:(down"); }), HasSubstr("at character 5"));
  EXPECT_THAT(error_of([] { resolve(R"("ignore": ["re:(.*.*.*.*.*.*.*.*)*=$"])"); }),
              testing::AnyOf(HasSubstr("too many steps"), HasSubstr("matches no module")));
#endif
}

}  // namespace
}  // namespace fireq::calib
