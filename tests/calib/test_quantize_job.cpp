// The quantize job: the same bytes whatever runs it, a plan that tells the truth, inputs that do not fit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <map>
#include <random>

#include "calib/evaluate.hpp"
#include "calib/quantize_job.hpp"
#include "common/error.hpp"
#include "libquant/row_kernels.hpp"
#include "tests/calib/random_model.hpp"
#include "tests/calib/support.hpp"

namespace fireq::calib {
namespace {

namespace fs = std::filesystem;
using testing_support::RandomModel;

using Files = std::map<std::string, std::vector<char>>;

Files files_of(const fs::path& folder) {
  Files out;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file()) out[fs::relative(entry.path(), folder)] = test::read_bytes(entry.path());
  }
  return out;
}

// Names of the files that differ: a message of use, where whole files would not be.
std::vector<std::string> differing(const Files& a, const Files& b) {
  std::vector<std::string> names;
  for (const auto& [name, bytes] : a) {
    if (!b.contains(name) || b.at(name) != bytes) names.push_back(name);
  }
  for (const auto& [name, bytes] : b) {
    if (!a.contains(name)) names.push_back(name);
  }
  return names;
}

Windows random_windows(std::uint64_t count, std::uint64_t length, std::uint64_t vocab) {
  std::mt19937_64 random(11);
  Windows windows{std::vector<std::int32_t>(count * length), count, length};
  for (auto& id : windows.ids) id = static_cast<std::int32_t>(random() % vocab);
  return windows;
}

QuantizeOptions options_for(const std::string& preset, const Windows& windows) {
  QuantizeOptions options;
  options.recipe = preset_recipe(preset);
  if (options.recipe.needs_statistics()) options.calibration = windows;
  options.tool_version = "test";
  options.threads = 2;
  return options;
}

QuantizeResult quantize(const fs::path& model, const fs::path& out, QuantizeOptions options) {
  options.out = out.string();
  Progress silent;
  return quantize_model(*open_weights(model.string()), options, formats::real_file_system(), silent);
}

// Sizes that are no multiples of 128 or of a task's rows; rows for several tasks.
const RandomModel kLlama{.hidden = 144,
                         .ffn = 200,
                         .heads = 6,
                         .kv_heads = 2,
                         .head_dim = 24,
                         .attention_bias = true,
                         .mlp_bias = true,
                         .dtype = "BF16",
                         .seed = 21};
const RandomModel kQwen3{.model_type = "qwen3",
                         .hidden = 96,
                         .ffn = 260,
                         .layers = 3,
                         .heads = 4,
                         .kv_heads = 4,
                         .head_dim = 32,
                         .tied = true,
                         .dtype = "F16",
                         .seed = 22};

class QuantizeJob : public testing::TestWithParam<const char*> {};

TEST_P(QuantizeJob, ThreadsDoNotChangeAByte) {
  for (const RandomModel& shape : {kLlama, kQwen3}) {
    const test::TempFolder folder;
    const fs::path model = folder.path() / "model";
    write_random_model(model, shape);
    QuantizeOptions options = options_for(GetParam(), random_windows(5, 70, shape.vocab));
    Files first;
    for (const int threads : {1, 2, 7}) {
      options.threads = threads;
      const fs::path out = folder.path() / std::to_string(threads);
      quantize(model, out, options);
      const Files files = files_of(out);
      ASSERT_TRUE(files.contains("model.safetensors"));
      if (threads == 1) first = files;
      EXPECT_THAT(differing(first, files), testing::IsEmpty()) << shape.model_type << " " << threads;
    }
  }
}

