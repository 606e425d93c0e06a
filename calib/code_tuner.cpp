#include "calib/code_tuner.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <utility>

#include "calib/layer_gradients.hpp"
#include "calib/simd.hpp"
#include "common/parallel.hpp"
#include "libquant/blas.hpp"
#include "libquant/latent_linear.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::calib {
namespace {

namespace blas = libquant::blas;
using blas::Op;
using formats::ModulePrecision;

// Tokens of a step (at least one window), and the least number of steps in a pass where there are so many
// windows.
constexpr std::uint64_t kStepTokens = 1024;
constexpr std::uint64_t kLeastSteps = 16;
constexpr std::uint64_t kLeastWindows = 16;
constexpr std::uint64_t kJudgedShare = 8;
// Of the output head: tokens at a time, and logits at a time where the vocabulary is large.
constexpr std::uint64_t kTokenBlock = 128;
constexpr std::uint64_t kLogits = std::uint64_t{1} << 22U;
constexpr std::uint64_t kSeed = 1;

std::uint64_t head_tokens(std::uint64_t vocab) {
  return std::clamp<std::uint64_t>(kLogits / vocab, 1, kTokenBlock);
}

std::uint64_t layer_weights(const formats::ModelConfig& config) {
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < kLinears; ++i) {
    const auto [rows, cols] = formats::linear_shape(config, i);
    sum += rows * cols;
  }
  return sum;
}

std::uint64_t held_bytes(const formats::ModelConfig& config) {
  return config.layers * layer_weights(config) * 4 * sizeof(float) +
         config.vocab * config.hidden * sizeof(float);
}

// The matrix as it is stored, its scales multiplied in.
void set_stored(const QuantizedLayer& layer, ModulePrecision precision, std::size_t i,
                std::vector<float>& weight) {
  if (precision == ModulePrecision::int4) {
    const libquant::QuantizedLinear& q = layer[i];
    libquant::dequantize_rows(q, libquant::ProductTable(q.levels), 0, q.rows, weight);
  } else if (precision == ModulePrecision::fp8) {
    const libquant::Fp8Linear& q = layer.fp8[i];
    libquant::decode_e4m3(q.codes, weight);
    for (std::uint64_t n = 0; n < q.rows; ++n) {
      for (float& v : std::span(weight).subspan(n * q.cols, q.cols)) v *= q.row_scales[n];
    }
  }
}

class Tuner {
 public:
  Tuner(const WeightSource& original, const Windows& windows, const Modules& modules,
        std::vector<TunedLayer>& layers, int threads, Progress& progress)
      : config_(original.config()),
        windows_(windows),
        layers_(layers),
        threads_(threads),
        rope_(config_, windows.length),
        norm_(original.final_norm()),
        head_(config_.vocab * config_.hidden),
        embedded_(windows.ids.size() * config_.hidden),
        latent_(layers.size()) {
    original.head_rows(0, config_.vocab, head_);
    original.embed(windows.ids, embedded_);
    wanted_ = embedded_;
    progress.begin("prepare tuning", config_.layers);
    for (std::uint64_t layer = 0; layer < config_.layers; ++layer) {
      check_interrupt();
      run_layer(config_, original.load_layer(layer, threads), layer, rope_, Precision{}, wanted_,
                windows.count, windows.length, threads, nullptr);
      TunedLayer& packed = layers[layer];
      for (std::size_t i = 0; i < kLinears; ++i) {
        const ModulePrecision precision = modules.linear(layer, i).precision;
        set_stored(packed.quantized, precision, i, packed.weights.linear[i].weight);
        if (precision == ModulePrecision::int4) latent_[layer][i].emplace(packed.quantized[i]);
      }
      progress.advance(layer + 1);
    }
    progress.end();
    normalise(wanted_, wanted_);
  }

  // Over the windows with these numbers.
  void step(std::span<const std::uint64_t> numbers, double rate) {
    std::vector<float> hidden = gathered(embedded_, numbers);
    std::vector<std::vector<float>> inputs(layers_.size());
    for (std::uint64_t layer = 0; layer < layers_.size(); ++layer) {
      inputs[layer] = hidden;
      gradients(layer).advance(numbers.size(), windows_.length, hidden);
    }
    double divergence = 0;
    std::vector<float> gradient = head_gradient(hidden, gathered(wanted_, numbers), divergence);
    for (std::uint64_t layer = layers_.size(); layer-- > 0;) {
      WeightGradients sums = make_weight_gradients(config_);
      gradients(layer).run(numbers.size(), windows_.length, inputs[layer], gradient, nullptr, &sums);
      std::vector<float>().swap(inputs[layer]);
      for (std::size_t i = 0; i < kLinears; ++i) {
        if (!latent_[layer][i]) continue;
        latent_[layer][i]->step(sums[i], rate, layers_[layer].weights.linear[i].weight, threads_);
      }
    }
  }

