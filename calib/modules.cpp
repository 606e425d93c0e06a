#include "calib/modules.hpp"

#include <fnmatch.h>

#include <array>
#include <functional>
#include <memory>
#include <utility>

#include "calib/int4_weights.hpp"
#include "common/error.hpp"
#include "common/nearest.hpp"

#ifdef FIREQ_PCRE2
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#endif

namespace fireq::calib {
namespace {

using formats::ModulePrecision;

constexpr std::string_view kRegexPrefix = "re:";

#ifdef FIREQ_PCRE2
std::shared_ptr<void> compile(const std::string& expression) {
  int code = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* const compiled = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(expression.data()),
                                             expression.size(), PCRE2_ANCHORED, &code, &offset, nullptr);
  if (compiled == nullptr) {
    std::array<PCRE2_UCHAR, 256> text{};
    pcre2_get_error_message(code, text.data(), text.size());
    throw Error(ErrorKind::usage, "pattern 're:" + expression + "' is no regular expression")
        .found(std::string(reinterpret_cast<const char*>(text.data())) + " at character " +
               std::to_string(offset));
  }
  return {compiled, [](void* p) { pcre2_code_free(static_cast<pcre2_code*>(p)); }};
}

bool run(void* regex, const std::string& name) {
  const std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> data(
      pcre2_match_data_create(1, nullptr), pcre2_match_data_free);
  const int found = pcre2_match(static_cast<pcre2_code*>(regex), reinterpret_cast<PCRE2_SPTR>(name.data()),
                                name.size(), 0, 0, data.get(), nullptr);
  if (found >= 0) return true;
  if (found == PCRE2_ERROR_NOMATCH) return false;
  throw Error(ErrorKind::usage, "a regular expression takes too many steps").found("on " + name);
}
#else
std::shared_ptr<void> compile(const std::string& expression) {
  throw Error(ErrorKind::usage, "this build has no regular expressions")
      .found("re:" + expression)
      .hint("write a glob, such as model.layers.*.mlp.down_proj");
}
bool run(void* /*regex*/, const std::string& /*name*/) {
  return false;
}
#endif

}  // namespace

ModulePattern::ModulePattern(const std::string& pattern) : glob_(pattern) {
  if (pattern.starts_with(kRegexPrefix)) regex_ = compile(pattern.substr(kRegexPrefix.size()));
}

bool ModulePattern::matches(const std::string& name) const {
  if (regex_) return run(regex_.get(), name);
  return fnmatch(glob_.c_str(), name.c_str(), FNM_NOESCAPE) == 0;
}

Modules::Modules(const Recipe& recipe, const formats::ModelConfig& config, bool tied_head)
    : linears_(config.layers * kLinears, {ModulePrecision::int4, recipe.weights, recipe.weighted_search,
                                          recipe.keep_means, recipe.train_levels, recipe.train_levels}),
      chosen_(config.layers * kLinears, false),
      embeddings_(recipe.embeddings),
      head_(recipe.head),
      tied_head_(tied_head) {
  std::vector<std::string> names;
  for (std::uint64_t layer = 0; layer < config.layers; ++layer) {
    for (const std::string& name : formats::linear_names(layer)) names.push_back(name);
  }
  const std::size_t embedding_index = names.size();
  names.emplace_back(formats::kEmbeddingModule);
  names.emplace_back(formats::kHeadModule);

  const auto for_matches = [&](const std::string& pattern, const std::function<void(std::size_t)>& use) {
    const ModulePattern compiled(pattern);
    bool any = false;
    for (std::size_t i = 0; i < names.size(); ++i) {
      if (!compiled.matches(names[i])) continue;
      any = true;
      use(i);
    }
    if (!any) {
      throw Error(ErrorKind::usage, "pattern '" + pattern + "' matches no module of the model")
          .hint("the nearest module is " + nearest_name(pattern, names));
    }
  };
  const auto set = [&](std::size_t i, ModulePrecision precision, const std::string& pattern) {
    if (i < embedding_index) {
      linears_[i].precision = precision;
      chosen_[i] = true;
      return;
    }
    if (precision == ModulePrecision::int4) {
      throw Error(ErrorKind::usage, "pattern '" + pattern + "': " + names[i] + " cannot be in 4 bits")
          .expected(R"("fp8" or "original")")
          .found("\"int4\"");
    }
    (i == embedding_index ? embeddings_ : head_) = precision;
  };

  Recipe base = recipe;
  base.overrides.clear();
  base.ignore.clear();
  for (const Override& o : recipe.overrides) {
    for_matches(o.match, [&](std::size_t i) {
      if (o.precision) set(i, *o.precision, o.match);
      if (o.weights_json.empty() || i >= embedding_index) return;
      base.weights = linears_[i].weights;
      base.weighted_search = linears_[i].weighted_search;
      base.keep_means = linears_[i].keep_means;
      base.train_levels = linears_[i].train_levels;
      const Recipe own = with_weight_keys(base, o.weights_json);
      linears_[i].weights = own.weights;
      linears_[i].weighted_search = own.weighted_search;
      linears_[i].keep_means = own.keep_means;
      linears_[i].train_levels = own.train_levels;
      linears_[i].own_levels = own.train_levels || !(own.weights.levels == recipe.weights.levels);
      if (own.train_levels && !recipe.curvature) {
        throw Error(ErrorKind::usage,
                    "recipe key 'overrides.weights.levels': only curvature can train levels")
            .expected("curvature.use true, or other levels")
            .found("\"trained\" for '" + o.match + "'");
      }
    });
  }
  for (const std::string& pattern : recipe.ignore) {
    for_matches(pattern, [&](std::size_t i) { set(i, ModulePrecision::original, pattern); });
  }
  if (tied_head) {
    if (head_ == ModulePrecision::fp8 && embeddings_ != ModulePrecision::fp8) {
      throw Error(ErrorKind::usage, "the output head of this model is its embedding")
          .expected("the head in the embedding's precision")
          .found(R"(head "fp8", embeddings "original")")
          .hint(R"(set "embeddings" to "fp8": the head follows)");
    }
    head_ = ModulePrecision::original;  // no matrix of its own
  }
  for (std::size_t i = 0; i < embedding_index; ++i) {
    if (linears_[i].precision == ModulePrecision::original) ignored_.push_back(names[i]);
    if (linears_[i].precision == ModulePrecision::fp8) fp8_.push_back(names[i]);
  }
  if (embeddings_ == ModulePrecision::fp8) fp8_.emplace_back(formats::kEmbeddingModule);
  if (head_ == ModulePrecision::fp8) fp8_.emplace_back(formats::kHeadModule);
}

Modules modules_of(const WeightSource& source, const Recipe& recipe) {
  const bool own_head = source.reader().contains(std::string(formats::kHeadModule) + ".weight") ||
                        !int4_parts(source.reader(), formats::kHeadModule).empty();
  return {recipe, source.config(), source.config().tied_embeddings && !own_head};
}

}  // namespace fireq::calib
