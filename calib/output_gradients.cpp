#include "calib/output_gradients.hpp"

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include "calib/scoring.hpp"
#include "calib/simd.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"
#include "common/progress.hpp"
#include "libquant/blas.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::calib {
namespace {

namespace blas = libquant::blas;
using blas::Op;

constexpr std::uint64_t kMostTokens = 16384;  // or one window
constexpr std::uint64_t kTokenBlock = 128;
constexpr std::uint64_t kHeadRows = 1024;  // of the output head at a time
constexpr std::uint64_t kSeed = 1;

std::vector<std::uint64_t> chosen(const Windows& windows) {
  const std::uint64_t count =
      std::min(windows.count, std::max<std::uint64_t>(1, kMostTokens / windows.length));
  std::vector<std::uint64_t> list(count);
  for (std::uint64_t i = 0; i < count; ++i) list[i] = i * windows.count / count;
  return list;
}

Windows part_of(const Windows& windows, const std::vector<std::uint64_t>& numbers) {
  Windows part{{}, numbers.size(), windows.length};
  for (const std::uint64_t w : numbers) {
    const auto first = windows.ids.begin() + static_cast<std::ptrdiff_t>(w * windows.length);
    part.ids.insert(part.ids.end(), first, first + static_cast<std::ptrdiff_t>(windows.length));
  }
  return part;
}

std::vector<std::uint16_t> narrow(std::span<const float> values) {
  std::vector<std::uint16_t> out(values.size());
  libquant::encode_bf16(values, out);
  return out;
}

std::vector<float> wide(const std::vector<std::uint16_t>& values) {
  std::vector<float> out(values.size());
  libquant::decode_bf16(values, out);
  return out;
}

// One token's way through the vocabulary.
struct Draw {
  simd::LogSumExp all;
  double at = 0;      // the drawn token is the first with more probability than this up to it
  double passed = 0;  // probability of the tokens before
  bool done = false;
};

}  // namespace

OutputGradients::OutputGradients(const WeightSource& source, const Windows& windows, int threads,
                                 Progress& progress)
    : source_(source),
      threads_(threads),
      windows_(part_of(windows, chosen(windows))),
      numbers_(chosen(windows)),
      rope_(source.config(), windows.length),
      behind_(source.config().layers) {
  const formats::ModelConfig& config = source.config();
  std::vector<float> hidden(windows_.ids.size() * config.hidden);
  source.embed(windows_.ids, hidden);
  progress.begin("weigh outputs", 2 * config.layers);
  for (std::uint64_t layer = 0; layer < config.layers; ++layer) {
    check_interrupt();
    behind_[layer] = narrow(hidden);  // its inputs, until the way back
    run_layer(config, source.load_layer(layer, threads), layer, rope_, Precision{}, hidden, windows_.count,
              windows_.length, threads, nullptr);
    progress.advance(layer + 1);
  }
  std::vector<float> gradient = head_gradient(hidden);
  for (std::uint64_t layer = config.layers; layer-- > 0;) {
    check_interrupt();
    hidden = wide(behind_[layer]);
    behind_[layer] = narrow(gradient);
    if (layer == 0) break;
    const LayerWeights weights = source.load_layer(layer, threads);
    LayerGradients(config, weights, layer, rope_, threads)
        .run(windows_.count, windows_.length, hidden, gradient, nullptr);
    progress.advance(2 * config.layers - layer);
  }
  progress.end();
}

