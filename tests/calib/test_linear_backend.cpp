// Linears that run behind the backend interface: with the kernels' CPU twin there, an evaluation gives the
// very bits of one without it; batches arrive whole; errors say what they say on the CPU.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "calib/evaluate.hpp"
#include "calib/quantize_job.hpp"
#include "common/error.hpp"
#include "tests/calib/random_model.hpp"
#include "tests/calib/support.hpp"
#include "tests/calib/twin_device.hpp"

namespace fireq::calib {
namespace {

using test::TempFolder;
using testing_support::RandomModel;

Windows random_windows(std::uint64_t count, std::uint64_t length, std::uint64_t vocab) {
  test::Random random(77);
  Windows out{{}, count, length};
  for (std::uint64_t i = 0; i < count * length; ++i)
    out.ids.push_back(static_cast<std::int32_t>(random.below(vocab)));
  return out;
}

// A folder with its original, quantised as a preset says.
class Packed {
 public:
  Packed(const RandomModel& shape, const std::string& preset, formats::WeightLayout layout) {
    write_random_model(folder_.path() / "model", shape);
    original = open_weights(folder_ / "model");
    QuantizeOptions options;
    options.out = folder_ / "out";
    options.recipe = preset_recipe(preset);
    if (options.recipe.needs_statistics()) options.calibration = random_windows(6, 50, shape.vocab);
    options.layout = layout;
    options.tool_version = "test";
    options.threads = 2;
    Progress silent;
    quantize_model(*original, options, formats::real_file_system(), silent);
    packed = open_weights(options.out);
  }
  std::unique_ptr<WeightSource> original, packed;

 private:
  TempFolder folder_;
};

// No size is a multiple of 128 or of a task's rows.
const RandomModel kBiased{.hidden = 144,
                          .ffn = 200,
                          .heads = 6,
                          .kv_heads = 2,
                          .head_dim = 24,
                          .attention_bias = true,
                          .mlp_bias = true,
                          .dtype = "BF16",
                          .seed = 31};
const RandomModel kQwen3{.model_type = "qwen3",
                         .hidden = 96,
                         .ffn = 260,
                         .layers = 3,
                         .heads = 4,
                         .kv_heads = 4,
                         .head_dim = 32,
                         .tied = true,
                         .seed = 32};

Precision precision_with(bool cache) {
  return {.fp8_activations = true, .int4_k = cache, .int4_v = cache, .fp8_q = true, .fp8_p = true};
}

EvaluationResult run(const WeightSource& model, const Windows& windows, const EvaluationOptions& options) {
  Progress silent;
  return evaluate(model, windows, options, silent);
}

TEST(LinearBackend, TheTwinGivesTheBitsOfTheForwardPass) {
  for (const auto& [shape, preset, layout] : {std::tuple{kBiased, "rtn", formats::WeightLayout::row},
                                              std::tuple{kBiased, "paper", formats::WeightLayout::sm90},
                                              std::tuple{kQwen3, "fast", formats::WeightLayout::row}}) {
    const Packed model(shape, preset, layout);
    const Windows windows = random_windows(5, 67, shape.vocab);  // 335 rows: blocks that are not full
    for (const bool cache : {false, true}) {
      SCOPED_TRACE(std::string(preset) + (cache ? ", INT4 cache" : ""));
      EvaluationOptions options;
      options.precision = precision_with(cache);
      options.reference = model.original.get();
      options.threads = 2;
      const EvaluationResult expected = run(*model.packed, windows, options);
      for (const int threads : {1, 3}) {
        test::TwinBackend backend;
        options.backend = &backend;
        options.threads = threads;
        const EvaluationResult got = run(*model.packed, windows, options);
        EXPECT_EQ(got.nll_per_token, expected.nll_per_token);
        EXPECT_EQ(*got.kl_mean, *expected.kl_mean);
        EXPECT_EQ(*got.kl_max, *expected.kl_max);
        EXPECT_EQ(backend.loads, 7 * shape.layers);
        // q, k and v together; o; gate and up together; down: each once a layer, on all rows.
        EXPECT_EQ(backend.rows.size(), 4 * shape.layers);
        EXPECT_THAT(backend.rows, testing::Each(windows.count * windows.length));
      }
    }
  }
}

// What the backend computes is what counts: a fault in one linear of one layer shows.
TEST(LinearBackend, ItsOutputsAreUsed) {
  const Packed model(kBiased, "rtn", formats::WeightLayout::row);
  const Windows windows = random_windows(3, 40, kBiased.vocab);
  EvaluationOptions options;
  options.precision = precision_with(true);
  const double expected = run(*model.packed, windows, options).nll_per_token;
  for (std::size_t broken = 0; broken < kLinears; ++broken) {
    test::TwinBackend backend;
    backend.after_multiply = [&](std::uint64_t layer, LinearIndex which, std::span<std::uint16_t> y) {
      if (layer == 1 && which == broken)
        for (std::uint16_t& v : y) v ^= 0x8000U;  // minus
    };
    options.backend = &backend;
    EXPECT_GT(std::fabs(run(*model.packed, windows, options).nll_per_token - expected), 1e-6) << broken;
  }
}

// A folder may leave linears unquantised: those run on the CPU, among the backend's.
class PartlyQuantised final : public ForwardingWeights {
 public:
  // plain: some of those linears take inputs in 16 bits.
  explicit PartlyQuantised(const WeightSource& inner, bool plain = false)
      : ForwardingWeights(inner), plain_(plain) {}
  LayerWeights load_layer(std::uint64_t layer, int threads) const override {
    LayerWeights out = inner().load_layer(layer, threads);
    for (const LinearIndex i : {kK, kUp}) out.linear[i].plain_input = plain_;
    return out;
  }
  LayerWeights load_unquantized(std::uint64_t layer, int threads) const override {
    LayerWeights out = inner().load_unquantized(layer, threads);
    LayerWeights all = load_layer(layer, threads);
    for (const LinearIndex i : {kK, kO, kUp}) out.linear[i] = std::move(all.linear[i]);
    return out;
  }
  libquant::QuantizedLinear quantized(std::uint64_t layer, std::size_t linear) const override {
    EXPECT_THAT(linear, testing::Not(testing::AnyOf(std::size_t{kK}, std::size_t{kO}, std::size_t{kUp})));
    return inner().quantized(layer, linear);
  }

