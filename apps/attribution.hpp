// The text that a FireQ folder is compared with its original on, and what validate and inspect say of its
// costs.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "apps/commands.hpp"
#include "calib/attribution.hpp"

namespace fireq::apps {

struct ComparisonText {
  TextArguments text;
  std::string bos;
  std::optional<std::uint64_t> ctx;
  std::uint64_t max_tokens = 8192;
};
void add_comparison_text_options(CLI::App& app, ComparisonText& arguments);
// At most max_tokens tokens in windows of ctx (by default the model's context, at most 2048).
calib::Windows comparison_windows(const ComparisonText& arguments, const std::string& folder,
                                  const formats::ModelConfig& config);

// `packed` is folder's, `original` the model it was made from. Keys scored, original_nll, all, parts, layers,
// linears; costs as delta_nll and kl.
nlohmann::json attribution_json(const calib::Attribution& a);
void print_attribution(const Report& report, const calib::Attribution& a);

}  // namespace fireq::apps
