#include "calib/model_card.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "calib/own_text.hpp"

namespace fireq::calib {
namespace {

std::string megabytes(std::uint64_t bytes) {
  const std::uint64_t tenths = (bytes + 50'000) / 100'000;
  return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " MB";
}

std::string with_error(double value, double error) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), "%.4f +- %.4f", value, error);
  return text.data();
}

// Empty where it wrote none.
std::string own_text(const formats::ModelConfig& model, const Recipe& recipe, const Windows* calibration) {
  if (!recipe.curvature || calibration == nullptr) return {};
  const std::uint64_t own = own_text_windows(model, *calibration, recipe.own_text);
  if (own == 0) return {};
  std::array<char, 16> share{};
  std::snprintf(share.data(), share.size(), "%.1f %%",
                100 * static_cast<double>(own) / static_cast<double>(own + calibration->count));
  return std::to_string(own) + " windows of " + std::to_string(calibration->length) + ", " +
         std::to_string(own * calibration->length) + " tokens, " + share.data() + " of all";
}

}  // namespace

std::string model_card(const formats::ModelConfig& model, const QuantizePlan& plan, const Recipe& recipe,
                       const formats::QuantizationConfig& q, const Windows* calibration) {
  std::string text = "---\nlibrary_name: fireq\ntags:\n- fireq\n- int4\n- fp8\n---\n\n# A " +
                     model.model_type + " model with 4-bit weights\n\n" + std::to_string(model.layers) +
                     " layers of " + std::to_string(model.hidden) + " channels. Made by `fireq` " +
                     q.tool_version + ", preset `" + recipe.preset + "`.\n\n| | |\n|---|---|\n";
  const auto row = [&](const std::string& what, const std::string& value) {
    text.append("| ").append(what).append(" | ").append(value).append(" |\n");
  };
  row("tensors", megabytes(plan.bytes_after) + " (before: " + megabytes(plan.bytes_before) + ")");
  row("weights of the decoder layers' linears",
      std::string("4 bits in groups of ") + std::to_string(q.group_size) +
          " with FP8 scales and a scale for each " + (q.row_scale_per_row ? "row" : "tensor") + ", " +
          (q.levels_int4 ? "integer" : "other") + " levels");
  const auto named = [](const std::vector<std::string>& modules) {
    std::string list = std::to_string(modules.size()) + " modules: ";
    constexpr std::size_t kMost = 4;
    for (std::size_t i = 0; i < std::min(kMost, modules.size()); ++i) {
      list.append(i == 0 ? "" : ", ").append("`").append(modules[i]).append("`");
    }
    return modules.size() > kMost ? list + ", ..." : list;
  };
  if (!q.fp8.empty()) row("weights in FP8 (E4M3) with a scale for each row", named(q.fp8));
  if (!q.ignore.empty()) row("linears in the original's type", named(q.ignore));
  row("activations", "FP8 (E4M3), a scale for each token");
  row("KV cache", q.kv_cache ? "INT4" : "not calibrated for INT4");
  row("layout of the codes", q.layout == formats::WeightLayout::row ? "row" : "sm90");
  if (q.calibration_tokens > 0) row("calibrated on", std::to_string(q.calibration_tokens) + " tokens");
  if (const std::string own = own_text(model, recipe, calibration); !own.empty()) {
    row("rounded on text that the original wrote itself, too", own);
  }
  if (q.measured) {
    row("nll per token on " + std::to_string(q.measured->tokens) + " tokens held back from calibration",
        with_error(q.measured->delta_nll, q.measured->delta_nll_stderr) + " over the original's; KL to it " +
            with_error(q.measured->kl, q.measured->kl_stderr));
  }
  if (!q.source_fingerprint.empty())
    row("fingerprint of the original's tensors", "`" + q.source_fingerprint + "`");
  if (!q.calibration_fingerprint.empty())
    row("fingerprint of the calibration tokens", "`" + q.calibration_fingerprint + "`");
  text +=
      "\n    fireq eval THIS_FOLDER --text test.txt --reference ORIGINAL\n"
      "    fireq validate THIS_FOLDER --reference ORIGINAL\n"
      "    fireq generate THIS_FOLDER -p \"Once upon a time\"\n\n"
      "The licence of the original model holds for this one too.\n\n## Recipe\n\n```json\n";
  text += nlohmann::json::parse(q.recipe_json).dump(2) + "\n```\n";
  return text;
}

}  // namespace fireq::calib