 private:
  bool plain_;
};

// With k and up in 16 bits beside q, v and gate in FP8: the same bits with and without a backend, and others
// than with FP8 inputs for all.
TEST(LinearBackend, PlainInputsStayPlain) {
  const Packed model(kBiased, "rtn", formats::WeightLayout::row);
  const Windows windows = random_windows(4, 90, kBiased.vocab);
  EvaluationOptions options;
  options.precision = precision_with(true);
  options.threads = 2;
  const double fp8 = run(*model.packed, windows, options).nll_per_token;
  const double plain = run(PartlyQuantised(*model.packed, true), windows, options).nll_per_token;
  EXPECT_NE(fp8, plain);
  test::TwinBackend backend;
  options.backend = &backend;
  EXPECT_EQ(run(PartlyQuantised(*model.packed, true), windows, options).nll_per_token, plain);
}

TEST(LinearBackend, UnquantisedLinearsStayOnTheCpu) {
  const Packed model(kBiased, "rtn", formats::WeightLayout::row);
  const Windows windows = random_windows(4, 90, kBiased.vocab);
  EvaluationOptions options;
  options.precision = precision_with(true);
  options.threads = 2;
  const double expected = run(*model.packed, windows, options).nll_per_token;
  test::TwinBackend backend;
  options.backend = &backend;
  EXPECT_EQ(run(PartlyQuantised(*model.packed), windows, options).nll_per_token, expected);
  EXPECT_EQ(backend.loads, 4 * kBiased.layers);
  EXPECT_EQ(backend.rows.size(), 3 * kBiased.layers);  // o_proj alone has nothing left to do there
}

TEST(LinearBackend, RefusesWhatItCannotRun) {
  const Packed model(kBiased, "rtn", formats::WeightLayout::row);
  const Windows windows = random_windows(2, 20, kBiased.vocab);
  test::TwinBackend backend;
  EvaluationOptions options;
  options.backend = &backend;
  EXPECT_THROW(run(*model.packed, windows, options), Error);  // FP activations
  options.precision = precision_with(false);
  EXPECT_THROW(run(*model.original, windows, options), Error);  // weights that are not packed
  EXPECT_EQ(backend.loads, 0U);
}

TEST(LinearBackend, ItsErrorsAndNonFiniteOutputsAreReported) {
  const Packed model(kBiased, "rtn", formats::WeightLayout::row);
  const Windows windows = random_windows(2, 20, kBiased.vocab);
  test::TwinBackend backend;
  EvaluationOptions options;
  options.precision = precision_with(false);
  options.backend = &backend;
  backend.after_multiply = [](std::uint64_t layer, LinearIndex which, std::span<std::uint16_t> y) {
    if (layer == 1 && which == kUp) y[30 * kBiased.ffn + 5] = 0x7fc0;  // token 30: sequence 1, token 10
  };
  try {
    run(*model.packed, windows, options);
    ADD_FAILURE() << "NaN went through";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::input);
    EXPECT_THAT(e.what(), testing::HasSubstr("layer 1, down_in, sequence 1, token 10"));
    EXPECT_THAT(e.found(), testing::HasSubstr("NaN at channel 5"));
  }
  backend.after_multiply = [](std::uint64_t, LinearIndex, std::span<std::uint16_t>) {
    throw Error(ErrorKind::environment, "the device is gone");
  };
  try {
    run(*model.packed, windows, options);
    ADD_FAILURE() << "an error was swallowed";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::environment);
    EXPECT_THAT(e.what(), testing::HasSubstr("the device is gone"));
  }
}

}  // namespace
}  // namespace fireq::calib
