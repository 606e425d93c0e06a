// What each part of a FireQ folder costs on a text: parts switched on alone, or left out, against the
// original.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "calib/dataset.hpp"
#include "calib/weights.hpp"
#include "common/progress.hpp"

namespace fireq::calib {

// Against the original in FP32: difference of nll per scored token, and KL(original || this), nats per scored
// token.
struct Cost {
  double delta_nll = 0, kl = 0;
};

struct PartCost {
  std::string part;
  Cost alone;                   // this part on, everything else as in the original
  std::optional<Cost> without;  // everything on but this part; nothing for a part of a part
};

struct LayerCost {
  std::uint64_t layer = 0;
  Cost alone;  // the packed weights of this layer, everything else as in the original
};

struct Attribution {
  std::uint64_t tokens = 0, scored = 0;
  double original_nll = 0;
  Cost all;  // the folder as it runs
  // weights (their magnitudes before products are rounded to FP8 as "weights, products exact"), activations,
  // k, v, q and p.
  std::vector<PartCost> parts;
  std::vector<LayerCost> layers;
  // The packed weights of one of the seven linears in all layers: q_proj ... down_proj.
  std::vector<PartCost> linears;
};

struct AttributionOptions {
  bool cache = true;  // the folder's cache is INT4
  int threads = 0;
};

// `folded` is fold_like(original, packed's folder): what the packed weights approximate. Evaluates the text
// some 20 times and once per layer. Throws what evaluate() throws.
Attribution attribute_costs(const WeightSource& packed, const WeightSource& folded,
                            const WeightSource& original, const Windows& windows,
                            const AttributionOptions& options, Progress& progress);

}  // namespace fireq::calib
