#include "calib/validate.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <utility>

#include "calib/exact_e4m3.hpp"
#include "calib/gemm.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/activation_quantizer.hpp"
#include "libquant/metrics.hpp"
#include "libquant/number_formats.hpp"
#include "libquant/quantized_linear.hpp"

namespace fireq::calib {
namespace {

using formats::ModulePrecision;
using libquant::kGroupSize;
using libquant::QuantizedLinear;

// Random activations with a few outlier channels, quantised per token.
struct Tokens {
  std::vector<float> x8;     // [tokens, cols], values of the FP8 codes
  std::vector<float> scale;  // [tokens]
};

Tokens random_tokens(std::uint64_t tokens, std::uint64_t cols, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  Tokens t;
  t.x8.resize(tokens * cols);
  for (float& x : t.x8) x = normal(random);
  for (std::uint64_t i = 0; i < tokens; ++i) {
    const std::span<float> row(t.x8.data() + i * cols, cols);
    row[random() % cols] *= 30;
    t.scale.push_back(libquant::quantize_token_in_place(row));
  }
  return t;
}

// The same in the type that a linear with plain_input multiplies.
Tokens random_plain_tokens(std::uint64_t tokens, std::uint64_t cols, std::uint64_t seed) {
  Tokens t = random_tokens(tokens, cols, seed);
  for (std::uint64_t i = 0; i < tokens; ++i) {
    for (float& x : std::span(t.x8).subspan(i * cols, cols)) x = libquant::round_bf16(x * t.scale[i] * 0.9F);
  }
  return t;
}

class LinearChecker {
 public:
  // w: operands and row scales as the forward pass has them. exact(row, col): the operand by definition.
  using Exact = std::function<double(std::uint64_t row, std::uint64_t col)>;
  LinearChecker(const LinearWeights& w, Exact exact, int threads)
      : q_(w), exact_(std::move(exact)), threads_(threads) {}

  // Largest deviation of one token's outputs, relative to that token's output norm.
  double product_error(const Tokens& tokens) const {
    const std::uint64_t m = tokens.scale.size();
    std::vector<float> y(m * q_.rows);
    gemm_nt(tokens.x8, q_.weight, y, m, q_.rows, q_.cols, threads_);
    std::vector<double> error(q_.rows * m);
    std::vector<double> reference(q_.rows * m);
    parallel_for(q_.rows, threads_, [&](std::size_t r) {
      for (std::uint64_t t = 0; t < m; ++t) {
        double sum = 0;
        for (std::uint64_t k = 0; k < q_.cols; ++k) {
          sum += static_cast<double>(tokens.x8[t * q_.cols + k]) * exact_(r, k);
        }
        reference[t * q_.rows + r] = sum;
        error[t * q_.rows + r] = static_cast<double>(y[t * q_.rows + r]) - sum;
      }
    });
    double worst = 0;
    for (std::uint64_t t = 0; t < m; ++t) {
      double e = 0;
      double n = 0;
      for (std::uint64_t r = 0; r < q_.rows; ++r) {
        e += error[t * q_.rows + r] * error[t * q_.rows + r];
        n += reference[t * q_.rows + r] * reference[t * q_.rows + r];
      }
      if (n > 0) worst = std::max(worst, std::sqrt(e / n));
    }
    return worst;
  }

  void compare(const LinearWeights& reference, LinearCheck& check) const {
    std::vector<libquant::ErrorSums> rows(q_.rows);
    std::vector<WorstGroup> worst(q_.rows);
    parallel_for(q_.rows, threads_, [&](std::size_t r) {
      std::vector<float> value(q_.weight.begin() + static_cast<std::ptrdiff_t>(r * q_.cols),
                               q_.weight.begin() + static_cast<std::ptrdiff_t>((r + 1) * q_.cols));
      if (!q_.row_scale.empty()) {
        for (float& v : value) v *= q_.row_scale[q_.row_scale.size() == 1 ? 0 : r];
      }
      const std::span<const float> original(reference.weight.data() + r * q_.cols, q_.cols);
      for (std::uint64_t g = 0; g * kGroupSize < q_.cols; ++g) {
        const std::uint64_t begin = g * kGroupSize;
        const std::uint64_t count = std::min(kGroupSize, q_.cols - begin);
        libquant::ErrorSums sums;
        sums.add(original.subspan(begin, count), std::span<const float>(value).subspan(begin, count));
        if (sums.reference_sq > 0 && sums.relative() > worst[r].relative_error)
          worst[r] = {r, g, sums.relative()};
        rows[r].merge(sums);
      }
    });
    libquant::ErrorSums total;
    WorstGroup worst_group;
    for (std::uint64_t r = 0; r < q_.rows; ++r) {
      total.merge(rows[r]);
      if (worst[r].relative_error > worst_group.relative_error) worst_group = worst[r];
    }
    check.relative_error = total.relative();
    check.snr_db = total.snr_db();
    check.worst_group = worst_group;
  }

