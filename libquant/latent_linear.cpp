#include "libquant/latent_linear.hpp"

#include <algorithm>
#include <cmath>

#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/curvature_block.hpp"

namespace fireq::libquant {
namespace {

constexpr double kMeanDecay = 0.9;
constexpr double kSquareDecay = 0.99;
constexpr std::uint64_t kRowsPerTask = 16;

}  // namespace

LatentLinear::LatentLinear(QuantizedLinear& linear)
    : linear_(linear),
      latent_(linear.rows * linear.cols),
      mean_(latent_.size(), 0.0F),
      square_(latent_.size(), 0.0F) {
  dequantize_rows(linear, ProductTable(linear.levels), 0, linear.rows, latent_);
}

void LatentLinear::step(std::span<const float> gradient, double rate, std::span<float> values, int threads) {
  const std::uint64_t rows = linear_.rows, cols = linear_.cols, groups = linear_.groups();
  if (gradient.size() != rows * cols || values.size() != rows * cols)
    throw Error(ErrorKind::internal, "gradients of another size than their weights");
  ++steps_;
  const auto count = static_cast<double>(steps_);
  // Means that began at zero, made up for.
  const double of_mean = 1 / (1 - std::pow(kMeanDecay, count));
  const double of_square = 1 / (1 - std::pow(kSquareDecay, count));
  const auto factor = static_cast<float>(rate * of_mean / std::sqrt(of_square));
  parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, threads, [&](std::size_t task) {
    GroupTables tables(linear_.levels, Rounding::product, Dtype::f32, true);
    const std::uint64_t last = std::min(rows, (task + 1) * kRowsPerTask);
    for (std::uint64_t n = task * kRowsPerTask; n < last; ++n) {
      const float r = linear_.row_scale(n);
      tables.set_row_scale(r);
      std::uint8_t* codes = linear_.codes.data() + n * (linear_.padded_cols() / 2);
      for (std::uint64_t k = 0; k < cols; ++k) {
        const std::uint8_t sigma = linear_.group_scales[n * groups + k / kGroupSize];
        const GroupTable& table = tables.get(sigma);
        const std::uint64_t at = n * cols + k;
        const float g = gradient[at];
        mean_[at] += static_cast<float>(1 - kMeanDecay) * (g - mean_[at]);
        square_[at] += static_cast<float>(1 - kSquareDecay) * (g * g - square_[at]);
        if (square_[at] > 0) {
          const float unit = table.value[7] / linear_.levels.magnitude[7];
          latent_[at] -= factor * unit * mean_[at] / std::sqrt(square_[at]);
          latent_[at] = std::clamp(latent_[at], -table.value[7], table.value[7]);
        }
        const std::uint8_t code = curvature_block::nearest_code(table, latent_[at]);
        values[at] = curvature_block::value_of(table, code);
        std::uint8_t& byte = codes[k / 2];
        const unsigned other = k % 2 == 0 ? byte & 0xf0U : byte & 0x0fU;
        byte = static_cast<std::uint8_t>(other | static_cast<unsigned>(code) << (k % 2 == 0 ? 0U : 4U));
      }
    }
  });
}

}  // namespace fireq::libquant
