// What choosing precisions measures: divergences of many models at once, and how the search reports its way.
#include <gtest/gtest.h>

#include <cmath>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "calib/plan.hpp"
#include "calib/scoring.hpp"
#include "calib/weights.hpp"
#include "tests/calib/random_model.hpp"

namespace fireq::calib {
namespace {

using test::TempFolder;
using testing_support::RandomModel;

std::vector<float> normal_values(std::size_t count, std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  std::vector<float> out(count);
  for (float& value : out) value = normal(random);
  return out;
}

// KL of rows of logits [rows, vocab] in FP64, by its definition.
double mean_kl(const std::vector<float>& reference, const std::vector<float>& model, std::size_t vocab) {
  const auto log_sum = [&](const std::vector<float>& x, std::size_t row) {
    double sum = 0;
    for (std::size_t v = 0; v < vocab; ++v) sum += std::exp(static_cast<double>(x[row * vocab + v]));
    return std::log(sum);
  };
  double total = 0;
  const std::size_t rows = reference.size() / vocab;
  for (std::size_t row = 0; row < rows; ++row) {
    const double a = log_sum(reference, row), b = log_sum(model, row);
    for (std::size_t v = 0; v < vocab; ++v) {
      const double p = static_cast<double>(reference[row * vocab + v]) - a;
      total += std::exp(p) * (p - (static_cast<double>(model[row * vocab + v]) - b));
    }
  }
  return total / static_cast<double>(rows);
}

TEST(Sensitivity, ManyDivergencesAreThoseOfEachAlone) {
  const TempFolder folder;
  RandomModel shape;
  shape.vocab = 700;  // three parts of a head that is read in parts, the last one short
  testing_support::write_random_model(folder.path(), shape);
  const auto source = open_weights(folder.path().string());
  std::mt19937_64 random(11);
  constexpr std::size_t kRows = 150;  // a block of rows and a part of one
  const std::vector<float> base = normal_values(kRows * shape.hidden, random);
  std::vector<std::vector<float>> models;
  for (std::size_t m = 0; m < 5; ++m) {
    models.push_back(base);
    const std::vector<float> noise = normal_values(base.size(), random);
    for (std::size_t i = 0; i < base.size(); ++i) models[m][i] += static_cast<float>(m) * 0.1F * noise[i];
  }
  const std::vector<std::int32_t> targets(kRows, 3);
  for (const bool keep : {true, false}) {
    for (const int threads : {1, 3}) {
      OutputHead head(*source, keep, 256, threads);
      const std::vector<double> together = mean_divergences(head, models, base, threads);
      ASSERT_EQ(together.size(), models.size());
      std::vector<float> reference(kRows * shape.vocab, -1e30F);
      write_logits(head, base, reference, threads);
      for (std::size_t m = 0; m < models.size(); ++m) {
        double alone = 0;
        for (const TokenScore& s : score_tokens(head, models[m], head, base, targets, threads)) alone += s.kl;
        EXPECT_EQ(together[m], alone / kRows) << "model " << m;
        std::vector<float> logits(kRows * shape.vocab, 1e30F);
        write_logits(head, models[m], logits, threads);
        const double expected = mean_kl(reference, logits, shape.vocab);
        EXPECT_NEAR(together[m], expected, 1e-6 + 1e-4 * expected) << "model " << m;
        if (m > 0) {
          EXPECT_GT(together[m], together[m - 1]);
        }
      }
      EXPECT_TRUE(mean_divergences(head, {}, base, threads).empty());
    }
  }
}

// Stages with their totals and what they came to.
class Recorder : public Progress {
 public:
  struct Stage {
    std::string name;
    std::uint64_t total = 0, done = 0, steps = 0;
    bool ended = false;
  };
  void begin(std::string_view stage, std::uint64_t total) override {
    stages.push_back({std::string(stage), total, 0, 0, false});
  }
  void advance(std::uint64_t done) override {
    EXPECT_GE(done, stages.back().done);
    EXPECT_LE(done, stages.back().total) << stages.back().name;
    stages.back().done = done;
    ++stages.back().steps;
  }
  void end() override { stages.back().ended = true; }
  std::vector<Stage> stages;
};

TEST(Sensitivity, TheSearchReportsItsWay) {
  const TempFolder folder;
  RandomModel shape;
  shape.hidden = 128;
  shape.ffn = 256;
  shape.heads = 4;
  shape.head_dim = 32;
  testing_support::write_random_model(folder.path(), shape);
  const auto source = open_weights(folder.path().string());
  QuantizeOptions options;
  options.recipe = preset_recipe("rtn");
  std::mt19937_64 random(12);
  Windows windows{{}, 4, 32};
  for (std::size_t i = 0; i < 128; ++i)
    windows.ids.push_back(static_cast<std::int32_t>(random() % shape.vocab));
  options.calibration = windows;
  const auto plan_for = [&](PrecisionGoal goal, Recorder& recorder) {
    QuantizeOptions own = options;
    return plan_precisions(*source, own, goal, recorder);
  };
  Recorder first;
  PrecisionGoal goal;
  goal.kl = 100;
  const double most = plan_for(goal, first).kl;
  goal.kl = most / 3;
  Recorder recorder;
  const PrecisionPlan plan = plan_for(goal, recorder);
  EXPECT_LE(plan.kl, most / 3);
  EXPECT_GT(plan.kl, 0);
  ASSERT_EQ(recorder.stages.size(), 2U);
  EXPECT_EQ(recorder.stages[0].name, "measure");
  EXPECT_EQ(recorder.stages[0].done, recorder.stages[0].total);
  EXPECT_EQ(recorder.stages[1].name, "search");
  // Halving 14 linears in two steps each takes four or five looks, beside the first.
  EXPECT_GE(recorder.stages[1].steps, 4U);
  EXPECT_GE(recorder.stages[1].total, recorder.stages[1].steps);
  EXPECT_LE(recorder.stages[1].total, recorder.stages[1].steps + 2);
  for (const Recorder::Stage& stage : recorder.stages) EXPECT_TRUE(stage.ended) << stage.name;
  EXPECT_GT(plan.memory, kFixedMemory);

  Recorder by_size;
  PrecisionGoal size;
  size.size = plan.bytes + 60'000;
  plan_for(size, by_size);
  ASSERT_EQ(by_size.stages.size(), 2U);
  EXPECT_EQ(by_size.stages[1].name, "check");
  EXPECT_EQ(by_size.stages[1].done, 1U);
}

}  // namespace
}  // namespace fireq::calib
