#include "calib/evaluate.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <memory>

#include "calib/model_runner.hpp"
#include "calib/scoring.hpp"
#include "common/checked.hpp"
#include "common/error.hpp"

namespace fireq::calib {
namespace {

// Layers and heads of all models together stay in memory up to this; larger models stream a layer at a time
// through chunks of windows.
constexpr std::uint64_t kResidentBytes = std::uint64_t{1} << 30U;
// Activations of one chunk of windows.
constexpr std::uint64_t kResidentChunkTokens = 8192;
constexpr std::uint64_t kSmallHeadBytes = std::uint64_t{8} << 20U;
constexpr std::uint64_t kStreamedChunkBytes = std::uint64_t{256} << 20U;

// Bytes of a token that live from one layer to the next, or through one layer.
std::uint64_t token_bytes(const formats::ModelConfig& config) {
  return sizeof(float) * (config.hidden + 2 * config.q_rows() + 2 * config.kv_rows());
}

class Model {
 public:
  Model(const WeightSource& source, const Precision& precision, int threads, bool keep,
        std::uint64_t part_rows, LinearBackend* backend)
      : runner_(source, precision, threads, keep, backend), head_(source, keep, part_rows, threads) {}

  std::span<const float> run(std::span<const std::int32_t> ids, const Batch& batch,
                             const std::function<void(std::uint64_t)>& after_layer) {
    hidden_.resize(ids.size() * head_.hidden());
    runner_.run(ids, batch, {}, hidden_, after_layer);
    return hidden_;
  }
  OutputHead& head() noexcept { return head_; }
  double load_seconds() const noexcept { return runner_.load_seconds() + head_.load_seconds(); }

