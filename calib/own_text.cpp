#include "calib/own_text.hpp"

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "calib/generate.hpp"
#include "calib/kv_cache.hpp"
#include "calib/model_runner.hpp"
#include "calib/scoring.hpp"
#include "common/parallel.hpp"

namespace fireq::calib {
namespace {

// Windows written side by side: as many as have keys and values in this much, at least one.
constexpr std::uint64_t kCacheBytes = std::uint64_t{4} << 30U;
constexpr std::uint64_t kMostAtOnce = 64;
constexpr std::uint64_t kPromptShare = 16;

std::uint64_t cache_bytes(const formats::ModelConfig& config, std::uint64_t length) {
  const std::uint64_t tokens = (length + KvCache::kBlock - 1) / KvCache::kBlock * KvCache::kBlock;
  return config.layers * tokens * config.kv_heads * (2 * config.head_dim + 2) * sizeof(float);
}

std::uint64_t at_once(const formats::ModelConfig& config, std::uint64_t length) {
  return std::clamp<std::uint64_t>(kCacheBytes / cache_bytes(config, length), 1, kMostAtOnce);
}

std::uint64_t prompt_length(std::uint64_t length) {
  return std::max<std::uint64_t>(1, length / kPromptShare);
}

struct Writer {
  const WeightSource& model;
  ModelRunner& runner;
  OutputHead& head;
  int threads;

  // ids [count, length] with `prompt` tokens of each row given; the number of the first row seeds its draws.
  void write(std::span<std::int32_t> ids, std::uint64_t length, std::uint64_t prompt, std::uint64_t first,
             Progress& progress) {
    const formats::ModelConfig& config = model.config();
    const std::uint64_t count = ids.size() / length;
    std::vector<Sampler> samplers;
    for (std::uint64_t i = 0; i < count; ++i) {
      samplers.emplace_back(SamplingOptions{.temperature = 1, .top_p = 1, .seed = first + i});
    }
    std::vector<KvCache> caches;
    for (std::uint64_t layer = 0; layer < config.layers; ++layer) {
      caches.emplace_back(count, config.kv_heads, config.head_dim, length);
    }
    std::vector<std::int32_t> step;
    std::vector<float> hidden;
    std::vector<float> last(count * config.hidden);
    std::vector<float> logits(count * config.vocab);
    for (std::uint64_t from = 0, to = prompt; to < length; from = to++) {
      const std::uint64_t tokens = to - from;
      step.clear();
      for (std::uint64_t i = 0; i < count; ++i) {
        const std::span<std::int32_t> row = ids.subspan(i * length, length);
        step.insert(step.end(), row.begin() + static_cast<std::ptrdiff_t>(from),
                    row.begin() + static_cast<std::ptrdiff_t>(to));
      }
      hidden.resize(step.size() * config.hidden);
      runner.run(step, {count, tokens, from, first}, caches, hidden, [](std::uint64_t) {});
      for (std::uint64_t i = 0; i < count; ++i) {
        std::copy_n(hidden.data() + ((i + 1) * tokens - 1) * config.hidden, config.hidden,
                    last.data() + i * config.hidden);
      }
      write_logits(head, last, logits, threads);
      parallel_for(count, threads, [&](std::size_t i) {
        ids[i * length + to] = samplers[i].next(std::span(logits).subspan(i * config.vocab, config.vocab));
      });
      progress.advance(first * length + count * (to + 1));
    }
  }
};

}  // namespace

bool writes_own_text(const formats::ModelConfig& config) {
  return layer_bytes(config) + head_bytes(config) <= kOwnTextModelBytes;
}

std::uint64_t own_text_windows(const formats::ModelConfig& config, const Windows& windows, double share) {
  if (!writes_own_text(config)) return 0;
  return static_cast<std::uint64_t>(std::llround(share * static_cast<double>(windows.count)));
}

Windows with_room_for_own_text(const formats::ModelConfig& config, const Windows& windows, double share) {
  Windows all = windows;
  all.count += own_text_windows(config, windows, share);
  all.ids.resize(all.count * all.length);
  return all;
}

OwnTextWork own_text_work(const formats::ModelConfig& config, const Windows& windows, double share) {
  const std::uint64_t own = own_text_windows(config, windows, share);
  if (own == 0) return {};
  return {own * windows.length, std::min(own, at_once(config, windows.length))};
}

Windows with_own_text(const WeightSource& model, const Windows& windows, double share, int threads,
                      Progress& progress) {
  const formats::ModelConfig& config = model.config();
  const std::uint64_t length = windows.length;
  const std::uint64_t own = own_text_windows(config, windows, share);
  Windows all = with_room_for_own_text(config, windows, share);
  if (own == 0) return all;
  const std::uint64_t prompt = prompt_length(length);
  const std::span<std::int32_t> written = std::span(all.ids).subspan(windows.ids.size());
  for (std::uint64_t i = 0; i < own; ++i) {
    std::copy_n(windows.ids.data() + i * windows.count / own * length, prompt, written.data() + i * length);
  }
  ModelRunner runner(model, Precision{}, threads, true);
  OutputHead head(model, true, OutputHead::part_rows_for(config.hidden), threads);
  Writer writer{model, runner, head, threads};
  progress.begin("write text", own * length);
  const std::uint64_t most = at_once(config, length);
  for (std::uint64_t first = 0; first < own; first += most) {
    const std::uint64_t count = std::min(most, own - first);
    writer.write(written.subspan(first * length, count * length), length, prompt, first, progress);
  }
  progress.end();
  return all;
}

std::uint64_t own_text_bytes(const formats::ModelConfig& config, const Windows& windows, double share) {
  const std::uint64_t own = own_text_windows(config, windows, share);
  if (own == 0) return 0;
  const std::uint64_t count = std::min(own, at_once(config, windows.length));
  const std::uint64_t prompt = prompt_length(windows.length);
  // Hidden states, queries, attention, keys and values of the prompts, logits and the samplers' weights.
  return layer_bytes(config) + head_bytes(config) +
         count * (cache_bytes(config, windows.length) +
                  prompt * sizeof(float) * (config.hidden + 2 * config.q_rows() + 2 * config.kv_rows()) +
                  config.vocab * (sizeof(float) + sizeof(double) + sizeof(std::uint32_t)));
}

}  // namespace fireq::calib