// The instruction set does not change a byte: statistics given, each table of inner loops, the plain one
// among them.
TEST_P(QuantizeJob, InstructionSetsDoNotChangeAByte) {
  for (const RandomModel& shape : {kLlama, kQwen3}) {
    const test::TempFolder folder;
    const fs::path model = folder.path() / "model";
    write_random_model(model, shape);
    QuantizeOptions options = options_for(GetParam(), random_windows(4, 64, shape.vocab));
    if (options.calibration) {
      const auto source = open_weights(model.string());
      Progress silent;
      auto statistics = calibrate(*source, *options.calibration, 2, silent);
      statistics.meta.model_fingerprint = source->reader().fingerprint(1);
      statistics.meta.text_fingerprint = fingerprint_of_windows(*options.calibration);
      options.statistics_path = (folder.path() / "statistics.h5").string();
      options.calibration.reset();
      formats::write_statistics(formats::real_file_system(), *options.statistics_path, statistics);
    }
    const std::vector<const libquant::RowKernels*> tables = libquant::available_kernels();
    ASSERT_FALSE(tables.empty());
    Files plain;
    for (const libquant::RowKernels* table : tables) {
      libquant::use_kernels(table);
      const fs::path out = folder.path() / std::string("out-").append(table->name);
      quantize(model, out, options);
      libquant::use_kernels(nullptr);
      const Files files = files_of(out);
      if (table == tables.front()) plain = files;
      EXPECT_THAT(differing(plain, files), testing::IsEmpty()) << table->name;
    }
  }
}

