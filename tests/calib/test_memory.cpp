// Peak resident memory of the command, measured from outside: long contexts, and the bound of `quantize`.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <iostream>
#include <random>

#include "tests/calib/measured_run.hpp"
#include "tests/calib/random_model.hpp"
#include "tests/calib/support.hpp"

namespace fireq::calib {
namespace {

using test::measured_run;
using test::MeasuredRun;
using testing_support::RandomModel;

constexpr std::uint64_t kMegabyte = 1'000'000;

// In a process of its own: its memory must not count as this one's.
void write_model(const std::filesystem::path& folder, const RandomModel& model) {
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    try {
      testing_support::write_random_model(folder, model);
    } catch (...) {
      ::_exit(1);
    }
    ::_exit(0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_EQ(status, 0);
}

std::string write_tokens(const std::filesystem::path& path, std::uint64_t count, std::uint64_t vocab) {
  std::mt19937_64 random(7);
  std::ofstream file(path, std::ios::binary);
  for (std::uint64_t i = 0; i < count; ++i) {
    const auto id = static_cast<std::uint32_t>(random() % vocab);
    file.write(reinterpret_cast<const char*>(&id), sizeof(id));
  }
  return path.string();
}

TEST(Memory, TheMeasurementStartsLow) {
  const MeasuredRun run = measured_run({FIREQ_BINARY, "--version"});
  EXPECT_EQ(run.exit_code, 0);
  EXPECT_LT(run.peak_resident, 80 * kMegabyte);
}

// One head's scores of 8192 tokens would be 268 MB.
TEST(Memory, AttentionGrowsLinearlyWithTheContext) {
  const test::TempFolder folder;
  const std::string model = std::string(FIREQ_TEST_DATA) + "/models/stories260K";
  const std::string tokens = write_tokens(folder.path() / "ids.u32", 8192, 512);
  const auto peak = [&](std::uint64_t context) {
    const MeasuredRun run =
        measured_run({FIREQ_BINARY, "eval", model, "--tokens", tokens, "--ctx", std::to_string(context),
                      "--bos", "none", "--threads", "2", "--quiet"});
    EXPECT_EQ(run.exit_code, 0);
    return run.peak_resident;
  };
  // Windows of one length are run in batches of 8192 tokens: the activations are the same, only the length
  // of what a token sees differs.
  const std::uint64_t small = peak(512);
  const std::uint64_t large = peak(8192);
  std::cout << "peak " << small / kMegabyte << " MB with windows of 512, " << large / kMegabyte
            << " MB with one of 8192\n";
  EXPECT_LT(large, small + 10 * kMegabyte);
  EXPECT_LT(large, 120 * kMegabyte);
}

struct Bound {
  std::uint64_t layer = 0, activations = 0, fixed = 200 * kMegabyte;
  std::uint64_t total() const { return 2 * layer + activations + fixed; }
};

Bound bound_of(const RandomModel& m, std::uint64_t calibration_tokens) {
  const std::uint64_t q = m.heads * m.head_dim;
  const std::uint64_t kv = m.kv_heads * m.head_dim;
  return {.layer = sizeof(float) * m.hidden * (2 * q + 2 * kv + 3 * m.ffn),
          .activations = sizeof(float) * m.hidden * calibration_tokens};
}

void expect_within(const std::string& model, const std::vector<std::string>& options, const Bound& bound) {
  const test::TempFolder folder;
  std::vector<std::string> arguments{
      FIREQ_BINARY, "quantize", model, "-o", (folder.path() / "out").string(), "--threads", "2", "--quiet"};
  arguments.insert(arguments.end(), options.begin(), options.end());
  const MeasuredRun run = measured_run(arguments);
  ASSERT_EQ(run.exit_code, 0);
  std::cout << options[1] << ": peak " << run.peak_resident / kMegabyte << " MB, bound "
            << bound.total() / kMegabyte << " MB\n";
  EXPECT_LE(run.peak_resident, bound.total());
}

// Many layers: held or left mapped all together they would break the bound.
TEST(QuantizeMemory, DoesNotGrowWithTheNumberOfLayers) {
  const RandomModel shape{
      .hidden = 1024, .ffn = 4096, .layers = 7, .heads = 16, .kv_heads = 4, .head_dim = 64, .context = 512};
  const test::TempFolder folder;
  const std::filesystem::path model = folder.path() / "model";
  write_model(model, shape);
  const std::string tokens = write_tokens(folder.path() / "ids.u32", 1024, shape.vocab);
  ASSERT_GT(std::filesystem::file_size(model / "model.safetensors"),
            bound_of(shape, 1024).total() + 80 * kMegabyte);
  expect_within(model.string(), {"--preset", "rtn"}, bound_of(shape, 0));
  expect_within(model.string(), {"--preset", "fast", "--tokens", tokens, "--samples", "2", "--length", "512"},
                bound_of(shape, 1024));
}

// One wide layer, without the bound's fixed share: a third copy of it would break this.
TEST(QuantizeMemory, HoldsAtMostTwoCopiesOfALayer) {
  const RandomModel shape{.hidden = 2048,
                          .ffn = 9216,
                          .layers = 1,
                          .heads = 16,
                          .kv_heads = 16,
                          .head_dim = 128,
                          .context = 512,
                          .dtype = "BF16"};
  const test::TempFolder folder;
  const std::filesystem::path model = folder.path() / "model";
  write_model(model, shape);
  const std::string tokens = write_tokens(folder.path() / "ids.u32", 256, shape.vocab);
  Bound bound = bound_of(shape, 256);
  bound.fixed = 0;
  ASSERT_GT(bound.layer, 280 * kMegabyte);
  expect_within(model.string(),
                {"--preset", "paper", "--tokens", tokens, "--samples", "1", "--length", "256"}, bound);
}

// Long calibration: a second copy of the activations would break the bound.
TEST(QuantizeMemory, HoldsTheActivationsOnce) {
  const RandomModel shape{
      .hidden = 1024, .ffn = 64, .heads = 4, .kv_heads = 2, .head_dim = 16, .context = 512};
  constexpr std::uint64_t kSamples = 128;
  constexpr std::uint64_t kTokens = kSamples * 512;
  const test::TempFolder folder;
  const std::filesystem::path model = folder.path() / "model";
  write_model(model, shape);
  const std::string tokens = write_tokens(folder.path() / "ids.u32", kTokens, shape.vocab);
  const Bound bound = bound_of(shape, kTokens);
  ASSERT_GT(bound.activations, bound.fixed + 60 * kMegabyte);
  expect_within(
      model.string(),
      {"--preset", "fast", "--tokens", tokens, "--samples", std::to_string(kSamples), "--length", "512"},
      bound);
}

TEST(QuantizeMemory, SmolLM2) {
  const char* const model = std::getenv("FIREQ_SMOLLM2_DIR");
  if (model == nullptr) GTEST_SKIP() << "set FIREQ_SMOLLM2_DIR, or run scripts/test --smollm2";
  const RandomModel shape{
      .hidden = 576, .ffn = 1536, .layers = 30, .heads = 9, .kv_heads = 3, .head_dim = 64};
  const test::TempFolder folder;
  const std::string tokens = write_tokens(folder.path() / "ids.u32", 2048, 49152);
  expect_within(model, {"--preset", "fast", "--tokens", tokens, "--samples", "4", "--length", "512"},
                bound_of(shape, 2048));
}

}  // namespace
}  // namespace fireq::calib
