#include "calib/time_plan.hpp"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdint>
#include <random>
#include <utility>

#include "calib/code_tuner.hpp"
#include "calib/collectors.hpp"
#include "calib/folding.hpp"
#include "calib/forward.hpp"
#include "calib/key_centre.hpp"
#include "calib/linear_quantizer.hpp"
#include "calib/measured_cost.hpp"
#include "calib/modules.hpp"
#include "calib/output_gradients.hpp"
#include "calib/own_text.hpp"
#include "calib/sensitivity.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/curvature.hpp"
#include "libquant/curvature_quantizer.hpp"

namespace fireq::calib {
namespace {

using formats::ModulePrecision;

// Work of one sample, at most: a fraction of a second on one core.
constexpr double kSampleProducts = 3e9;
constexpr std::uint64_t kSampleWeights = std::uint64_t{1} << 19U;
constexpr std::uint64_t kJointSide = 256;

template <class Work>
double seconds_of(const Work& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double real(std::uint64_t n) {
  return static_cast<double>(n);
}

// Multiply-adds of a model of this shape.
class Products {
 public:
  explicit Products(const formats::ModelConfig& config) : config_(config) {
    for (std::size_t i = 0; i < kLinears; ++i) {
      const auto [rows, cols] = formats::linear_shape(config, i);
      layer_weights_ += real(rows) * real(cols);
    }
  }
  double layer_weights() const noexcept { return layer_weights_; }
  double weights() const noexcept { return layer_weights_ * real(config_.layers); }
  // One layer over `tokens` in windows of `length`: its linears, scores and their products with values.
  double layer(double tokens, std::uint64_t length) const noexcept {
    return tokens * (layer_weights_ + real(config_.q_rows()) * real(length));
  }
  double layers(double tokens, std::uint64_t length) const noexcept {
    return layer(tokens, length) * real(config_.layers);
  }
  double head(double tokens) const noexcept { return tokens * real(config_.vocab) * real(config_.hidden); }

 private:
  const formats::ModelConfig& config_;
  double layer_weights_ = 0;
};

// Seconds for one of each, with the run's threads.
struct Rates {
  double load = 0;         // a weight, read, converted and packed
  double product = 0;      // a multiply-add of a forward pass
  double written = 0;      // the same with one token of each window that is written
  double observed = 0;     // the same while statistics are collected
  double quantised = 0;    // the same with the cache in 4 bits, and all else that a packed folder quantises
  double centre = 0;       // a layer's keys tried less their mean
  double fold = 0;         // a weight, when the recipe's factors are made and folded in
  double round = 0;        // a weight, to 4 bits, each for itself
  double joint = 0;        // a unit of joint_units, threads sharing one linear
  double joint_alone = 0;  // the same on one thread
};

// What rounding a linear under curvature grows with: rows together too, where outputs weigh their errors.
double joint_units(const Recipe& recipe, double rows, double cols) {
  return rows * cols * (recipe.output_curvature ? rows + cols : cols);
}

std::vector<float> random_values(std::uint64_t count, std::uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<float> out(count);
  for (float& x : out) x = normal(engine);
  return out;
}

libquant::CurvatureFactor random_curvature(std::uint64_t side, int threads) {
  libquant::Curvature sums(side, libquant::Curvature::Cross::without);
  const std::vector<float> x = random_values(2 * side * side, 5);
  libquant::add_outer_products(x.data(), side, side, x.data(), side, side, 2 * side, true, sums.square,
                               threads);
  sums.tokens = 2 * side;
  return libquant::factor_curvature(sums, 0.01, threads);
}

// The windows that a run goes through first: as long as the run's, as few tokens as tell the rate.
Windows sample_of(const QuantizeOptions& options, const Products& products) {
  const Windows& all = options.calibration ? *options.calibration : *options.held_back;
  Windows out{{}, 1, all.length};
  while (out.length > 32 && products.layer(real(out.length), out.length) > kSampleProducts) out.length /= 2;
  const auto begin = all.ids.begin();
  out.ids.assign(begin, begin + static_cast<std::ptrdiff_t>(out.length));
  return out;
}

class Sampler {
 public:
  Sampler(const WeightSource& source, const QuantizeOptions& options, const Products& products)
      : source_(source), options_(options), products_(products), config_(source.config()) {}

  Rates run() {
    {
      std::optional<LayerWeights> weights;
      LayerPanels panels;
      rates_.load = seconds_of([&] { weights = source_.load_layer(0, options_.threads); });
      rates_.load += seconds_of([&] { panels = pack_layer(std::move(*weights), options_.threads); });
      rates_.load /= products_.layer_weights();
      if (options_.calibration || options_.held_back) forward(panels);
    }
    folding_and_rounding();
    if (options_.recipe.curvature) joint_rounding();
    return rates_;
  }

 private:
  void forward(const LayerPanels& panels) {
    const Windows windows = sample_of(options_, products_);
    std::vector<float> embedded(windows.ids.size() * config_.hidden);
    source_.embed(windows.ids, embedded);
    const RopeTable rope(config_, windows.length);
    LayerRunner plain(config_, Precision{}, options_.threads);
    const bool cache = options_.recipe.kv_cache;
    LayerRunner quantised(config_, {true, cache, cache, true, true}, options_.threads);
    const double work = products_.layer(real(windows.length), windows.length);
    const auto pass = [&](LayerRunner& runner, ActivationObserver* observer) {
      check_interrupt();
      std::vector<float> hidden = embedded;
      return seconds_of([&] {
               runner.run(panels, 0, rope, {1, windows.length, 0, 0}, hidden, observer);
             }) /
             work;
    };
    pass(plain, nullptr);  // work areas are made once
    rates_.product = pass(plain, nullptr);
    if (options_.held_back) rates_.quantised = pass(quantised, nullptr);
    const std::uint64_t written =
        options_.calibration
            ? own_text_work(config_, *options_.calibration, options_.recipe.own_text).side_by_side
            : 0;
    if (written > 0) {
      std::vector<float> hidden(written * config_.hidden, 1.0F);
      const auto step = [&] { plain.run(panels, 0, rope, {written, 1, 0, 0}, hidden, nullptr); };
      step();  // work areas
      rates_.written = seconds_of(step) / products_.layer(real(written), 1);
    }
    if (!options_.recipe.needs_statistics()) return;
    StatisticsCollector collector(statistics_.emplace(), config_.kv_heads, config_.head_dim,
                                  options_.threads);
    KeySample sample(collector, windows.length);
    rates_.observed = pass(plain, &sample);
    rates_.centre = seconds_of(
        [&] { statistics_->k_centre_gain = sample.centre_gain(config_, 0, *statistics_, options_.threads); });
  }

  // Folds with the sample's statistics; rounds some rows of the layer's largest matrix.
  void folding_and_rounding() {
    check_interrupt();
    LayerWeights weights = source_.load_layer(0, options_.threads);
    if (statistics_) {
      rates_.fold = seconds_of([&] { fold_layer(config_, options_.recipe, &*statistics_, weights); }) /
                    products_.layer_weights();
    }
    const LinearWeights& down = weights.linear[kDown];
    LinearWeights part;
    part.name = down.name;
    part.cols = down.cols;
    part.rows = std::clamp<std::uint64_t>(kSampleWeights / down.cols, 1, down.rows);
    part.weight.assign(down.weight.begin(),
                       down.weight.begin() + static_cast<std::ptrdiff_t>(part.rows * part.cols));
    const Modules modules = modules_of(source_, options_.recipe);
    const std::vector<float> moment(part.cols, 1.0F);
    std::uint64_t saturated = 0;
    rates_.round =
        seconds_of([&] {
          quantize_folded(part, modules.linear(0, kDown), {moment, moment}, options_.threads, saturated);
        }) /
        real(part.rows * part.cols);
  }

  void joint_rounding() {
    const std::vector<float> w = random_values(kJointSide * kJointSide, 7);
    const libquant::CurvatureFactor inputs = random_curvature(kJointSide, options_.threads);
    const libquant::CurvatureFactor outputs = random_curvature(kJointSide, options_.threads);
    libquant::CurvatureQuantizerOptions how;
    how.search_low = options_.recipe.weights.search_low;
    how.search_high = options_.recipe.weights.search_high;
    how.passes = static_cast<unsigned>(options_.recipe.descent_passes);
    const double side = real(kJointSide);
    const auto rate = [&](int threads) {
      check_interrupt();
      libquant::QuantizedLinear q =
          libquant::make_quantized_linear(kJointSide, kJointSide, options_.recipe.weights.levels, false);
      return seconds_of([&] {
               libquant::quantize_with_curvature(w, inputs, how, threads, q,
                                                 options_.recipe.output_curvature ? &outputs : nullptr);
             }) /
             joint_units(options_.recipe, side, side);
    };
    rates_.joint = rate(options_.threads);
    rates_.joint_alone = options_.recipe.output_curvature ? rate(1) : rates_.joint;
  }

  const WeightSource& source_;
  const QuantizeOptions& options_;
  const Products& products_;
  const formats::ModelConfig& config_;
  std::optional<formats::LayerStatistics> statistics_;  // of the sample
  Rates rates_;
};

class TimePlanner {
 public:
  TimePlanner(const WeightSource& source, const QuantizeOptions& options, const PrecisionGoal& goal)
      : source_(source),
        options_(options),
        goal_(goal),
        recipe_(options.recipe),
        config_(source.config()),
        products_(config_),
        modules_(modules_of(source, recipe_)) {}

  TimePlan run() {
    TimePlan plan;
    plan.measuring = seconds_of([&] { rates_ = Sampler(source_, options_, products_).run(); });
    const auto add = [&](const char* stage, double seconds) {
      if (seconds > 0) plan.stages.push_back({stage, seconds});
    };
    if (options_.calibration) {
      const Windows fit = text_fit_windows(*options_.calibration);
      add("check text", pass(fit) + head(fit.ids.size()));
    }
    if (options_.calibration && recipe_.needs_statistics() && !options_.statistics_path) {
      const Windows& text = *options_.calibration;
      add("calibrate", loading() + rates_.centre * real(config_.layers) +
                           rates_.observed * products_.layers(real(text.ids.size()), text.length));
    }
    if (goal_.given()) add("choose", choosing());
    if (recipe_.curvature) {
      add("write text", writing());
      if (recipe_.output_curvature) add("weigh outputs", weighing());
    }
    add("quantize", loading() + rates_.fold * products_.weights() +
                        (recipe_.curvature ? two_streams() : rates_.round * weights_in_4_bits()));
    if (recipe_.curvature) add("tune codes", tuning());
    if (options_.held_back) {
      const Windows& text = *options_.held_back;
      add("measure", pass(text) + loading() +
                         rates_.quantised * products_.layers(real(text.ids.size()), text.length) +
                         2 * head(text.ids.size()));
    }
    return plan;
  }

 private:
  double loading() const { return rates_.load * products_.weights(); }
  double head(std::uint64_t tokens) const { return rates_.product * products_.head(real(tokens)); }
  // The layers over these windows, loaded on the way.
  double pass(const Windows& windows) const {
    return loading() + rates_.product * products_.layers(real(windows.ids.size()), windows.length);
  }

  double weights_in_4_bits() const {
    double sum = 0;
    for (std::uint64_t layer = 0; layer < config_.layers; ++layer) {
      for (std::size_t i = 0; i < kLinears; ++i) {
        const auto [rows, cols] = formats::linear_shape(config_, i);
        if (modules_.linear(layer, i).precision == ModulePrecision::int4) sum += real(rows) * real(cols);
      }
    }
    return sum;
  }

  // plan_precisions: every variant from its own layer on, its logits, then whole mixtures against the
  // original; and the KL of the finished folder.
  double choosing() const {
    const Windows windows = sample_windows(*options_.calibration, kPlanTokens);
    const OpenUnits open = open_units(config_, recipe_, modules_);
    const double variants = real(open.units.size() * open.precisions.size());
    const double mean_share = (real(config_.layers) + 1) / (2 * real(config_.layers));
    const double tokens = real(windows.ids.size());
    const double alone =
        loading() + rates_.round * products_.weights() +
        rates_.product * ((1 + variants * mean_share) * products_.layers(tokens, windows.length) +
                          variants * (1 + 1 / real(kScoredTogether)) * products_.head(tokens));
    const double mixture =
        2 * (pass(windows) + head(windows.ids.size())) + rates_.round * products_.weights();
    const double mixtures =
        goal_.kl ? 1 + real(static_cast<std::uint64_t>(std::bit_width(2 * open.units.size()))) : 1;
    return alone + (mixtures + 1) * mixture;
  }

  double writing() const {
    const OwnTextWork work = own_text_work(config_, *options_.calibration, recipe_.own_text);
    const double tokens = real(work.tokens);
    return rates_.written *
               (products_.layers(tokens, options_.calibration->length) + products_.head(tokens)) +
           (work.tokens > 0 ? loading() : 0);
  }

  // The original, forward and back, before any layer is rounded.
  double weighing() const {
    const Windows text = with_room_for_own_text(config_, *options_.calibration, recipe_.own_text);
    const double used = real(OutputGradients::tokens_used(text));
    return 2 * loading() + rates_.product * (kBackward * products_.layers(used, text.length) +
                                             kHeadBackward * products_.head(used));
  }

  // Both streams, the sums over them, gradients of each layer's outputs, and the rounding.
  double two_streams() const {
    const Windows text = with_room_for_own_text(config_, *options_.calibration, recipe_.own_text);
    const double tokens = real(text.ids.size());
    double products = 2 * products_.layers(tokens, text.length);
    const double hidden = real(config_.hidden), heads = real(config_.q_rows()), ffn = real(config_.ffn);
    double sums = 0;
    for (const double channels : {hidden, heads, hidden, ffn}) sums += kSums * channels * channels;
    if (recipe_.residual) sums += hidden * (heads + ffn);
    products += real(config_.layers) * tokens * sums;
    if (recipe_.output_curvature) {
      const double used = real(OutputGradients::tokens_used(text));
      double outputs = 0;
      for (std::size_t i = 0; i < kLinears; ++i) {
        const double rows = real(formats::linear_shape(config_, i)[0]);
        outputs += rows * rows / 2;
      }
      // Once more forward in each layer, and back.
      products +=
          (kBackward - 1) * products_.layers(used, text.length) + real(config_.layers) * used * outputs;
    }
    return rates_.product * products + real(config_.layers) * joint_rounding();
  }

  // The original once over the text; then steps through the packed model and back, with a third product for
  // the gradients of weights, and twice forward through the head.
  double tuning() const {
    const Windows text = with_room_for_own_text(config_, *options_.calibration, recipe_.own_text);
    if (!tunes_codes(config_, recipe_, text)) return 0;
    const TuningWork work = tuning_work(text, recipe_);
    const double tokens = real(work.steps * work.windows_per_step * text.length);
    const double judged = 2 * real(work.judged * text.length);
    return pass(text) + loading() + rates_.fold * products_.weights() +
           rates_.product *
               ((kBackward + 1) * products_.layers(tokens, text.length) +
                products_.layers(judged, text.length) + kHeadBackward * products_.head(tokens + judged));
  }

  // One layer; linears of one input are rounded side by side where outputs weigh their errors.
  double joint_rounding() const {
    const int threads = std::max(1, resolve_threads(options_.threads));
    double seconds = 0;
    for (const auto& group :
         std::initializer_list<std::vector<std::size_t>>{{kQ, kK, kV}, {kO}, {kGate, kUp}, {kDown}}) {
      double sum = 0, most = 0;
      for (const std::size_t i : group) {
        const auto [rows, cols] = formats::linear_shape(config_, i);
        const double units = joint_units(recipe_, real(rows), real(cols));
        sum += units;
        most = std::max(most, units);
      }
      const bool side_by_side = recipe_.output_curvature && group.size() > 1;
      seconds += side_by_side ? rates_.joint_alone * std::max(most, sum / threads) : rates_.joint * sum;
    }
    return seconds;
  }

  static constexpr double kSums = 1.5;    // half of x_q x_q, all of x_f x_q
  static constexpr double kBackward = 4;  // forward, again on the way back, and two products back
  static constexpr double kHeadBackward = 3;

  const WeightSource& source_;
  const QuantizeOptions& options_;
  const PrecisionGoal& goal_;
  const Recipe& recipe_;
  const formats::ModelConfig& config_;
  const Products products_;
  const Modules modules_;
  Rates rates_;
};

}  // namespace

double TimePlan::total() const noexcept {
  double sum = 0;
  for (const StageTime& stage : stages) sum += stage.seconds;
  return sum;
}

std::optional<TimePlan> plan_time(const WeightSource& source, const QuantizeOptions& options,
                                  const PrecisionGoal& goal) {
  try {
    return TimePlanner(source, options, goal).run();
  } catch (const Error& error) {
    if (error.kind() == ErrorKind::input || error.kind() == ErrorKind::environment) return std::nullopt;
    throw;
  }
}

}  // namespace fireq::calib
