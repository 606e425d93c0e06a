#include "calib/model_runner.hpp"

#include <algorithm>
#include <chrono>
#include <utility>

#include "common/error.hpp"
#include "common/progress.hpp"

namespace fireq::calib {

std::uint64_t layer_bytes(const formats::ModelConfig& config) noexcept {
  const std::uint64_t weights = config.hidden * (2 * config.q_rows() + 2 * config.kv_rows() + 3 * config.ffn);
  return config.layers * weights * sizeof(float);
}

std::uint64_t head_bytes(const formats::ModelConfig& config) noexcept {
  return config.vocab * config.hidden * sizeof(float);
}

ModelRunner::ModelRunner(const WeightSource& source, const Precision& precision, int threads, bool keep,
                         LinearBackend* backend)
    : source_(source),
      threads_(threads),
      backend_(backend),
      runner_(source.config(), precision, threads, backend),
      rope_(source.config(), 0) {
  if (!keep) return;
  for (std::uint64_t layer = 0; layer < source.config().layers; ++layer) {
    check_interrupt();
    layers_.push_back(load(layer));
  }
}

LayerPanels ModelRunner::load(std::uint64_t layer) {
  const auto start = std::chrono::steady_clock::now();
  LayerWeights weights =
      backend_ == nullptr ? source_.load_layer(layer, threads_) : source_.load_unquantized(layer, threads_);
  if (backend_ != nullptr && layer >= handed_over_) {
    for (std::size_t i = 0; i < kLinears; ++i) {
      if (!weights.linear[i].weight.empty()) continue;  // one that the folder leaves unquantised
      backend_->load(layer, static_cast<LinearIndex>(i), source_.quantized(layer, i), weights.linear[i].bias);
    }
    handed_over_ = layer + 1;
  }
  LayerPanels panels = pack_layer(std::move(weights), threads_);
  load_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return panels;
}

void ModelRunner::run(std::span<const std::int32_t> ids, const Batch& batch, std::span<KvCache> caches,
                      std::span<float> hidden, const std::function<void(std::uint64_t)>& after_layer) {
  const std::uint64_t layers = source_.config().layers;
  if (ids.size() != batch.sequences * batch.length || (!caches.empty() && caches.size() != layers)) {
    throw Error(ErrorKind::internal, "batch of another size than its tokens");
  }
  const std::uint64_t positions = batch.start + batch.length;
  if (rope_.cosine.size() < positions * rope_.half) {
    rope_ = RopeTable(source_.config(), std::max(positions, 2 * (rope_.cosine.size() / rope_.half)));
  }
  source_.embed(ids, hidden);
  try {
    for (std::uint64_t layer = 0; layer < layers; ++layer) {
      check_interrupt();
      const auto step = [&](const LayerPanels& panels) {
        if (caches.empty()) {
          runner_.run(panels, layer, rope_, batch, hidden, nullptr);
        } else {
          runner_.run(panels, layer, rope_, batch, caches[layer], hidden, nullptr);
        }
      };
      if (layers_.empty()) {
        step(load(layer));
      } else {
        step(layers_[layer]);
      }
      after_layer(layer);
    }
    check_final_hidden(hidden, source_.config().hidden, batch);
  } catch (Error& error) {
    throw error.path_if_unset(source_.reader().folder());
  }
}

}  // namespace fireq::calib
