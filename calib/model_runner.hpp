// A model ready to run: its layers one after another over batches of tokens, either all in memory or loaded
// one at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "calib/forward.hpp"
#include "calib/weights.hpp"

namespace fireq::calib {

// FP32 bytes of all decoder layers' matrices, and of the output head.
std::uint64_t layer_bytes(const formats::ModelConfig& config) noexcept;
std::uint64_t head_bytes(const formats::ModelConfig& config) noexcept;

class ModelRunner {
 public:
  // keep: load every layer once, now; else each run loads them in turn. With a backend (the source packed,
  // precision.fp8_activations on) it keeps all quantised linears after the first run, and runs them.
  ModelRunner(const WeightSource& source, const Precision& precision, int threads, bool keep,
              LinearBackend* backend = nullptr);

  // Embeds ids [sequences, length] and runs all layers: hidden [sequences * length, hidden] gets the last
  // layer's output, before the final norm. caches: one per layer for a sequence that goes on, or empty.
  // after_layer is called with each finished layer's number.
  void run(std::span<const std::int32_t> ids, const Batch& batch, std::span<KvCache> caches,
           std::span<float> hidden, const std::function<void(std::uint64_t)>& after_layer);

  const WeightSource& source() const noexcept { return source_; }
  double load_seconds() const noexcept { return load_seconds_; }  // spent loading layers so far

 private:
  LayerPanels load(std::uint64_t layer);

  const WeightSource& source_;
  const int threads_;
  LinearBackend* const backend_;
  LayerRunner runner_;
  RopeTable rope_;
  std::vector<LayerPanels> layers_;  // all of them or none
  std::uint64_t handed_over_ = 0;    // layers [0, handed_over_) are with the backend
  double load_seconds_ = 0;
};

}  // namespace fireq::calib
