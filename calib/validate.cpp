#include "calib/validate.hpp"

#include <algorithm>
#include <cmath>
#include <random>

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

class LinearChecker {
 public:
  LinearChecker(const QuantizedLinear& q, int threads) : q_(q), threads_(threads) {
    const libquant::ProductTable table(q.levels);
    operand_.resize(q.rows * q.cols);
    parallel_for(q.rows, threads, [&](std::size_t r) {
      libquant::operand_rows(q, table, r, 1, std::span(operand_).subspan(r * q.cols, q.cols));
    });
  }

  // Largest deviation of one token's outputs, relative to that token's output norm.
  double product_error(const Tokens& tokens) const {
    const std::uint64_t m = tokens.scale.size();
    std::vector<float> y(m * q_.rows);
    gemm_nt(tokens.x8, operand_, y, m, q_.rows, q_.cols, threads_);
    std::vector<double> error(q_.rows * m);
    std::vector<double> reference(q_.rows * m);
    const ExactE4m3 exact;
    parallel_for(q_.rows, threads_, [&](std::size_t r) {
      for (std::uint64_t t = 0; t < m; ++t) {
        double sum = 0;
        for (std::uint64_t k = 0; k < q_.cols; ++k) {
          const std::uint8_t code = q_.code(r, k);
          const double sigma = exact.value(q_.group_scales[r * q_.groups() + k / kGroupSize]);
          const double operand = exact.round(static_cast<double>(q_.levels.magnitude[code & 7U]) * sigma);
          sum += static_cast<double>(tokens.x8[t * q_.cols + k]) * ((code & 8U) != 0 ? -operand : operand);
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
      std::vector<float> value(operand_.begin() + static_cast<std::ptrdiff_t>(r * q_.cols),
                               operand_.begin() + static_cast<std::ptrdiff_t>((r + 1) * q_.cols));
      for (float& v : value) v *= q_.row_scale(r);
      const std::span<const float> original(reference.weight.data() + r * q_.cols, q_.cols);
      for (std::uint64_t g = 0; g < q_.groups(); ++g) {
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
  const QuantizedLinear& q_;
  int threads_;
  std::vector<float> operand_;
};

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
    const auto names = formats::linear_names(layer);
    for (std::size_t i = 0; i < kLinears; ++i) {
      LinearCheck check;
      check.name = names[i];
      const QuantizedLinear q = packed.quantized(layer, i);
      try {
        libquant::check_quantized_linear(q);
      } catch (Error& e) {
        e.tensor_if_unset(names[i]);
        e.path_if_unset(packed.reader().folder());
        throw;
      }
      check.rows = q.rows;
      check.cols = q.cols;
      const auto subnormal =
          std::count_if(q.group_scales.begin(), q.group_scales.end(), [](std::uint8_t b) { return b < 8; });
      check.subnormal_scales = static_cast<double>(subnormal) / static_cast<double>(q.group_scales.size());
      const LinearChecker checker(q, options.threads);
      const std::uint64_t seed = options.seed * 1'000'003 + layer * kLinears + i;
      check.product_relative_error =
          checker.product_error(random_tokens(options.product_tokens, q.cols, seed));
      if (reference) checker.compare(reference->linear[i], check);
      checks.push_back(std::move(check));
    }
    progress.advance(layer + 1);
  }
  progress.end();
  return checks;
}

}  // namespace fireq::calib