// Of final hidden states. The head's rows are read twice: for the sum of all probabilities, then for the draw
// and the gradient p - (1 at the drawn token).
std::vector<float> OutputGradients::head_gradient(std::span<const float> hidden) const {
  const std::uint64_t width = source_.config().hidden;
  const std::uint64_t vocab = source_.config().vocab;
  const std::uint64_t rows = windows_.ids.size();
  const std::vector<float> norm = source_.final_norm();
  const auto eps = static_cast<float>(source_.config().rms_eps);
  std::vector<float> x(hidden.size());
  std::vector<Draw> draws(rows);
  std::mt19937_64 random(kSeed);
  for (std::uint64_t i = 0; i < rows; ++i) {
    simd::kernels().rms_norm(hidden.data() + i * width, norm.data(), eps, width, x.data() + i * width);
    draws[i].at = static_cast<double>(random() >> 11U) * 0x1p-53;
  }
  std::vector<float> g(hidden.size(), 0.0F);
  std::vector<float> part(std::min(kHeadRows, vocab) * width);
  const auto each_logits = [&](const auto& use) {
    for (std::uint64_t begin = 0; begin < vocab; begin += kHeadRows) {
      check_interrupt();
      const std::uint64_t n = std::min(kHeadRows, vocab - begin);
      source_.head_rows(begin, n, std::span(part).first(n * width));
      parallel_for((rows + kTokenBlock - 1) / kTokenBlock, threads_, [&](std::size_t block) {
        const std::uint64_t first = block * kTokenBlock;
        const std::uint64_t count = std::min(kTokenBlock, rows - first);
        std::vector<float> logits(count * n);
        blas::gemm(Op::none, Op::transpose, count, n, width, 1.0F, {x.data() + first * width, width},
                   {part.data(), width}, 0.0F, {logits.data(), n});
        use(first, count, n, begin + n == vocab, logits);
      });
    }
  };
  each_logits([&](std::uint64_t first, std::uint64_t count, std::uint64_t n, bool /*last*/,
                  std::vector<float>& logits) {
    for (std::uint64_t i = 0; i < count; ++i) {
      simd::kernels().log_sum_exp(draws[first + i].all, logits.data() + i * n, n);
    }
  });
  each_logits(
      [&](std::uint64_t first, std::uint64_t count, std::uint64_t n, bool last, std::vector<float>& logits) {
        for (std::uint64_t i = 0; i < count; ++i) {
          Draw& draw = draws[first + i];
          float* p = logits.data() + i * n;
          const double all = simd::value(draw.all);
          for (std::uint64_t j = 0; j < n; ++j) {
            const double probability = std::exp(static_cast<double>(p[j]) - all);
            draw.passed += probability;
            p[j] = static_cast<float>(probability);
            if (draw.done || (draw.passed <= draw.at && !(last && j + 1 == n))) continue;
            draw.done = true;
            p[j] -= 1;
          }
        }
        blas::gemm(Op::none, Op::none, count, width, n, 1.0F, {logits.data(), n}, {part.data(), width}, 1.0F,
                   {g.data() + first * width, width});
      });
  std::vector<float> gradient(hidden.size());
  for (std::uint64_t i = 0; i < rows; ++i) {
    rms_norm_gradient(hidden.data() + i * width, norm.data(), source_.config().rms_eps, width,
                      g.data() + i * width, gradient.data() + i * width);
  }
  return gradient;
}

OutputSums OutputGradients::sums(std::uint64_t layer, const LayerWeights& weights,
                                 std::span<const float> hidden) {
  const std::uint64_t size = windows_.length * source_.config().hidden;
  std::vector<float> inputs(numbers_.size() * size);
  for (std::size_t i = 0; i < numbers_.size(); ++i) {
    std::copy_n(hidden.data() + numbers_[i] * size, size, inputs.data() + i * size);
  }
  std::vector<float> gradient = wide(std::exchange(behind_[layer], {}));
  OutputSums sums = make_output_sums(source_.config());
  LayerGradients(source_.config(), weights, layer, rope_, threads_)
      .run(windows_.count, windows_.length, inputs, gradient, &sums);
  return sums;
}

std::uint64_t OutputGradients::tokens_used(const Windows& windows) {
  return chosen(windows).size() * windows.length;
}

std::uint64_t OutputGradients::bytes(const formats::ModelConfig& config, const Windows& windows) {
  const std::uint64_t tokens = tokens_used(windows);
  const std::uint64_t widest = std::max({config.hidden, config.q_rows(), config.ffn});
  std::uint64_t squares = 0;
  for (std::size_t i = 0; i < kLinears; ++i) {
    const std::uint64_t n = formats::linear_shape(config, i)[0];
    squares += n * n * sizeof(float);
  }
  // Two linears (gate and up) are rounded at a time: FP64 and FP32 factors, and what RowsTogether says it
  // needs.
  const std::uint64_t rounding = 2 * widest * (16 * widest + 20 * config.hidden + 16'384);
  return tokens * config.hidden * (config.layers * sizeof(std::uint16_t) + 3 * sizeof(float)) + squares +
         rounding;
}

}  // namespace fireq::calib
