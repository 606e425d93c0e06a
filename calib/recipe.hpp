// Recipe: every choice of one quantisation run, from a preset or JSON; saved whole in the output's
// config.json. The only source of settings.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "formats/fireq_folder.hpp"
#include "libquant/quantized_linear.hpp"

namespace fireq::calib {

enum class ValueScaling : std::uint8_t {
  off,
  channel,
  scalar
};  // Lambda_1: per value channel, or the release's scalar 0.9

// What has to run the result: this toolkit's own kernels, or vLLM (an exported folder, docs/export.md).
enum class Target : std::uint8_t { fireq, vllm };
enum class KeyFactors : std::uint8_t { maxima, moments };  // what N and S are made from

// What differs from the rest of the recipe in the modules that a pattern matches (calib/modules.hpp).
struct Override {
  std::string match;
  std::optional<formats::ModulePrecision> precision;
  std::string weights_json;  // keys of "weights" as a JSON object; empty: none
};

struct Recipe {
  Target target = Target::fireq;
  std::string preset = "paper";  // where it started from: "paper", "rtn", "fast", "best"
  libquant::WeightQuantizerOptions weights;
  bool keep_means = false;       // codes moved so that a row's mean output stays (libquant/mean_rounding.hpp)
  bool weighted_search = false;  // sigma search weighted by mean x^2 of each input channel
  // Rounding a row's weights together, towards compensated targets (calib/two_streams.hpp). Needs text, a
  // scale per row, and rounds to products whatever weights.rounding says.
  bool curvature = false;
  bool train_levels = false;         // each linear's own magnitudes, from weights.levels; needs curvature
  double curvature_damping = 0.01;   // share of the mean of H's diagonal
  std::uint64_t descent_passes = 3;  // coordinate descent over scales and codes
  bool compensate = true;            // targets W*; else the original weights
  double target_ridge = 0.1;         // pulls W* to the original weights, share of the mean of H's diagonal
  bool residual = true;              // o and down make up what the residual stream lacks
  bool token_weights = false;        // for o and down a token counts by 1 / mean square of its hidden state
  bool output_curvature = false;     // errors weighted by what outputs are worth to the model's predictions
  double output_damping = 0.3;       // of that weight, share of its mean diagonal
  double own_text = 0;  // windows that the model writes itself, for each of the text (calib/own_text.hpp)
  // Codes of all layers tuned together when they are rounded (calib/code_tuner.hpp).
  std::uint64_t tune_passes = 0;       // over the text; 0: not at all
  double tune_rate = 0.02;             // of a step at first, in units of a group's scale
  double tune_weights_per_token = 32;  // of the layers, at most, for each token of the text
  bool stream_kv = false;  // the quantised stream has the INT4 cache, FP8 queries and probabilities
  // Smoothing of weights.
  ValueScaling lambda1 = ValueScaling::off;
  double lambda1_c = 0.0096;  // target mean |w| of o_proj's columns
  double lambda1_scalar = 0.9;
  bool lambda2 = false;
  double lambda2_c = 0.0096;
  bool lambda3 = false;
  double lambda3_c = 0.015;
  // Keys.
  bool key_n = false;
  bool key_s = false;
  KeyFactors key_factors = KeyFactors::maxima;
  bool key_centre = false;  // keys are cached less their mean, on heads where that helps
  double key_alpha = 8, key_beta = 8, key_n_exponent = 1, key_s_exponent = 1;
  std::uint64_t key_top_k = 0;  // 0: max(1, round(head_dim/16))
  // A power of two per KV head in W_v and W_o that keeps sigma_V normal.
  bool value_power_of_two = false;
  // Codes of a key, or of a value, in the cache are chosen together (libquant/kv_rounding.hpp).
  bool keys_together = false;
  bool values_together = false;
  bool value_rotation = false;  // values spread over their head's channels, in W_v and W_o
  bool kv_cache = true;         // the folder asks for the INT4 cache
  // Modules. Overrides are applied in order, then `ignore`, which leaves modules in the source's own type.
  std::vector<std::string> ignore;
  std::vector<Override> overrides;
  bool override_needs_statistics = false;  // one of them has a weighted search
  formats::ModulePrecision embeddings = formats::ModulePrecision::original;
  formats::ModulePrecision head = formats::ModulePrecision::original;

  bool needs_statistics() const noexcept {
    return weighted_search || keep_means || override_needs_statistics || key_n || key_s || key_centre ||
           keys_together || value_power_of_two;
  }
  bool needs_text() const noexcept { return curvature; }  // the tokens themselves, not only statistics
};

// Error(usage) naming the presets. For vLLM a preset has integer levels, row scales of which vLLM finds every
// bit again, and no INT4 cache with what serves it alone: N, S, powers of two in V.
Recipe preset_recipe(const std::string& name, Target target = Target::fireq);
// JSON with a "preset" to start from and any keys below it. Unknown keys, types and ranges are refused,
// naming the key and the nearest valid one, and so is a key that the recipe's target cannot run
// (Error(usage)). `target` is that of a recipe that has no key "for".
Recipe parse_recipe(const std::string& json_text, const std::string& path_for_errors,
                    Target target = Target::fireq);
std::string recipe_to_json(const Recipe& recipe);  // canonical: sorted keys, every key present
// The recipe with the keys "weights" of an override in place of its own.
Recipe with_weight_keys(Recipe recipe, const std::string& weights_json);
std::string precision_name(formats::ModulePrecision precision);  // as in a recipe
// The JSON Schema (2020-12) of a recipe, from the same table of keys that parse_recipe uses. What depends on
// two keys together is parse_recipe's alone.
std::string recipe_schema();

}  // namespace fireq::calib