 private:
  const LinearWeights& q_;
  Exact exact_;
  int threads_;
};

double subnormal_share(const QuantizedLinear& q) {
  const auto subnormal =
      std::count_if(q.group_scales.begin(), q.group_scales.end(), [](std::uint8_t b) { return b < 8; });
  return static_cast<double>(subnormal) / static_cast<double>(q.group_scales.size());
}

// One linear of whatever precision.
LinearCheck check_linear(const WeightSource& packed, const LinearWeights& w, std::uint64_t layer,
                         std::size_t i, const LinearWeights* reference, const ValidateOptions& options) {
  LinearCheck check;
  check.name = w.name;
  check.rows = w.rows;
  check.cols = w.cols;
  check.precision = packed.precision(layer, i);
  const ExactE4m3 e4m3;
  LinearChecker::Exact exact;
  QuantizedLinear q;
  if (check.precision == ModulePrecision::int4) {
    q = packed.quantized(layer, i);
    check.subnormal_scales = subnormal_share(q);
    exact = [&](std::uint64_t row, std::uint64_t col) {
      const std::uint8_t code = q.code(row, col);
      const double sigma = e4m3.value(q.group_scales[row * q.groups() + col / kGroupSize]);
      const double operand = e4m3.round(static_cast<double>(q.levels.magnitude[code & 7U]) * sigma);
      return (code & 8U) != 0 ? -operand : operand;
    };
  } else if (check.precision == ModulePrecision::fp8) {
    const TensorView codes = packed.reader().tensor(w.name + ".weight");
    exact = [&e4m3, codes](std::uint64_t row, std::uint64_t col) {
      const auto byte = std::to_integer<std::uint8_t>(codes.data[row * codes.shape[1] + col]);
      const double operand = e4m3.value(static_cast<std::uint8_t>(byte & 0x7FU));
      return (byte & 0x80U) != 0 ? -operand : operand;
    };
  } else {
    exact = [&w](std::uint64_t row, std::uint64_t col) {
      return static_cast<double>(w.weight[row * w.cols + col]);
    };
  }
  const LinearChecker checker(w, std::move(exact), options.threads);
  const std::uint64_t seed = options.seed * 1'000'003 + layer * kLinears + i;
  check.product_relative_error =
      checker.product_error(w.plain_input ? random_plain_tokens(options.product_tokens, w.cols, seed)
                                          : random_tokens(options.product_tokens, w.cols, seed));
  if (reference != nullptr) checker.compare(*reference, check);
  return check;
}

}  // namespace

std::vector<LinearCheck> validate_linears(const WeightSource& packed, const ValidateOptions& options,
                                          Progress& progress) {
  const formats::ModelConfig& config = packed.config();
  std::vector<LinearCheck> checks;
  progress.begin("validate", config.layers);
  for (std::uint64_t layer = 0; layer < config.layers; ++layer) {
    check_interrupt();
    std::optional<LayerWeights> reference;
    if (options.folded_reference != nullptr)
      reference = options.folded_reference->load_layer(layer, options.threads);
    const LayerWeights weights = packed.load_layer(layer, options.threads);
    for (std::size_t i = 0; i < kLinears; ++i) {
      checks.push_back(check_linear(packed, weights.linear[i], layer, i,
                                    reference ? &reference->linear[i] : nullptr, options));
    }
    progress.advance(layer + 1);
  }
  progress.end();
  return checks;
}

}  // namespace fireq::calib