 private:
  ModelRunner runner_;
  OutputHead head_;
  std::vector<float> hidden_;
};

// Rows of hidden states that score a token: all of a window but its last.
std::vector<float> scored_rows(std::span<const float> hidden, const Batch& batch, std::uint64_t width) {
  std::vector<float> out;
  out.reserve(batch.sequences * (batch.length - 1) * width);
  for (std::uint64_t w = 0; w < batch.sequences; ++w) {
    const auto rows = hidden.subspan(w * batch.length * width, (batch.length - 1) * width);
    out.insert(out.end(), rows.begin(), rows.end());
  }
  return out;
}

struct Moments {
  double sum = 0, squares = 0;
  std::uint64_t count = 0;
  void add(double x) {
    sum += x;
    squares += x * x;
    ++count;
  }
  double mean() const { return sum / static_cast<double>(count); }
  double standard_error() const {
    if (count < 2) return 0;
    const auto n = static_cast<double>(count);
    return std::sqrt(std::max(0.0, squares - sum * sum / n) / (n - 1) / n);
  }
};

void check_windows(const Windows& windows) {
  if (windows.ids.size() != checked_mul(windows.count, windows.length, "windows")) {
    throw Error(ErrorKind::internal, "windows of another size than their tokens");
  }
  if (windows.count == 0 || windows.length < 2) {
    throw Error(ErrorKind::input, "nothing to score").hint("a window needs two tokens");
  }
}

void check_same_tokens(const WeightSource& model, const WeightSource& reference) {
  if (model.config().vocab == reference.config().vocab) return;
  throw Error(ErrorKind::input, "the reference model has another vocabulary")
      .path(reference.reader().folder())
      .expected(std::to_string(model.config().vocab) + " tokens")
      .found(std::to_string(reference.config().vocab));
}

}  // namespace

EvaluationResult evaluate(const WeightSource& model, const Windows& windows, const EvaluationOptions& options,
                          Progress& progress) {
  check_windows(windows);
  if (options.backend != nullptr && (!model.packed() || !options.precision.fp8_activations)) {
    throw Error(ErrorKind::usage, "only packed weights with FP8 activations run on a device")
        .path(model.reader().folder());
  }
  const WeightSource* reference = options.reference;
  std::uint64_t bytes =
      (options.backend == nullptr ? layer_bytes(model.config()) : 0) + head_bytes(model.config());
  std::uint64_t per_token = token_bytes(model.config());
  std::uint64_t widest = model.config().hidden;
  std::uint64_t layers = model.config().layers;
  if (reference != nullptr) {
    check_same_tokens(model, *reference);
    bytes += layer_bytes(reference->config()) + head_bytes(reference->config());
    per_token += token_bytes(reference->config());
    widest = std::max(widest, reference->config().hidden);
    layers += reference->config().layers;
  }
  const bool keep = !options.stream && bytes <= kResidentBytes;
  const std::uint64_t chunk_tokens = keep ? kResidentChunkTokens : kStreamedChunkBytes / per_token;
  const std::uint64_t chunk = std::max<std::uint64_t>(1, chunk_tokens / windows.length);

  const std::uint64_t part_rows =
      OutputHead::part_rows_for(widest, options.stream ? kSmallHeadBytes : OutputHead::kPartBytes);
  Model subject(model, options.precision, options.threads, keep, part_rows, options.backend);
  std::unique_ptr<Model> other;
  if (reference != nullptr) {
    other = std::make_unique<Model>(*reference, options.reference_precision, options.threads, keep, part_rows,
                                    nullptr);
  }
  const auto loading = [&] { return subject.load_seconds() + (other ? other->load_seconds() : 0.0); };

  EvaluationResult result;
  Moments nll, kl, delta;
  double kl_max = 0;
  std::uint64_t same = 0;
  std::uint64_t done = 0;
  progress.begin(options.stage, windows.count * layers);
  const double loaded_before = loading();
  const auto start = std::chrono::steady_clock::now();
  const std::clock_t cpu_start = std::clock();
  for (std::uint64_t first = 0; first < windows.count; first += chunk) {
    const Batch batch{std::min(chunk, windows.count - first), windows.length, 0, first};
    const auto ids = std::span(windows.ids).subspan(first * windows.length, batch.sequences * windows.length);
    const auto after_layer = [&](std::uint64_t) {
      done += batch.sequences;
      progress.advance(done);
    };
    std::vector<std::int32_t> targets;
    for (std::uint64_t w = 0; w < batch.sequences; ++w) {
      const auto window = ids.subspan(w * windows.length, windows.length);
      targets.insert(targets.end(), window.begin() + 1, window.end());
    }
    const std::vector<float> hidden =
        scored_rows(subject.run(ids, batch, after_layer), batch, model.config().hidden);
    std::vector<TokenScore> scores;
    if (other == nullptr) {
      scores = score_tokens(subject.head(), hidden, targets, options.threads);
    } else {
      const std::vector<float> other_hidden =
          scored_rows(other->run(ids, batch, after_layer), batch, reference->config().hidden);
      scores = score_tokens(subject.head(), hidden, other->head(), other_hidden, targets, options.threads);
    }
    const std::uint64_t per_window = windows.length - 1;
    for (std::uint64_t w = 0; w < batch.sequences; ++w) {
      double sum = 0;
      for (std::uint64_t i = 0; i < per_window; ++i) sum += scores[w * per_window + i].nll;
      result.window_nll.push_back(sum / static_cast<double>(per_window));
    }
    for (const TokenScore& score : scores) {
      nll.add(score.nll);
      kl.add(score.kl);
      delta.add(score.nll - score.reference_nll);
      kl_max = std::max(kl_max, score.kl);
      same += score.same_top1 ? 1U : 0U;
    }
  }
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() -
                   (loading() - loaded_before);
  result.cpu_seconds = static_cast<double>(std::clock() - cpu_start) / CLOCKS_PER_SEC;
  progress.end();

  result.nll_per_token = nll.mean();
  result.nll_stderr = nll.standard_error();
  result.ppl = std::exp(result.nll_per_token);
  result.tokens = windows.ids.size();
  result.windows = windows.count;
  result.scored = nll.count;
  if (reference != nullptr) {
    result.kl_mean = kl.mean();
    result.kl_stderr = kl.standard_error();
    result.delta_nll = delta.mean();
    result.delta_nll_stderr = delta.standard_error();
    result.kl_max = kl_max;
    result.top1_agree = static_cast<double>(same) / static_cast<double>(nll.count);
  }
  return result;
}

std::uint64_t comparison_memory(const formats::ModelConfig& config, const Windows& windows) {
  const std::uint64_t resident = 2 * (layer_bytes(config) + head_bytes(config));
  const std::uint64_t tokens = windows.ids.size() * 2 * token_bytes(config);
  // The layer at hand is there as it is read, too.
  const std::uint64_t layer = layer_bytes(config) / std::max<std::uint64_t>(1, config.layers);
  if (resident <= kResidentBytes) return resident + 2 * layer + tokens;
  const std::uint64_t part = OutputHead::part_rows_for(config.hidden) * config.hidden * sizeof(float);
  return 4 * layer + 2 * part + std::min(tokens, 2 * kStreamedChunkBytes);
}

std::vector<float> window_logits(const WeightSource& model, std::span<const std::int32_t> ids,
                                 const Precision& precision, int threads) {
  if (ids.empty()) throw Error(ErrorKind::input, "no token to compute logits for");
  const formats::ModelConfig& config = model.config();
  std::vector<float> hidden(ids.size() * config.hidden);
  ModelRunner runner(model, precision, threads, false);
  runner.run(ids, {1, ids.size(), 0, 0}, {}, hidden, [](std::uint64_t) {});
  OutputHead head(model, false, OutputHead::part_rows_for(config.hidden), threads);
  std::vector<float> logits(checked_mul(ids.size(), config.vocab, "logits"));
  write_logits(head, hidden, logits, threads);
  return logits;
}

}  // namespace fireq::calib
