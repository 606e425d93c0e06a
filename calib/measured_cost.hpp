// What quantising costs on text that calibration did not see, and whether that text is in the model's
// language.
#pragma once

#include <cstdint>

#include "calib/dataset.hpp"
#include "calib/weights.hpp"
#include "common/progress.hpp"
#include "formats/fireq_folder.hpp"

namespace fireq::calib {

// nll and KL per token of a packed folder, with everything on that it asks for: FP8 activations, and with the
// INT4 cache FP8 queries and probabilities. Both models run once over the windows, a layer at a time;
// resident are a layer of one of them and measured_cost_bytes.
formats::MeasuredCost measure_cost(const WeightSource& packed, const WeightSource& original,
                                   const Windows& windows, int threads, Progress& progress);
std::uint64_t measured_cost_bytes(const formats::ModelConfig& config, const Windows& windows);

// How well the original model predicts a text.
struct TextFit {
  double nll = 0;            // per token, nats
  double unigram = 0;        // entropy of the text's own token frequencies, per token, nats
  std::uint64_t tokens = 0;  // scored for nll

  // Who knew nothing of the language and only how often each token comes in this text would predict it as
  // well. In text of a model's language the tokens before say much more than that (docs/recipes.md has the
  // figures).
  bool unlike() const noexcept { return nll >= unigram; }
};
// Frequencies of all tokens of `windows`; nll on about 1,024 of them, in pieces of at most 128 tokens spread
// evenly.
Windows text_fit_windows(const Windows& windows);  // those tokens
TextFit text_fit(const WeightSource& model, const Windows& windows, int threads, Progress& progress);

}  // namespace fireq::calib
