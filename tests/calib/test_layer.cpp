// One layer against its definition in double, with each precision switch; what must not change a bit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "common/error.hpp"
#include "tests/calib/reference_layer.hpp"

namespace fireq::calib {
namespace {

using formats::Site;
using test::Mistake;
using test::Random;
using test::ReferenceLayer;
using test::ReferenceResult;

formats::ModelConfig small_config() {
  formats::ModelConfig c;
  c.model_type = "llama";
  c.hidden = 24;
  c.ffn = 36;
  c.layers = 1;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_dim = 10;
  c.vocab = 50;
  c.context = 512;
  c.rms_eps = 1e-5;
  c.sliding_window = {0};
  return c;
}

struct Extras {
  bool bias = false, qk_norm = false, smoothing = false, row_scale = false, together = false;
};

LayerWeights random_layer(const formats::ModelConfig& c, Random& random, const Extras& extras) {
  LayerWeights w;
  for (std::size_t i = 0; i < kLinears; ++i) {
    LinearWeights& l = w.linear[i];
    l.rows = i == kQ ? c.q_rows() : i <= kV ? c.kv_rows() : i == kGate || i == kUp ? c.ffn : c.hidden;
    l.cols = i == kO ? c.q_rows() : i == kDown ? c.ffn : c.hidden;
    const double gain = i <= kK ? 1.6 : 1.0;  // attention that is neither flat nor one-hot
    l.weight = random.normals(l.rows * l.cols, gain / std::sqrt(static_cast<double>(l.cols)));
    if (extras.bias) l.bias = random.normals(l.rows, 0.3);
    if (extras.row_scale) {
      for (float& v : l.weight) v *= 50;
      l.row_scale = random.normals(i % 2 == 0 ? 1 : l.rows, 0.004);
      for (float& v : l.row_scale) v = 0.01F + std::fabs(v);
    }
  }
  const auto norm = [&](std::uint64_t n) {
    auto v = random.normals(n, 0.3);
    for (float& x : v) x += 1;
    return v;
  };
  w.attn_norm = norm(c.hidden);
  w.mlp_norm = norm(c.hidden);
  if (extras.qk_norm) {
    w.q_norm = norm(c.head_dim);
    w.k_norm = norm(c.head_dim);
    for (float& x : w.q_norm) x *= 1.5F;
  }
  if (extras.smoothing) {
    w.k_post_rope_scale.assign(c.kv_heads * c.head_dim, 1.0F);
    for (int i = 0; i < 4; ++i)
      w.k_post_rope_scale[random.below(c.kv_rows())] = 0.2F + std::fabs(random.normal());
    w.k_post_rope_shift = random.normals(c.kv_rows(), 0.5);
  }
  if (extras.together) {  // of moments of rank 6: far from what rounding to the nearest gives
    for (auto* rounding : {&w.k_rounding, &w.v_rounding}) {
      for (std::uint64_t g = 0; g < c.kv_heads; ++g) {
        const std::uint64_t d = c.head_dim;
        const std::vector<float> rows = random.normals(6 * d);
        std::vector<double> moment(d * d, 0.0);
        for (std::uint64_t i = 0; i < 6 * d * d; ++i) {
          const std::uint64_t r = i / (d * d), a = i / d % d, b = i % d;
          moment[a * d + b] += static_cast<double>(rows[r * d + a]) * static_cast<double>(rows[r * d + b]);
        }
        const std::vector<float> factor = libquant::kv_rounding(moment, d);
        rounding->insert(rounding->end(), factor.begin(), factor.end());
      }
    }
  }
  return w;
}

class Capture final : public ActivationObserver {
 public:
  void observe(Site site, std::span<const float> values, std::uint64_t rows,
               std::uint64_t channels) override {
    EXPECT_EQ(values.size(), rows * channels);
    auto& all = site_[static_cast<std::size_t>(site)];
    all.insert(all.end(), values.begin(), values.end());
  }
  const std::vector<float>& at(Site s) const { return site_[static_cast<std::size_t>(s)]; }

