#include <filesystem>
#include <set>
#include <string>
#include <utility>

#include "calib/folding.hpp"
#include "common/error.hpp"

namespace fireq::calib {
namespace {

class FoldedWeights final : public ForwardingWeights {
 public:
  FoldedWeights(const WeightSource& original, Recipe recipe, formats::CalibrationStatistics statistics,
                const formats::QuantizationConfig& folder)
      : ForwardingWeights(original),
        recipe_(std::move(recipe)),
        statistics_(std::move(statistics)),
        ignored_(folder.ignore.begin(), folder.ignore.end()) {}

  LayerWeights load_layer(std::uint64_t layer, int threads) const override {
    LayerWeights weights = inner().load_layer(layer, threads);
    fold_layer(config(), recipe_, statistics_.layers.empty() ? nullptr : &statistics_.layers.at(layer),
               weights);
    // Inputs as in the folder.
    const auto names = formats::linear_names(layer);
    for (std::size_t i = 0; i < kLinears; ++i) weights.linear[i].plain_input = ignored_.contains(names[i]);
    return weights;
  }

 private:
  Recipe recipe_;
  formats::CalibrationStatistics statistics_;
  std::set<std::string> ignored_;
};

}  // namespace

std::unique_ptr<WeightSource> fold_like(const WeightSource& original, const std::string& fireq_folder,
                                        const formats::QuantizationConfig& quantization) {
  Recipe recipe = parse_recipe(quantization.recipe_json, fireq_folder + "/config.json");
  const std::string fingerprint = original.reader().fingerprint(0);
  if (!quantization.source_fingerprint.empty() && quantization.source_fingerprint != fingerprint) {
    throw Error(ErrorKind::input, "the FireQ folder was made from another model")
        .path(fireq_folder)
        .expected("source fingerprint " + quantization.source_fingerprint)
        .found(fingerprint + " of " + original.reader().folder());
  }
  formats::CalibrationStatistics statistics;
  if (recipe.needs_statistics()) {
    const std::string path = fireq_folder + "/calibration.h5";
    if (!std::filesystem::exists(path)) {
      throw Error(ErrorKind::input, "calibration.h5 is missing: the recipe's folds cannot be made again")
          .path(path)
          .hint("copy it beside the folder's config.json");
    }
    statistics = formats::read_statistics(path);
    if (statistics.layers.size() != original.config().layers) {
      throw Error(ErrorKind::input, "statistics do not cover the model's layers")
          .path(path)
          .expected(std::to_string(original.config().layers))
          .found(std::to_string(statistics.layers.size()));
    }
  }
  return std::make_unique<FoldedWeights>(original, std::move(recipe), std::move(statistics), quantization);
}

void require_same_shape(const formats::ModelConfig& model, const formats::ModelConfig& reference,
                        const std::string& reference_path) {
  const auto compare = [&](const char* what, std::uint64_t a, std::uint64_t b) {
    if (a == b) return;
    throw Error(ErrorKind::input, std::string("reference is not the same model: ") + what + " differs")
        .path(reference_path)
        .expected(std::to_string(a))
        .found(std::to_string(b));
  };
  compare("number of layers", model.layers, reference.layers);
  compare("hidden size", model.hidden, reference.hidden);
  compare("ffn size", model.ffn, reference.ffn);
  compare("number of heads", model.heads, reference.heads);
  compare("number of KV heads", model.kv_heads, reference.kv_heads);
  compare("head size", model.head_dim, reference.head_dim);
  compare("vocabulary", model.vocab, reference.vocab);
}

}  // namespace fireq::calib
