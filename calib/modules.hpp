// Which precision and which weight keys each module of a model gets from a recipe: its defaults, then its
// overrides in order, then its ignore list.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "calib/recipe.hpp"
#include "calib/weights.hpp"
#include "formats/model_config.hpp"
#include "libquant/quantized_linear.hpp"

namespace fireq::calib {

struct ModuleChoice {
  formats::ModulePrecision precision = formats::ModulePrecision::int4;
  libquant::WeightQuantizerOptions weights;  // of 4-bit modules
  bool weighted_search = false;
  bool keep_means = false;
  bool train_levels = false;  // from weights.levels
  bool own_levels = false;    // stored with the module: trained, or others than the folder's
};

// A glob that matches whole names ('*' and '?' match dots too), or "re:" and a regular expression that
// matches from the name's beginning, as in compressed-tensors' lists. Error(usage) for an expression that
// does not compile, and for any in a build without PCRE2: one pattern means one thing in every build.
class ModulePattern {
 public:
  explicit ModulePattern(const std::string& pattern);
  bool matches(const std::string& name) const;

 private:
  std::string glob_;
  std::shared_ptr<void> regex_;
};

class Modules {
 public:
  // tied_head: the head is the embedding, so that what holds for the embedding holds for it. Error(usage) for
  // a pattern that matches no module (names the nearest), for 4 bits asked of embedding or head, for a tied
  // head in another precision than the embedding.
  Modules(const Recipe& recipe, const formats::ModelConfig& config, bool tied_head);

  const ModuleChoice& linear(std::uint64_t layer, std::size_t linear) const {
    return linears_.at(layer * kLinears + linear);
  }
  formats::ModulePrecision embeddings() const noexcept { return embeddings_; }
  formats::ModulePrecision head() const noexcept { return head_; }  // of a matrix of its own
  formats::ModulePrecision head_as_stored() const noexcept { return tied_head_ ? embeddings_ : head_; }
  // Whether the recipe itself, not a default, says how a linear is stored.
  bool chosen(std::uint64_t layer, std::size_t linear) const { return chosen_.at(layer * kLinears + linear); }
  // For quantization_config: modules in the source's type that would else be quantised, and those in FP8.
  const std::vector<std::string>& ignored() const noexcept { return ignored_; }
  const std::vector<std::string>& fp8() const noexcept { return fp8_; }

 private:
  std::vector<ModuleChoice> linears_;
  std::vector<bool> chosen_;
  formats::ModulePrecision embeddings_, head_;
  bool tied_head_;
  std::vector<std::string> ignored_, fp8_;
};

Modules modules_of(const WeightSource& source, const Recipe& recipe);

}  // namespace fireq::calib