 private:
  std::array<std::vector<float>, formats::kSites> site_;
};

struct Outcome {
  std::vector<float> hidden;
  Capture capture;
};

void run(const formats::ModelConfig& config, const LayerWeights& weights, const Precision& precision,
         std::vector<float> hidden, std::uint64_t windows, int threads, Outcome& out) {
  const std::uint64_t length = hidden.size() / config.hidden / windows;
  run_layer(config, weights, 0, RopeTable(config, length), precision, hidden, windows, length, threads,
            &out.capture);
  out.hidden = std::move(hidden);
}

constexpr std::uint64_t kLength = 300;  // three blocks of keys

std::string name_of(const Precision& p) {
  std::string s;
  if (p.fp8_activations) s += " a8";
  if (p.int4_k) s += " k4";
  if (p.int4_v) s += " v4";
  if (p.fp8_q) s += " q8";
  if (p.fp8_p) s += " p8";
  return s.empty() ? " plain" : s;
}

TEST(Layer, EverySiteMatchesTheDefinitionInDouble) {
  Random random(1);
  for (const Extras extras : {Extras{}, Extras{.bias = true, .qk_norm = true},
                              Extras{.bias = true, .smoothing = true, .row_scale = true}}) {
    for (const std::uint64_t window : {0U, 1U, 40U, 128U, 170U}) {
      formats::ModelConfig config = small_config();
      config.sliding_window = {window};
      const LayerWeights weights = random_layer(config, random, extras);
      const auto hidden = random.normals(kLength * config.hidden);
      Outcome got;
      run(config, weights, {}, hidden, 1, 2, got);
      ReferenceResult expected = ReferenceLayer(config, weights, 0, {}).run(hidden, kLength);
      for (std::size_t s = 0; s < formats::kSites; ++s) {
        EXPECT_LT(test::relative_error(expected.site[s], got.capture.at(static_cast<Site>(s))), 2e-6)
            << "site " << s << " window " << window;
      }
      EXPECT_LT(test::relative_error(expected.hidden, got.hidden), 2e-6);
      if (window == 40) {  // the test sees a window that is forgotten
        const auto wrong =
            ReferenceLayer(config, weights, 0, {}, Mistake{.forget_window = true}).run(hidden, kLength);
        EXPECT_GT(test::relative_error(wrong.hidden, got.hidden), 1e-2);
      }
    }
  }
}

// Rounding at a tie may fall either way between FP32 and double: a few of the values differ by one step. So
// the bound is on nearly all values (99 of 100 are as close as FP32 makes them), and on the sum of squares.
double share_apart(const test::Doubles& expected, const std::vector<float>& got) {
  double rms = 0;
  for (const double x : expected) rms += x * x;
  rms = std::sqrt(rms / static_cast<double>(expected.size()));
  std::size_t apart = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (!(std::fabs(expected[i] - static_cast<double>(got[i])) < 2e-5 * rms + 1e-5 * std::fabs(expected[i])))
      ++apart;
  }
  return static_cast<double>(apart) / static_cast<double>(expected.size());
}

TEST(Layer, EachQuantisationSwitchOfAttentionIsAsDefined) {
  Random random(2);
  const Precision cases[] = {{.int4_k = true},
                             {.int4_v = true},
                             {.fp8_q = true},
                             {.fp8_p = true},
                             {.int4_v = true, .fp8_p = true},
                             {.int4_k = true, .int4_v = true, .fp8_q = true, .fp8_p = true}};
  for (const std::uint64_t window : {0U, 150U}) {
    formats::ModelConfig config = small_config();
    config.sliding_window = {window};
    const LayerWeights weights = random_layer(config, random, {.smoothing = true, .together = window != 0});
    const auto hidden = random.normals(kLength * config.hidden);
    const ReferenceResult plain = ReferenceLayer(config, weights, 0, {}).run(hidden, kLength);
    for (const Precision& precision : cases) {
      Outcome got;
      run(config, weights, precision, hidden, 1, 1, got);
      ReferenceResult expected = ReferenceLayer(config, weights, 0, precision).run(hidden, kLength);
      const auto& o = got.capture.at(Site::o_in);
      // A code of K or V that falls the other way is seen by every later token: hence the loose share.
      const double effect = test::relative_error(plain.site[static_cast<std::size_t>(Site::o_in)], o);
      EXPECT_LT(share_apart(expected.at(Site::o_in), o), 0.3) << name_of(precision);
      EXPECT_LT(test::relative_error(expected.at(Site::o_in), o), 0.2 * effect) << name_of(precision);
      EXPECT_GT(effect, 4e-3) << name_of(precision);
    }
  }
}

TEST(Layer, TheTestOfP8SeesTheMistakesThatAreEasyToMake) {
  Random random(3);
  formats::ModelConfig config = small_config();
  const LayerWeights weights = random_layer(config, random, {});
  const auto hidden = random.normals(kLength * config.hidden);
  const Precision precision{.int4_k = true, .int4_v = true, .fp8_q = true, .fp8_p = true};
  Outcome got;
  run(config, weights, precision, hidden, 1, 1, got);
  for (const Mistake mistake : {Mistake{.block_wide_maximum = true}, Mistake{.global_maximum = true},
                                Mistake{.denominator_of_p8 = true}}) {
    ReferenceResult wrong = ReferenceLayer(config, weights, 0, precision, mistake).run(hidden, kLength);
    EXPECT_GT(share_apart(wrong.at(Site::o_in), got.capture.at(Site::o_in)), 0.08);
  }
}

TEST(Layer, Fp8ActivationsAreAsDefined) {
  Random random(4);
  for (const Extras extras : {Extras{}, Extras{.bias = true, .smoothing = true, .row_scale = true}}) {
    formats::ModelConfig config = small_config();
    const LayerWeights weights = random_layer(config, random, extras);
    const auto hidden = random.normals(kLength * config.hidden);
    for (const Precision precision :
         {Precision{.fp8_activations = true},
          Precision{.fp8_activations = true, .int4_k = true, .int4_v = true, .fp8_q = true, .fp8_p = true}}) {
      Outcome got;
      run(config, weights, precision, hidden, 1, 2, got);
      const ReferenceLayer reference(config, weights, 0, precision);
      const auto linear_of = [&](std::size_t which, Site input) {
        const auto& x = got.capture.at(input);
        return reference.linear(which, {x.begin(), x.end()}, kLength);
      };
      // Stage by stage from what the stage got, so that a bf16 that fell the other way is not carried on.
      EXPECT_LT(share_apart(linear_of(kV, Site::attn_in), got.capture.at(Site::v)), 0.01)
          << name_of(precision);
      test::Doubles act;
      const test::Doubles gate = linear_of(kGate, Site::mlp_in);
      const test::Doubles up = linear_of(kUp, Site::mlp_in);
      for (std::size_t i = 0; i < gate.size(); ++i) act.push_back(gate[i] / (1 + std::exp(-gate[i])) * up[i]);
      EXPECT_LT(share_apart(act, got.capture.at(Site::down_in)), 0.01) << name_of(precision);
      test::Doubles last(hidden.begin(), hidden.end());
      const test::Doubles o = linear_of(kO, Site::o_in);
      const test::Doubles down = linear_of(kDown, Site::down_in);
      for (std::size_t i = 0; i < last.size(); ++i) last[i] += o[i] + down[i];
      EXPECT_LT(share_apart(last, got.hidden), 0.01) << name_of(precision);

      const auto doubles = [&](Site site) {
        return test::Doubles(got.capture.at(site).begin(), got.capture.at(site).end());
      };
      const test::Doubles attention =
          reference.attention(doubles(Site::q), doubles(Site::k_post_rope), doubles(Site::v), kLength);
      EXPECT_LT(share_apart(attention, got.capture.at(Site::o_in)), 0.3) << name_of(precision);
      EXPECT_LT(test::relative_error(attention, got.capture.at(Site::o_in)), 5e-3) << name_of(precision);

      const ReferenceResult plain = ReferenceLayer(config, weights, 0, {}).run(hidden, kLength);
      EXPECT_GT(test::relative_error(plain.hidden, got.hidden), 5e-3) << name_of(precision);
      for (const float x : got.capture.at(Site::v)) {
        ASSERT_EQ(static_cast<double>(x), test::nearest_bf16(static_cast<double>(x)));
      }
    }
  }
}

TEST(Layer, ThreadsBatchesAndStepsDoNotChangeABit) {
  Random random(5);
  for (const Precision precision :
       {Precision{},
        Precision{.fp8_activations = true, .int4_k = true, .int4_v = true, .fp8_q = true, .fp8_p = true}}) {
    formats::ModelConfig config = small_config();
    config.sliding_window = {90};
    const LayerWeights weights = random_layer(config, random, {.bias = true, .qk_norm = true});
    const std::uint64_t windows = 5;
    const std::uint64_t length = 150;
    const auto hidden = random.normals(windows * length * config.hidden);
    Outcome one;
    run(config, weights, precision, hidden, windows, 1, one);
    for (const int threads : {2, 5}) {
      Outcome many;
      run(config, weights, precision, hidden, windows, threads, many);
      EXPECT_TRUE(test::same_bits(one.hidden, many.hidden)) << threads;
      for (std::size_t s = 0; s < formats::kSites; ++s) {
        EXPECT_TRUE(
            test::same_bits(one.capture.at(static_cast<Site>(s)), many.capture.at(static_cast<Site>(s))));
      }
    }
    // The last window alone, in steps of a growing sequence.
    const LayerPanels panels = pack_layer(LayerWeights(weights), 1);
    LayerRunner runner(config, precision, 2);
    const RopeTable rope(config, length);
    KvCache cache(1, config.kv_heads, config.head_dim, length);
    std::vector<float> stepped(hidden.end() - static_cast<std::ptrdiff_t>(length * config.hidden),
                               hidden.end());
    for (std::uint64_t start = 0; start < length;) {
      const std::uint64_t count =
          std::min<std::uint64_t>(start == 0 ? 40 : 1 + random.below(3), length - start);
      runner.run(panels, 0, rope, {1, count, start, 0}, cache,
                 std::span(stepped).subspan(start * config.hidden, count * config.hidden), nullptr);
      start += count;
    }
    EXPECT_TRUE(test::same_bits(stepped, std::span(one.hidden).last(length * config.hidden)));
  }
}

TEST(Layer, NonFiniteActivationsAreNamed) {
  Random random(6);
  formats::ModelConfig config = small_config();
  const auto hidden = random.normals(2 * 140 * config.hidden);
  const auto expect = [&](LayerWeights weights, std::vector<float> input,
                          const std::vector<std::string>& parts) {
    const RopeTable rope(config, 140);
    try {
      run_layer(config, std::move(weights), 0, rope, {}, input, 2, 140, 2, nullptr);
      ADD_FAILURE() << "accepted: " << parts[0];
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::input);
      for (const std::string& part : parts) EXPECT_THAT(e.what(), testing::HasSubstr(part));
    }
  };
  auto input = hidden;
  input[(140 + 133) * config.hidden + 5] = std::numeric_limits<float>::quiet_NaN();
  expect(random_layer(config, random, {}), input, {"layer 0", "attn_in", "sequence 1", "token 133", "NaN"});
  // A weight so large that one site overflows; sites in the order in which they are reached.
  const struct {
    std::size_t linear;
    const char* site;
  } sites[] = {{kQ, "q"}, {kK, "k_pre_rope"}, {kV, "v"}, {kO, "mlp_in"}, {kUp, "down_in"}};
  for (const auto& [linear, site] : sites) {
    LayerWeights weights = random_layer(config, random, {});
    for (float& v : weights.linear[linear].weight) v *= 3e38F;
    expect(std::move(weights), hidden,
           {"layer 0, " + std::string(site) + ",", "sequence 0, token", "channel"});
  }
  auto last = random.normals(3 * 8);
  last[8 + 2] = -std::numeric_limits<float>::infinity();
  try {
    check_final_hidden(last, 8, {1, 3, 10, 4});
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), testing::AllOf(testing::HasSubstr("sequence 4, token 11"),
                                         testing::HasSubstr("-Inf at channel 2")));
  }
}

}  // namespace
}  // namespace fireq::calib
