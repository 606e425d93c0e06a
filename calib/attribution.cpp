#include "calib/attribution.hpp"

#include <algorithm>
#include <array>
#include <functional>
#include <utility>

#include "calib/evaluate.hpp"
#include "common/parallel.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::calib {
namespace {

enum class Form : std::uint8_t { original, packed, exact };

// Each linear from the packed folder or from the folded original. Norms and S are the same in both.
class MixedWeights final : public ForwardingWeights {
 public:
  using Choice = std::function<Form(std::uint64_t layer, std::size_t linear)>;
  MixedWeights(const WeightSource& packed, const WeightSource& folded, Choice choice)
      : ForwardingWeights(folded), packed_(packed), choice_(std::move(choice)) {}

  LayerWeights load_layer(std::uint64_t layer, int threads) const override {
    const auto any = [&](auto holds) {
      for (std::size_t i = 0; i < kLinears; ++i) {
        if (holds(choice_(layer, i))) return true;
      }
      return false;
    };
    if (!any([](Form f) { return f != Form::original; })) return inner().load_layer(layer, threads);
    LayerWeights mixed = packed_.load_layer(layer, threads);
    LayerWeights original;
    if (any([](Form f) { return f == Form::original; })) original = inner().load_layer(layer, threads);
    for (std::size_t i = 0; i < kLinears; ++i) {
      const Form form = choice_(layer, i);
      if (form == Form::original) mixed.linear[i] = std::move(original.linear[i]);
      if (form == Form::exact && packed_.precision(layer, i) == formats::ModulePrecision::int4)
        unround(layer, i, threads, mixed.linear[i]);
    }
    return mixed;
  }
  libquant::QuantizedLinear quantized(std::uint64_t layer, std::size_t linear) const override {
    return packed_.quantized(layer, linear);
  }

 private:
  // level * sigma in place of RN8(level * sigma).
  void unround(std::uint64_t layer, std::size_t linear, int threads, LinearWeights& w) const {
    const libquant::QuantizedLinear q = packed_.quantized(layer, linear);
    constexpr std::uint64_t kRows = 64;
    parallel_for((q.rows + kRows - 1) / kRows, threads, [&](std::size_t task) {
      for (std::uint64_t r = task * kRows; r < std::min(q.rows, (task + 1) * kRows); ++r) {
        for (std::uint64_t c = 0; c < q.cols; ++c) {
          const std::uint8_t code = q.code(r, c);
          const float sigma =
              libquant::decode_e4m3(q.group_scales[r * q.groups() + c / libquant::kGroupSize]);
          const float magnitude = q.levels.magnitude[code & 7U] * sigma;
          w.weight[r * q.cols + c] = code < 8 ? magnitude : -magnitude;
        }
      }
    });
  }

  const WeightSource& packed_;
  Choice choice_;
};

struct Switches {
  Form weights = Form::original;
  Precision precision;
};

class Attributor {
 public:
  Attributor(const WeightSource& packed, const WeightSource& folded, const WeightSource& original,
             const Windows& windows, const AttributionOptions& options, Progress& progress)
      : packed_(packed),
        folded_(folded),
        original_(original),
        windows_(windows),
        options_(options),
        progress_(progress) {}

  Attribution run() {
    const std::uint64_t layers = original_.config().layers;
    const auto parts = listed_parts();
    progress_.begin("attribute", 2 + 2 * parts.size() - 1 + layers + kLinears);
    Attribution result;
    const EvaluationResult base = evaluated(original_, {}, nullptr);
    result.tokens = base.tokens;
    result.scored = base.scored;
    result.original_nll = base_nll_ = base.nll_per_token;
    const Switches all = everything();
    result.all = cost(all);
    for (const auto& [name, alone, without] : parts) {
      PartCost part{name, cost(alone), std::nullopt};
      if (without) part.without = cost(*without);
      result.parts.push_back(std::move(part));
    }
    for (std::uint64_t i = 0; i < layers; ++i) {
      result.layers.push_back({i, cost_of_weights([i](std::uint64_t layer, std::size_t) {
                                 return layer == i ? Form::packed : Form::original;
                               })});
    }
    constexpr std::array<const char*, kLinears> kNames{"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                                       "gate_proj", "up_proj", "down_proj"};
    for (std::size_t l = 0; l < kLinears; ++l) {
      result.linears.push_back({kNames.at(l), cost_of_weights([l](std::uint64_t, std::size_t linear) {
                                  return linear == l ? Form::packed : Form::original;
                                }),
                                std::nullopt});
    }
    progress_.end();
    return result;
  }

 private:
  struct Part {
    std::string name;
    Switches alone;
    std::optional<Switches> without;
  };

  Switches everything() const {
    return {Form::packed,
            {.fp8_activations = true,
             .int4_k = options_.cache,
             .int4_v = options_.cache,
             .fp8_q = true,
             .fp8_p = true}};
  }

  std::vector<Part> listed_parts() const {
    std::vector<Part> parts;
    // set(switches, on): a part on, or off.
    const auto add = [&](const char* name, const auto& set) {
      Part part{name, {}, everything()};
      set(part.alone, true);
      set(*part.without, false);
      parts.push_back(std::move(part));
    };
    add("weights", [](Switches& s, bool on) { s.weights = on ? Form::packed : Form::original; });
    parts.push_back({"weights, products exact", {.weights = Form::exact, .precision = {}}, std::nullopt});
    add("activations", [](Switches& s, bool on) { s.precision.fp8_activations = on; });
    if (options_.cache) {
      add("k", [](Switches& s, bool on) { s.precision.int4_k = on; });
      add("v", [](Switches& s, bool on) { s.precision.int4_v = on; });
    }
    add("q and p", [](Switches& s, bool on) { s.precision.fp8_q = s.precision.fp8_p = on; });
    return parts;
  }

  EvaluationResult evaluated(const WeightSource& model, const Precision& precision,
                             const WeightSource* reference) {
    check_interrupt();
    EvaluationOptions options;
    options.precision = precision;
    options.threads = options_.threads;
    options.reference = reference;
    Progress silent;  // many short runs: theirs would only flicker
    EvaluationResult result = evaluate(model, windows_, options, silent);
    progress_.advance(++done_);
    return result;
  }
  Cost cost_against_base(const WeightSource& model, const Precision& precision) {
    const EvaluationResult r = evaluated(model, precision, &original_);
    return {r.nll_per_token - base_nll_, *r.kl_mean};
  }
  Cost cost(const Switches& s) {
    const MixedWeights mixed(packed_, folded_, [&](std::uint64_t, std::size_t) { return s.weights; });
    return cost_against_base(mixed, s.precision);
  }
  Cost cost_of_weights(const MixedWeights::Choice& choice) {
    return cost_against_base(MixedWeights(packed_, folded_, choice), {});
  }

  const WeightSource& packed_;
  const WeightSource& folded_;
  const WeightSource& original_;
  const Windows& windows_;
  const AttributionOptions& options_;
  Progress& progress_;
  double base_nll_ = 0;
  std::uint64_t done_ = 0;
};

}  // namespace

Attribution attribute_costs(const WeightSource& packed, const WeightSource& folded,
                            const WeightSource& original, const Windows& windows,
                            const AttributionOptions& options, Progress& progress) {
  return Attributor(packed, folded, original, windows, options, progress).run();
}

}  // namespace fireq::calib
