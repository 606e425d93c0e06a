// Golden perplexities that take more than a moment: stories15M, and SmolLM2-135M where FIREQ_SMOLLM2_DIR is
// set.
#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/calib/golden.hpp"

namespace fireq::calib {
namespace {

std::string stories15m() {
  return (test::data_folder() / "models/stories15M").string();
}

TEST(GoldenLarge, Stories15MOnItsOwnText) {
  test::expect_golden_perplexity(test::golden_of("stories15M_tinystories"), stories15m(), 2);
}

TEST(GoldenLarge, Stories15MOnOtherProse) {
  test::expect_golden_perplexity(test::golden_of("stories15M_grimm"), stories15m(), 2);
}

TEST(GoldenLarge, SmolLM2) {
  const char* const folder = std::getenv("FIREQ_SMOLLM2_DIR");
  if (folder == nullptr) GTEST_SKIP() << "set FIREQ_SMOLLM2_DIR, or run scripts/test --smollm2";
  const nlohmann::json golden = test::golden_of("smollm2_wiki");
  test::expect_golden_logits(golden, folder, 2);
  test::expect_golden_perplexity(golden, folder, 2);
}

}  // namespace
}  // namespace fireq::calib