  // Mean KL per token of these windows, some at a time.
  double divergence(std::span<const std::uint64_t> numbers, std::uint64_t at_once) const {
    double sum = 0;
    for (std::size_t first = 0; first < numbers.size(); first += at_once) {
      const auto some = numbers.subspan(first, std::min<std::size_t>(at_once, numbers.size() - first));
      std::vector<float> hidden = gathered(embedded_, some);
      for (std::uint64_t layer = 0; layer < layers_.size(); ++layer) {
        gradients(layer).advance(some.size(), windows_.length, hidden);
      }
      head_gradient(hidden, gathered(wanted_, some), sum);
    }
    return sum / static_cast<double>(numbers.size() * windows_.length);
  }

 private:
  LayerGradients gradients(std::uint64_t layer) const {
    return {config_, layers_[layer].weights, layer, rope_, threads_, LayerGradients::Activations::quantised};
  }

  std::vector<float> gathered(const std::vector<float>& from, std::span<const std::uint64_t> numbers) const {
    const std::uint64_t size = windows_.length * config_.hidden;
    std::vector<float> out(numbers.size() * size);
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      std::copy_n(from.data() + numbers[i] * size, size, out.data() + i * size);
    }
    return out;
  }

  void normalise(std::span<const float> hidden, std::span<float> out) const {
    const auto eps = static_cast<float>(config_.rms_eps);
    for (std::size_t at = 0; at < hidden.size(); at += config_.hidden) {
      simd::kernels().rms_norm(hidden.data() + at, norm_.data(), eps, config_.hidden, out.data() + at);
    }
  }

  // Of the sum over tokens of KL(original || packed), in the packed model's final hidden states. wanted: the
  // original's, normalised. The sum is added to `divergence`.
  std::vector<float> head_gradient(std::span<const float> hidden, std::span<const float> wanted,
                                   double& divergence) const {
    const std::uint64_t width = config_.hidden, vocab = config_.vocab;
    const std::uint64_t rows = hidden.size() / width;
    const std::uint64_t most = head_tokens(vocab);
    std::vector<float> x(hidden.size());
    normalise(hidden, x);
    std::vector<float> gradient(hidden.size());
    std::vector<double> kl(rows);
    parallel_for((rows + most - 1) / most, threads_, [&](std::size_t block) {
      const std::uint64_t begin = block * most;
      const std::uint64_t count = std::min(most, rows - begin);
      const auto logits = [&](std::span<const float> from) {
        std::vector<float> out(count * vocab);
        blas::gemm(Op::none, Op::transpose, count, vocab, width, 1.0F, {from.data() + begin * width, width},
                   {head_.data(), width}, 0.0F, {out.data(), vocab});
        return out;
      };
      std::vector<float> right = logits(wanted);
      std::vector<float> too_much = logits(x);
      for (std::uint64_t i = 0; i < count; ++i) {
        float* p = right.data() + i * vocab;
        float* q = too_much.data() + i * vocab;
        simd::Divergence state;
        simd::kernels().divergence(state, p, q, vocab);
        kl[begin + i] = simd::value(state);
        const float of_p = 1 / simd::kernels().exp_minus(p, state.reference.max, vocab);
        const float of_q = 1 / simd::kernels().exp_minus(q, state.model.max, vocab);
        for (std::uint64_t v = 0; v < vocab; ++v) q[v] = q[v] * of_q - p[v] * of_p;
      }
      std::vector<float> g(count * width);
      blas::gemm(Op::none, Op::none, count, width, vocab, 1.0F, {too_much.data(), vocab},
                 {head_.data(), width}, 0.0F, {g.data(), width});
      for (std::uint64_t i = 0; i < count; ++i) {
        const std::size_t at = (begin + i) * width;
        rms_norm_gradient(hidden.data() + at, norm_.data(), config_.rms_eps, width, g.data() + i * width,
                          gradient.data() + at);
      }
    });
    divergence += std::accumulate(kl.begin(), kl.end(), 0.0);
    return gradient;
  }

  const formats::ModelConfig& config_;
  const Windows& windows_;
  std::vector<TunedLayer>& layers_;
  const int threads_;
  const RopeTable rope_;
  const std::vector<float> norm_;
  std::vector<float> head_;               // [vocab, hidden]
  std::vector<float> embedded_, wanted_;  // [tokens, hidden]: first and, of the original, final normalised
  std::vector<std::array<std::optional<libquant::LatentLinear>, kLinears>> latent_;
};

}  // namespace

