// What Hugging Face transformers computed (tests/data/README.md), and the bounds within which we must agree.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "calib/dataset.hpp"
#include "calib/evaluate.hpp"
#include "formats/tokenizer.hpp"
#include "tests/calib/support.hpp"

namespace fireq::test {

inline constexpr double kPerplexityBound = 1e-4;  // relative
inline constexpr double kLogitBound = 2e-3;       // absolute

inline std::filesystem::path data_folder() {
  return FIREQ_TEST_DATA;
}

inline nlohmann::json golden_of(const std::string& name) {
  std::ifstream file(data_folder() / "golden/golden.json");
  for (const nlohmann::json& entry : nlohmann::json::parse(file)) {
    if (entry.at("name") == name) return entry;
  }
  throw std::runtime_error("golden.json has no " + name);
}

// Tokens of a golden's text as our tokenizer makes them, cut into windows.
inline calib::Windows golden_windows(const nlohmann::json& golden, const std::string& folder) {
  const std::string text = calib::load_text({.files = {data_folder() / "text" / golden.at("text")},
                                             .max_chars = golden.at("chars").get<std::uint64_t>()});
  const auto tokenizer = formats::open_tokenizer(folder);
  const std::vector<std::int32_t> ids = tokenizer->encode(text, false);
  const bool head = golden.at("bos") == "head";
  return calib::make_evaluation_windows(ids, golden.at("ctx").get<std::uint64_t>(),
                                        head ? calib::Bos::head : calib::Bos::none, tokenizer->bos_id);
}

inline void expect_golden_logits(const nlohmann::json& golden, const std::string& folder, int threads) {
  const auto model = calib::open_weights(folder);
  auto ids = golden.at("first_ids").get<std::vector<std::int32_t>>();
  const auto shape = golden.at("logits_shape").get<std::vector<std::uint64_t>>();
  ids.resize(shape[0]);
  const auto expected =
      read_array<float>(data_folder() / "golden" / (golden.at("name").get<std::string>() + ".logits.f32"));
  const std::vector<float> logits = calib::window_logits(*model, ids, {}, threads);
  ASSERT_EQ(expected.size(), shape[0] * shape[1]);
  ASSERT_EQ(logits.size(), expected.size());
  const double difference = largest_difference(expected, logits);
  std::cout << "logits differ by at most " << difference << "\n";
  EXPECT_LE(difference, kLogitBound);
}

inline void expect_golden_perplexity(const nlohmann::json& golden, const std::string& folder, int threads) {
  const auto model = calib::open_weights(folder);
  const calib::Windows windows = golden_windows(golden, folder);
  const auto first = golden.at("first_ids").get<std::vector<std::int32_t>>();
  ASSERT_EQ(std::vector<std::int32_t>(windows.ids.begin(),
                                      windows.ids.begin() + static_cast<std::ptrdiff_t>(first.size())),
            first);
  Progress silent;
  calib::EvaluationOptions options;
  options.threads = threads;
  const calib::EvaluationResult result = calib::evaluate(*model, windows, options, silent);
  EXPECT_EQ(result.windows, golden.at("windows").get<std::uint64_t>());
  EXPECT_EQ(result.scored, golden.at("scored").get<std::uint64_t>());
  const double expected = golden.at("ppl").get<double>();
  const double difference = std::fabs(result.ppl - expected) / expected;
  std::cout << "perplexity " << result.ppl << ", relative difference " << difference << "\n";
  EXPECT_LE(difference, kPerplexityBound);
}

}  // namespace fireq::test
