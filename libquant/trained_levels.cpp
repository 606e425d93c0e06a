#include "libquant/trained_levels.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/blas.hpp"

namespace fireq::libquant {
namespace {

using blas::Op;

constexpr std::size_t kLevels = 8;
constexpr std::uint64_t kRowsPerTask = 8;
constexpr double kFirstStretch = 4;

// level A level^T - 2 b level + constant: the error of some rows in their levels.
struct Quadratic {
  std::array<std::array<double, kLevels>, kLevels> a{};
  std::array<double, kLevels> b{};
  double constant = 0;

  void add(const Quadratic& other) {
    for (std::size_t i = 0; i < kLevels; ++i) {
      for (std::size_t j = 0; j < kLevels; ++j) a[i][j] += other.a[i][j];
      b[i] += other.b[i];
    }
    constant += other.constant;
  }
  double at(const Levels& levels) const {
    double sum = constant;
    for (std::size_t i = 0; i < kLevels; ++i) {
      const double x = levels.magnitude[i];
      sum -= 2 * b[i] * x;
      for (std::size_t j = 0; j < kLevels; ++j) sum += x * a[i][j] * static_cast<double>(levels.magnitude[j]);
    }
    return sum;
  }
};

double product(const float* a, const float* b, std::uint64_t n) {
  double sum = 0;
  for (std::uint64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

// Of one row. The products' rounding is taken as part of the scale.
Quadratic row_quadratic(const float* w, std::uint64_t row, const QuantizedLinear& q,
                        const ProductTable& table, const CurvatureFactor& curvature, double weight,
                        std::vector<float>& parts, std::vector<float>& products) {
  const std::uint64_t k = q.cols;
  // The 8 parts of v and the row itself, then all times H.
  parts.assign((kLevels + 1) * k, 0.0F);
  products.resize(parts.size());
  for (std::uint64_t c = 0; c < k; ++c) {
    const std::uint8_t code = q.code(row, c);
    const std::size_t i = code & 7U;
    const std::uint8_t sigma = q.group_scales[row * q.groups() + c / kGroupSize];
    const float level = q.levels.magnitude[i];
    if (level == 0.0F) continue;
    const float scale = q.row_scales[row] * table.value[sigma][i] / level;
    parts[i * k + c] = (code & 8U) != 0 ? -scale : scale;
  }
  std::copy_n(w, k, parts.data() + kLevels * k);
  blas::gemm(Op::none, Op::none, kLevels + 1, k, k, 1.0F, {parts.data(), k}, {curvature.matrix.data(), k},
             0.0F, {products.data(), k});
  Quadratic out;
  for (std::size_t i = 0; i < kLevels; ++i) {
    for (std::size_t j = 0; j < kLevels; ++j) {
      out.a[i][j] = weight * product(parts.data() + i * k, products.data() + j * k, k);
    }
    out.b[i] = weight * product(parts.data() + i * k, products.data() + kLevels * k, k);
  }
  out.constant = weight * product(w, products.data() + kLevels * k, k);
  return out;
}

bool increasing(const Levels& levels) {
  for (std::size_t i = 0; i < kLevels; ++i) {
    if (!std::isfinite(levels.magnitude[i])) return false;
    if (i > 0 && levels.magnitude[i] <= levels.magnitude[i - 1]) return false;
  }
  return true;
}

// Where the quadratic is least, with its largest at 8; nothing when that is no set of levels.
std::optional<Levels> least(Quadratic q, const Levels& now) {
  double trace = 0;
  for (std::size_t i = 0; i < kLevels; ++i) trace += q.a[i][i];
  if (!(trace > 0) || !std::isfinite(trace)) return std::nullopt;
  // An index that no weight has stays where it is.
  for (std::size_t i = 0; i < kLevels; ++i) {
    const double pull = 1e-6 * trace;
    q.a[i][i] += pull;
    q.b[i] += pull * static_cast<double>(now.magnitude[i]);
  }
  // Elimination; the matrix is symmetric and positive definite.
  for (std::size_t p = 0; p < kLevels; ++p) {
    for (std::size_t i = p + 1; i < kLevels; ++i) {
      const double factor = q.a[i][p] / q.a[p][p];
      for (std::size_t j = p; j < kLevels; ++j) q.a[i][j] -= factor * q.a[p][j];
      q.b[i] -= factor * q.b[p];
    }
  }
  std::array<double, kLevels> x{};
  for (std::size_t p = kLevels; p-- > 0;) {
    double sum = q.b[p];
    for (std::size_t j = p + 1; j < kLevels; ++j) sum -= q.a[p][j] * x[j];
    x[p] = sum / q.a[p][p];
  }
  Levels levels;
  for (std::size_t i = 0; i < kLevels; ++i) {
    levels.magnitude[i] = static_cast<float>(std::max(0.0, x[i] * 8 / x[kLevels - 1]));
  }
  levels.magnitude[kLevels - 1] = 8;
  if (!increasing(levels)) return std::nullopt;
  return levels;
}

// On the way from `from` to `toward`, or past it; the largest is 8.
Levels beyond(Levels from, const Levels& toward, double stretch) {
  const float top = from.magnitude[kLevels - 1];
  for (float& m : from.magnitude) m *= 8 / top;
  Levels out;
  for (std::size_t i = 0; i < kLevels; ++i) {
    const double a = from.magnitude[i];
    out.magnitude[i] =
        static_cast<float>(std::max(0.0, a + stretch * (static_cast<double>(toward.magnitude[i]) - a)));
  }
  return out;
}

}  // namespace

Levels train_levels(std::span<const float> w, std::uint64_t rows, const CurvatureFactor& curvature,
                    std::span<const float> row_weight, const CurvatureQuantizerOptions& options,
                    const Levels& start, const LevelTraining& training, int threads) {
  const std::uint64_t k = curvature.cols;
  if (w.size() != rows * k || (!row_weight.empty() && row_weight.size() != rows) ||
      options.row_scale != RowScale::row) {
    throw Error(ErrorKind::internal, "levels to train for weights of another shape");
  }
  const std::uint64_t count = std::min(rows, training.most_rows);
  std::vector<float> sample(count * k);
  std::vector<double> weight(count, 1.0);
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::uint64_t row = i * rows / count;
    std::copy_n(w.data() + row * k, k, sample.data() + i * k);
    if (!row_weight.empty()) weight[i] = row_weight[row];
  }
  CurvatureQuantizerOptions rounding = options;
  rounding.passes = 0;
  // Rounds with these levels: the quadratic about them.
  const auto quadratic = [&](const Levels& levels) {
    QuantizedLinear q = make_quantized_linear(count, k, levels, false);
    quantize_with_curvature(sample, curvature, rounding, threads, q);
    const ProductTable table(levels);
    std::vector<Quadratic> parts((count + kRowsPerTask - 1) / kRowsPerTask);
    parallel_for(parts.size(), threads, [&](std::size_t task) {
      std::vector<float> split;
      std::vector<float> products;
      for (std::uint64_t i = task * kRowsPerTask; i < std::min(count, (task + 1) * kRowsPerTask); ++i) {
        parts[task].add(
            row_quadratic(sample.data() + i * k, i, q, table, curvature, weight[i], split, products));
      }
    });
    Quadratic whole;
    for (const Quadratic& part : parts) whole.add(part);
    return whole;
  };
  Levels best = start;
  Quadratic now = quadratic(best);
  double error = now.at(best);
  // The least given the codes is a short step, because the codes follow: it is lengthened while that pays.
  double stretch = kFirstStretch;
  for (unsigned round = 0; round < training.rounds; ++round) {
    const std::optional<Levels> toward = least(now, best);
    if (!toward) break;
    const Levels next = beyond(best, *toward, stretch);
    const Quadratic there = increasing(next) ? quadratic(next) : now;
    const double after = increasing(next) ? there.at(next) : error;
    if (after < error) {
      best = next;
      now = there;
      error = after;
    } else {
      stretch /= 2;
    }
  }
  return best;
}

}  // namespace fireq::libquant