bool can_tune_codes(const formats::ModelConfig& config) {
  return held_bytes(config) <= kTunedModelBytes;
}

bool wants_tuned_codes(const formats::ModelConfig& config, const Recipe& recipe, const Windows& windows) {
  const auto weights = static_cast<double>(config.layers * layer_weights(config));
  const auto tokens = static_cast<double>(windows.count * windows.length);
  return recipe.curvature && recipe.tune_passes > 0 && windows.count >= kLeastWindows &&
         weights <= recipe.tune_weights_per_token * tokens;
}

bool tunes_codes(const formats::ModelConfig& config, const Recipe& recipe, const Windows& windows) {
  return wants_tuned_codes(config, recipe, windows) && can_tune_codes(config);
}

TuningWork tuning_work(const Windows& windows, const Recipe& recipe) {
  TuningWork work;
  work.judged = windows.count / kJudgedShare;
  work.tuned = windows.count - work.judged;
  work.windows_per_step = std::clamp<std::uint64_t>(kStepTokens / windows.length, 1,
                                                    std::max<std::uint64_t>(1, work.tuned / kLeastSteps));
  work.steps = recipe.tune_passes * (work.tuned / work.windows_per_step);
  return work;
}

TuningReport tune_codes(const WeightSource& original, const Windows& windows, const Recipe& recipe,
                        const Modules& modules, std::vector<TunedLayer>& layers, int threads,
                        Progress& progress) {
  std::vector<QuantizedLayer> rounded;
  rounded.reserve(layers.size());
  for (const TunedLayer& layer : layers) rounded.push_back(layer.quantized);
  Tuner tuner(original, windows, modules, layers, threads, progress);
  const TuningWork work = tuning_work(windows, recipe);
  std::vector<std::uint64_t> judged, tuned;
  for (std::uint64_t i = 0; i < windows.count; ++i) {
    (i % kJudgedShare == kJudgedShare - 1 ? judged : tuned).push_back(i);
  }
  TuningReport report;
  report.before = tuner.divergence(judged, work.windows_per_step);
  const std::uint64_t in_a_pass = work.tuned / work.windows_per_step;
  std::vector<std::uint64_t> order;
  std::mt19937_64 random(kSeed);
  progress.begin("tune codes", work.steps);
  for (std::uint64_t s = 0; s < work.steps; ++s) {
    check_interrupt();
    if (s % in_a_pass == 0) {
      order = tuned;
      for (std::uint64_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
    }
    const double done = static_cast<double>(s) / static_cast<double>(work.steps);
    tuner.step(std::span(order).subspan(s % in_a_pass * work.windows_per_step, work.windows_per_step),
               recipe.tune_rate * (1 + std::cos(std::numbers::pi * done)) / 2);
    progress.advance(s + 1);
  }
  progress.end();
  report.after = tuner.divergence(judged, work.windows_per_step);
  for (std::size_t layer = 0; layer < layers.size() && !report.kept(); ++layer) {
    layers[layer].quantized = std::move(rounded[layer]);
  }
  return report;
}

std::uint64_t tuning_bytes(const formats::ModelConfig& config, const Windows& windows, const Recipe& recipe) {
  const std::uint64_t tokens = tuning_work(windows, recipe).windows_per_step * windows.length;
  // Beside what is held: both hidden states of all tokens, and all codes twice; in a step each layer's
  // inputs, one layer's activations and their gradients, its weights' gradients, and logits of both models.
  const std::uint64_t packed = config.layers * layer_weights(config) * 9 / 16;
  return held_bytes(config) + 2 * packed + 2 * windows.ids.size() * config.hidden * sizeof(float) +
         tokens * sizeof(float) *
             (config.hidden * (config.layers + 8) + 4 * config.q_rows() + 6 * config.kv_rows() +
              4 * config.ffn + 2 * config.vocab) +
         layer_weights(config) * sizeof(float);
}

}  // namespace fireq::calib
