// One block of rows of the curvature quantiser (curvature_quantizer.hpp says what it does), step by step.
// Internal. Rows of a block share matrix products; nothing here knows of rows elsewhere.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/blas.hpp"
#include "libquant/curvature_quantizer.hpp"
#include "libquant/float_bits.hpp"
#include "libquant/group_table.hpp"
#include "libquant/number_formats.hpp"
#include "libquant/row_kernels.hpp"

namespace fireq::libquant::curvature_block {

using blas::Op;

inline constexpr std::uint8_t kTopScale = 0x7e;     // 448
inline constexpr std::uint8_t kTopRowScale = 0x66;  // 56: no product saturates
inline constexpr std::uint64_t kNoGroup = std::numeric_limits<std::uint64_t>::max();
// Rows that share products with H. A fixed cut: it decides the order of sums.
inline constexpr std::uint64_t kRowBlock = 64;

// Scales of a group that are tried in full at its start.
inline constexpr std::size_t kTrials = 3;

using GroupValues = std::array<float, kGroupSize>;

// Index and sign of the operand nearest to w, as a 4-bit code.
inline std::uint8_t nearest_code(const GroupTable& table, float w) {
  const auto bits = std::bit_cast<std::uint32_t>(w);
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  unsigned index = 0;
  for (std::size_t j = 0; j < 7; ++j) index += magnitude >= table.threshold[j] ? 1U : 0U;
  const unsigned sign = magnitude >= table.threshold[7] ? bits >> 31U : 0U;
  return static_cast<std::uint8_t>(index | sign << 3U);
}

inline float value_of(const GroupTable& table, std::uint8_t code) {
  const float magnitude = table.value[code & 7U];
  return (code & 8U) != 0 ? -magnitude : magnitude;
}

inline double dot(const float* a, const float* b, std::size_t n) {
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

// y += factor * x.
inline void add_scaled(float factor, const float* x, float* y, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

// r near `wanted` with 56 r a bf16 number.
inline float storable_row_scale(double wanted) {
  return round_bf16(static_cast<float>(56.0 * wanted)) / 56.0F;
}

// One thread's work on one block of rows.
class BlockQuantizer {
 public:
  BlockQuantizer(const CurvatureFactor& curvature, const CurvatureQuantizerOptions& options,
                 QuantizedLinear& out, std::uint64_t begin, std::uint64_t count)
      : curvature_(curvature),
        options_(options),
        out_(out),
        k_(out.cols),
        groups_(out.groups()),
        begin_(begin),
        count_(count),
        row_scaled_(options.row_scale == RowScale::row),
        pins_(row_scaled_ && options.pin_top_scale),
        top_(row_scaled_ ? kTopRowScale : kTopScale),
        error_(count * k_),
        value_(count * k_),
        code_(count * k_),
        sigma_(count * groups_, 1),
        first_scale_(count) {
    tables_.reserve(count);
    for (std::uint64_t i = 0; i < count; ++i)
      tables_.emplace_back(out.levels, Rounding::product, Dtype::f32, true);
    offsets_.push_back(0);  // nearest first, then the lower code: the first least error wins
    for (int step = 1; step <= std::max(-options.search_low, options.search_high); ++step) {
      if (-step >= options.search_low) offsets_.push_back(-step);
      if (step <= options.search_high) offsets_.push_back(step);
    }
  }

  // The steps, one by one: rows may depend on one another (curvature_quantizer.cpp).

  // w [count, K] and gradient [count, K], room for the descent, outlive this.
  void begin(const float* w, float* gradient) {
    w_ = w;
    gradient_ = gradient;
    pinned_.assign(count_, kNoGroup);
    for (std::uint64_t i = 0; i < count_; ++i) set_first_scale(i);
  }

  struct Columns {
    std::uint64_t begin, size;
  };
  Columns columns(std::uint64_t group) const {
    const std::uint64_t begin = group * kGroupSize;
    return {begin, std::min(kGroupSize, k_ - begin)};
  }
  std::uint64_t begin_row() const { return begin_; }
  std::uint64_t rows() const { return count_; }
  const float* errors() const { return error_.data(); }  // [count, K]
  const float* value(std::uint64_t i) const { return value_.data() + i * k_; }

  // 1. For each group in order: start_group, then each row. `target` [128] is what the group's columns of row
  // i should come near to.
  void start_group(std::uint64_t g) {
    const Columns c = columns(g);
    // What the columns before this group put into its terms.
    before_.assign(count_ * kGroupSize, 0.0F);
    if (c.begin > 0) {
      blas::gemm(Op::none, Op::none, count_, c.size, c.begin, 1.0F, {error_.data(), k_},
                 {curvature_.upper.data() + c.begin, k_}, 0.0F, {before_.data(), kGroupSize});
    }
    importance_ = {};
    for (std::uint64_t j = 0; j < c.size; ++j) {
      const float u = upper(c.begin + j)[c.begin + j];
      importance_[j] = u * u;
    }
  }

  void round_row(std::uint64_t g, std::uint64_t i, const float* target) {
    const Columns c = columns(g);
    float* error = error_.data() + i * k_ + c.begin;
    const float* before = before_.data() + i * kGroupSize;

    // The real numbers that would cancel every term of the group: what its scale has to cover.
    GroupValues term{};
    GroupValues magnitude{};
    std::copy_n(before, c.size, term.begin());
    float largest = 0;
    for (std::uint64_t j = 0; j < c.size; ++j) {
      const float* u = upper(c.begin + j) + c.begin;
      const float step = term[j] / u[j];
      magnitude[j] = std::fabs(target[j] + step);
      largest = std::max(largest, magnitude[j]);
      add_scaled(-step, u + j + 1, term.data() + j + 1, c.size - j - 1);
    }
    Trial best;
    if (pinned_[i] == g || largest == 0) {
      best.sigma = pinned_[i] == g ? kTopRowScale : 1;
      round_with(i, c, target, before, best);
    } else {
      for (const std::uint8_t sigma : search(i, magnitude, importance_, largest)) {
        if (sigma == 0) break;
        Trial trial;
        trial.sigma = sigma;
        round_with(i, c, target, before, trial);
        if (best.sigma == 0 || trial.error < best.error) best = trial;
      }
    }
    sigma_[i * groups_ + g] = best.sigma;
    const GroupTable& table = tables_[i].get(best.sigma);
    for (std::uint64_t j = 0; j < c.size; ++j) {
      code_[i * k_ + c.begin + j] = best.code[j];
      value_[i * k_ + c.begin + j] = value_of(table, best.code[j]);
      error[j] = target[j] - value_of(table, best.code[j]);
    }
  }

  // 2. error(i) = w - v and gradient(i) = (w - v) H from here on. Returns the sum of w H w^T.
  double start_descent() {
    for (std::size_t k = 0; k < count_ * k_; ++k) error_[k] = w_[k] - value_[k];
    toward_.resize(count_ * k_);
    const auto multiply = [&](const float* rows, float* to) {
      blas::gemm(Op::none, Op::none, count_, k_, k_, 1.0F, {rows, k_}, {curvature_.matrix.data(), k_}, 0.0F,
                 {to, k_});
    };
    multiply(w_, toward_.data());
    multiply(error_.data(), gradient_);
    return dot(w_, toward_.data(), count_ * k_);
  }
  const float* toward(std::uint64_t i) const { return toward_.data() + i * k_; }
  double energy() const { return dot(error_.data(), gradient_, count_ * k_); }

  // For each group: start_improving, all rows (some at a time), finish_improving. `gradient` [last - first,
  // 128]: half of how the whole error falls as each value of the group rises, over the weight of its row.
  void start_improving() { change_.assign(count_ * kGroupSize, 0.0F); }
  void improve_rows(std::uint64_t g, std::uint64_t first, std::uint64_t last, const float* gradient) {
    local_ = gradient;
    first_ = first;
    last_ = last;
    best_.assign(last - first, {});
    try_scale(g, 0);
    for (int step = 1; step <= options_.scale_step; ++step) {
      try_scale(g, -step);
      try_scale(g, step);
    }
    for (std::uint64_t i = first; i < last; ++i) take_best(g, i);
  }
  const float* change(std::uint64_t i) const { return change_.data() + i * kGroupSize; }
  void finish_improving(std::uint64_t g, int threads) {
    const Columns c = columns(g);
    for (std::uint64_t i = 0; i < count_; ++i) {
      for (std::uint64_t j = 0; j < c.size; ++j) {
        error_[i * k_ + c.begin + j] = w_[i * k_ + c.begin + j] - value_[i * k_ + c.begin + j];
      }
    }
    constexpr std::uint64_t kColumns = 512;
    parallel_for((k_ + kColumns - 1) / kColumns, threads, [&](std::size_t task) {
      const std::uint64_t first = task * kColumns;
      blas::gemm(Op::none, Op::none, count_, std::min(kColumns, k_ - first), c.size, -1.0F,
                 {change_.data(), kGroupSize}, {curvature_.matrix.data() + c.begin * k_ + first, k_}, 1.0F,
                 {gradient_ + first, k_});
    });
  }

  // The multiple of v that is nearest to w under H; (v H) = (w H) - gradient. lean: empty, or [K] (t - w) H
  // where t and not w is what v should come near to. False: nothing changed.
  bool refit_row(std::uint64_t i, std::span<const float> lean) {
    if (!row_scaled_) return false;
    float* v = value_.data() + i * k_;
    float* gradient = gradient_ + i * k_;
    const float* toward = toward_.data() + i * k_;
    double numerator = 0;
    double denominator = 0;
    for (std::uint64_t k = 0; k < k_; ++k) {
      const double value = v[k];
      numerator +=
          value * (static_cast<double>(toward[k]) + (lean.empty() ? 0 : static_cast<double>(lean[k])));
      denominator += value * (static_cast<double>(toward[k]) - static_cast<double>(gradient[k]));
    }
    if (!(denominator > 0) || !(numerator > 0)) return false;
    if (pins_ && pinned_[i] == kNoGroup) return false;
    const double now = row_scale(i);
    const double first = first_scale_[i];
    const double wanted =
        std::clamp(now * numerator / denominator, static_cast<double>(options_.row_low) * first,
                   static_cast<double>(options_.row_high) * first);
    const float next = std::max(storable_row_scale(wanted), kLeastRowScale);
    const double ratio = static_cast<double>(next) / now;
    // error(x) = const - 2 x numerator + x^2 denominator: rounding may have passed the best by too far.
    if (!((ratio - 1) * ((ratio + 1) * denominator - 2 * numerator) < 0) || !(next > 0)) return false;
    row_scale(i) = next;
    tables_[i].set_row_scale(next);
    const auto factor = static_cast<float>(ratio);
    for (std::uint64_t g = 0; g < groups_; ++g) {
      const Columns c = columns(g);
      const GroupTable& table = tables_[i].get(sigma_[i * groups_ + g]);
      for (std::uint64_t k = c.begin; k < c.begin + c.size; ++k) {
        gradient[k] = toward[k] - factor * (toward[k] - gradient[k]);
        v[k] = value_of(table, code_[i * k_ + k]);
        error_[i * k_ + k] = w_[i * k_ + k] - v[k];
      }
    }
    return true;
  }

  void store() {
    const std::uint64_t row_bytes = out_.padded_cols() / 2;
    for (std::uint64_t i = 0; i < count_; ++i) {
      std::copy_n(sigma_.begin() + static_cast<std::ptrdiff_t>(i * groups_), groups_,
                  out_.group_scales.begin() + static_cast<std::ptrdiff_t>((begin_ + i) * groups_));
      std::uint8_t* codes = out_.codes.data() + (begin_ + i) * row_bytes;
      std::fill_n(codes, row_bytes, std::uint8_t{0});
      for (std::uint64_t k = 0; k < k_; ++k) {
        const std::uint8_t code = code_[i * k_ + k];
        codes[k / 2] = static_cast<std::uint8_t>(codes[k / 2] | (k % 2 == 0 ? code : code << 4U));
      }
    }
  }

 private:
  struct Trial {  // a group of a row, rounded in one way
    std::uint8_t sigma = 0;
    double error = 0;
    std::array<std::uint8_t, kGroupSize> code{};
  };
  struct Candidate {  // what it could become
    double change = 0;
    std::uint8_t sigma = 0;  // 0: stay
    std::array<std::uint8_t, kGroupSize> code{};
  };
  float& row_scale(std::uint64_t i) { return out_.row_scales[row_scaled_ ? begin_ + i : 0]; }

  void set_first_scale(std::uint64_t i) {
    const float* row = w_ + i * k_;
    float largest = 0;
    for (std::uint64_t k = 0; k < k_; ++k) {
      if (!std::isfinite(row[k])) {
        throw Error(ErrorKind::input, "a weight is not a finite number")
            .expected("finite weights")
            .found(std::string(std::isnan(row[k]) ? "NaN" : "infinity") + " at [" +
                   std::to_string(begin_ + i) + ", " + std::to_string(k) + "]");
      }
      largest = std::max(largest, std::fabs(row[k]));
    }
    if (row_scaled_) row_scale(i) = row_scale_for(largest, out_.levels.magnitude[7]);
    tables_[i].set_row_scale(row_scale(i));
    if (pins_) pin_top(i);
    first_scale_[i] = row_scale(i);
    tables_[i].set_row_scale(first_scale_[i]);
  }

  // The group whose scale comes out largest when each is rounded by itself keeps 56, and r fits to it.
  void pin_top(std::uint64_t i) {
    std::uint8_t top = 0;
    for (std::uint64_t g = 0; g < groups_; ++g) {
      const Columns c = columns(g);
      GroupValues magnitude{};
      GroupValues weight{};
      float largest = 0;
      for (std::uint64_t j = 0; j < c.size; ++j) {
        magnitude[j] = std::fabs(w_[i * k_ + c.begin + j]);
        weight[j] = curvature_.matrix[(c.begin + j) * k_ + c.begin + j];
        largest = std::max(largest, magnitude[j]);
      }
      if (largest == 0) continue;
      const std::uint8_t sigma = search(i, magnitude, weight, largest)[0];
      if (sigma <= top) continue;
      top = sigma;
      pinned_[i] = g;
    }
    if (top > 0) row_scale(i) = row_scale_with_top(decode_e4m3(top) * row_scale(i));
    if (row_scale(i) <= kLeastRowScale) pinned_[i] = kNoGroup;
  }

  const float* upper(std::uint64_t row) const { return curvature_.upper.data() + row * k_; }

  // Rounds one group with trial.sigma, column by column; the error is the sum of its terms' squares.
  void round_with(std::uint64_t i, const Columns& c, const float* w, const float* before, Trial& trial) {
    const GroupTable& table = tables_[i].get(trial.sigma);
    GroupValues term{};
    std::copy_n(before, c.size, term.begin());
    for (std::uint64_t j = 0; j < c.size; ++j) {
      const float* u = upper(c.begin + j) + c.begin;
      trial.code[j] = nearest_code(table, w[j] + term[j] / u[j]);
      const float error = w[j] - value_of(table, trial.code[j]);
      const auto left = static_cast<double>(term[j] + error * u[j]);
      trial.error += left * left;
      add_scaled(error, u + j + 1, term.data() + j + 1, c.size - j - 1);
    }
  }

  // The scales that promise least, best first, 0 after the last: the weighted squared errors of rounding each
  // weight by itself leave out what rounding one does to the next.
  std::array<std::uint8_t, kTrials> search(std::uint64_t i, const GroupValues& magnitude,
                                           const GroupValues& weight, float largest) {
    const double unit = static_cast<double>(row_scale(i)) * static_cast<double>(out_.levels.magnitude[7]);
    const std::uint8_t base = group_scale_code(static_cast<double>(largest), unit, 1.0 / unit, top_);
    std::array<const GroupTable*, 256> candidates{};
    std::array<std::uint8_t, 256> codes{};
    std::array<float, 256> errors{};
    std::size_t n = 0;
    for (const int offset : offsets_) {
      const int code = static_cast<int>(base) + offset;
      if (code < 1 || code > static_cast<int>(top_)) continue;
      codes[n] = static_cast<std::uint8_t>(code);
      candidates[n++] = &tables_[i].get(static_cast<std::uint8_t>(code));
    }
    kernels().search_errors(magnitude.data(), weight.data(), candidates.data(), n, errors.data());
    std::array<std::uint8_t, kTrials> best{};
    for (std::uint8_t& sigma : best) {
      auto* const least = std::min_element(errors.begin(), errors.begin() + static_cast<std::ptrdiff_t>(n));
      if (!std::isfinite(*least)) break;
      sigma = codes[static_cast<std::size_t>(least - errors.begin())];
      *least = std::numeric_limits<float>::infinity();
    }
    if (best[0] == 0) best[0] = base;
    return best;
  }

  // --- 2.

  // The group's scale moved by `offset`, then each code in turn: the error changes by -2 d g + d H d^T, d the
  // change of values.
  void try_scale(std::uint64_t g, int offset) {
    const Columns c = columns(g);
    const std::uint64_t n = last_ - first_;
    step_.resize(n * kGroupSize);
    product_.assign(n * kGroupSize, 0.0F);
    for (std::uint64_t i = first_; i < last_; ++i) scale_change(g, i, offset);
    if (offset != 0) {
      blas::gemm(Op::none, Op::none, n, c.size, c.size, 1.0F, {step_.data(), kGroupSize},
                 {curvature_.matrix.data() + c.begin * k_ + c.begin, k_}, 0.0F,
                 {product_.data(), kGroupSize});
    }
    for (std::uint64_t i = first_; i < last_; ++i) {
      const int sigma = static_cast<int>(sigma_[i * groups_ + g]) + offset;
      if (!allowed(g, i, sigma)) continue;
      Candidate candidate;
      candidate.sigma = static_cast<std::uint8_t>(sigma);
      const std::uint64_t at = (i - first_) * kGroupSize;
      const float* step = step_.data() + at;
      const float* product = product_.data() + at;
      const float* local = local_ + at;
      candidate.change = dot(step, product, c.size) - 2 * dot(step, local, c.size);
      GroupValues gradient{};
      for (std::uint64_t j = 0; j < c.size; ++j) gradient[j] = local[j] - product[j];
      descend_codes(g, i, gradient, candidate);
      if (candidate.change < best_[i - first_].change) best_[i - first_] = candidate;
    }
  }

  // One sweep over the codes of a group, under the candidate's scale. gradient is that of its start.
  void descend_codes(std::uint64_t g, std::uint64_t i, GroupValues& gradient, Candidate& candidate) {
    const Columns c = columns(g);
    const GroupTable& table = tables_[i].get(candidate.sigma);
    for (std::uint64_t j = 0; j < c.size; ++j) {
      const float* h = curvature_.matrix.data() + (c.begin + j) * k_ + c.begin;
      candidate.code[j] = code_[i * k_ + c.begin + j];
      const float value = value_of(table, candidate.code[j]);
      const std::uint8_t code = nearest_code(table, value + gradient[j] / h[j]);
      const float step = value_of(table, code) - value;
      if (step == 0.0F) continue;
      candidate.code[j] = code;
      candidate.change += static_cast<double>(step) * (static_cast<double>(step) * static_cast<double>(h[j]) -
                                                       2 * static_cast<double>(gradient[j]));
      add_scaled(-step, h, gradient.data(), c.size);
    }
  }

  void take_best(std::uint64_t g, std::uint64_t i) {
    const Candidate& best = best_[i - first_];
    if (best.sigma == 0) return;
    const Columns c = columns(g);
    sigma_[i * groups_ + g] = best.sigma;
    const GroupTable& table = tables_[i].get(best.sigma);
    for (std::uint64_t j = 0; j < c.size; ++j) {
      const std::uint64_t at = i * k_ + c.begin + j;
      const float value = value_of(table, best.code[j]);
      change_[i * kGroupSize + j] = value - value_[at];
      code_[at] = best.code[j];
      value_[at] = value;
    }
  }

  bool allowed(std::uint64_t g, std::uint64_t i, int sigma) const {
    if (pinned_[i] == g) return sigma == static_cast<int>(kTopRowScale);
    return sigma >= 1 && sigma <= static_cast<int>(top_);
  }

  // step_ of row i: values with sigma moved by `offset` less values now; zero where that sigma cannot be.
  void scale_change(std::uint64_t g, std::uint64_t i, int offset) {
    const Columns c = columns(g);
    float* step = step_.data() + (i - first_) * kGroupSize;
    const int sigma = static_cast<int>(sigma_[i * groups_ + g]) + offset;
    if (!allowed(g, i, sigma)) {
      std::fill_n(step, c.size, 0.0F);
      return;
    }
    const GroupTable& table = tables_[i].get(static_cast<std::uint8_t>(sigma));
    const std::uint64_t first = i * k_ + c.begin;
    for (std::uint64_t j = 0; j < c.size; ++j)
      step[j] = value_of(table, code_[first + j]) - value_[first + j];
  }

  const CurvatureFactor& curvature_;
  const CurvatureQuantizerOptions& options_;
  QuantizedLinear& out_;
  const std::uint64_t k_, groups_, begin_, count_;
  const bool row_scaled_;
  const bool pins_;
  const std::uint8_t top_;
  const float* w_ = nullptr;                // [count, K]
  std::vector<float> error_, value_;        // [count, K] w - v and v
  std::vector<std::uint8_t> code_, sigma_;  // [count, K], [count, groups]
  std::vector<float> first_scale_;          // [count]
  std::vector<std::uint64_t> pinned_;       // [count] the group whose scale stays 56, or kNoGroup
  std::vector<GroupTables> tables_;         // [count]
  std::vector<int> offsets_;
  float* gradient_ = nullptr;  // [count, K] (w - v) H
  std::vector<float> toward_;  // [count, K] w H
  // Of the group at work.
  GroupValues importance_{};
  std::vector<float> before_, change_;  // [count, 128]
  std::uint64_t first_ = 0, last_ = 0;  // rows at work
  const float* local_ = nullptr;        // [last - first, 128]
  std::vector<float> step_, product_;   // [last - first, 128]
  std::vector<Candidate> best_;         // [last - first]
};

}  // namespace fireq::libquant::curvature_block