TEST_P(QuantizeJob, ThePlanIsWhatIsWritten) {
  for (const auto layout : {formats::WeightLayout::row, formats::WeightLayout::sm90}) {
    for (const RandomModel& shape : {kLlama, kQwen3}) {
      const test::TempFolder folder;
      const fs::path model = folder.path() / "model";
      write_random_model(model, shape);
      QuantizeOptions options = options_for(GetParam(), random_windows(3, 40, shape.vocab));
      options.layout = layout;
      const QuantizePlan plan = plan_quantization(*open_weights(model.string()), options);
      const QuantizeResult result = quantize(model, folder.path() / "out", options);
      EXPECT_EQ(plan.bytes_after, result.bytes_after);
      EXPECT_EQ(plan.bytes_after, open_weights((folder.path() / "out").string())->reader().total_bytes());
      EXPECT_EQ(plan.linears.size(), 7 * shape.layers);
      const std::uint64_t layer = sizeof(float) * shape.hidden *
                                  (2 * (shape.heads + shape.kv_heads) * shape.head_dim + 3 * shape.ffn);
      const std::uint64_t activations =
          options.calibration ? sizeof(float) * 3 * 40 * shape.hidden : std::uint64_t{0};
      EXPECT_EQ(plan.largest_layer_fp32, layer);
      EXPECT_EQ(plan.calibration_bytes, activations);
      EXPECT_EQ(plan.peak_memory, 2 * layer + activations + 200'000'000);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Presets, QuantizeJob, testing::Values("rtn", "paper", "fast"),
                         [](const auto& instance) { return std::string(instance.param); });

TEST(QuantizeJobInput, AStatisticsFileGivesTheBytesOfCalibratingHere) {
  const test::TempFolder folder;
  const fs::path model = folder.path() / "model";
  write_random_model(model, kLlama);
  QuantizeOptions options = options_for("fast", random_windows(4, 64, kLlama.vocab));
  options.seed = 9;
  quantize(model, folder.path() / "here", options);
  options.calibration.reset();
  options.statistics_path = (folder.path() / "here" / "calibration.h5").string();
  quantize(model, folder.path() / "there", options);
  EXPECT_THAT(differing(files_of(folder.path() / "here"), files_of(folder.path() / "there")),
              testing::IsEmpty());
}

std::string error_of(ErrorKind kind, const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), kind) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

TEST(QuantizeJobInput, WhatDoesNotFitIsRefused) {
  using testing::HasSubstr;
  const test::TempFolder folder;
  const fs::path model = folder.path() / "model";
  const fs::path other = folder.path() / "other";
  write_random_model(model, kLlama);
  RandomModel changed = kLlama;
  changed.seed += 1;
  write_random_model(other, changed);
  const fs::path out = folder.path() / "out";
  QuantizeOptions options = options_for("fast", random_windows(2, 40, kLlama.vocab));
  quantize(model, out, options);

  EXPECT_THAT(error_of(ErrorKind::usage, [&] { quantize(out, folder.path() / "again", options); }),
              HasSubstr("FireQ checkpoint already"));
  QuantizeOptions bare = options;
  bare.calibration.reset();
  EXPECT_THAT(error_of(ErrorKind::usage, [&] { quantize(model, folder.path() / "bare", bare); }),
              testing::AllOf(HasSubstr("'fast' needs calibration text"), HasSubstr("--stats")));
  QuantizeOptions foreign = bare;
  foreign.statistics_path = (out / "calibration.h5").string();
  EXPECT_THAT(error_of(ErrorKind::input, [&] { quantize(other, folder.path() / "foreign", foreign); }),
              testing::AllOf(HasSubstr("another model"), HasSubstr("calibration.h5")));
  for (const char* name : {"again", "bare", "foreign"})
    EXPECT_FALSE(fs::exists(folder.path() / name)) << name;
}

// A model in F32 whose last weight, of the last layer's down_proj, is `weight`.
RandomModel write_model_ending_in(float weight, const fs::path& model) {
  RandomModel shape = kLlama;
  shape.dtype = "F32";
  shape.mlp_bias = false;  // so that down_proj's weight is the file's end
  write_random_model(model, shape);
  std::fstream file(model / "model.safetensors", std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(-4, std::ios::end);
  file.write(reinterpret_cast<const char*>(&weight), sizeof(weight));
  return shape;
}

TEST(QuantizeJobInput, WeightsThatAPerTensorScaleCutsOffAreCountedAndNamed) {
  struct Warnings final : Progress {
    void warning(std::string_view line) override { lines.emplace_back(line); }
    std::vector<std::string> lines;
  };
  for (const float weight : {448.0F, 448.5F}) {
    for (const bool folded : {false, true}) {
      const test::TempFolder folder;
      const RandomModel shape = write_model_ending_in(weight, folder.path() / "model");
      QuantizeOptions options = options_for(folded ? "paper" : "rtn", random_windows(2, 40, shape.vocab));
      options.recipe.lambda3 = false;  // it would shrink the column
      options.recipe.weights.row_scale = libquant::RowScale::tensor;
      options.out = (folder.path() / "out").string();
      Warnings progress;
      const QuantizeResult result = quantize_model(*open_weights((folder.path() / "model").string()), options,
                                                   formats::real_file_system(), progress);
      const bool over = weight > 448;
      EXPECT_EQ(result.saturated_groups, over ? 1U : 0U) << folded;
      ASSERT_EQ(progress.lines.size(), over ? 1U : 0U) << folded;
      if (over) {
        EXPECT_THAT(progress.lines[0], testing::AllOf(testing::HasSubstr("layers.1.mlp.down_proj.weight"),
                                                      testing::HasSubstr("1 group")));
      }
    }
  }
}

TEST(QuantizeJobInput, AWeightThatIsNoNumberIsNamed) {
  for (const char* preset : {"rtn", "fast"}) {
    const test::TempFolder folder;
    const fs::path model = folder.path() / "model";
    const RandomModel shape = write_model_ending_in(std::numeric_limits<float>::quiet_NaN(), model);
    const QuantizeOptions options = options_for(preset, random_windows(2, 40, shape.vocab));
    const std::string line =
        error_of(ErrorKind::input, [&] { quantize(model, folder.path() / "out", options); });
    EXPECT_THAT(line, testing::AllOf(testing::HasSubstr("model.layers.1.mlp.down_proj.weight"),
                                     testing::HasSubstr("NaN"), testing::HasSubstr("model.safetensors")))
        << preset;
    EXPECT_FALSE(fs::exists(folder.path() / "out"));
  }
}

}  // namespace
}  // namespace fireq::calib
