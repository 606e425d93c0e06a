#include "calib/scoring.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <utility>

#include "calib/int4_weights.hpp"
#include "calib/simd.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"
#include "common/progress.hpp"
#include "formats/checkpoint.hpp"
#include "formats/fireq_folder.hpp"

namespace fireq::calib {
namespace {

constexpr std::uint64_t kRowBlock = 128;
constexpr std::uint64_t kTile = 256;  // columns: a tile of logits stays in the second cache

// The first index of the largest value so far.
struct Top {
  float value = std::numeric_limits<float>::lowest();
  std::uint64_t index = 0;
  void update(const float* logits, std::uint64_t n, std::uint64_t begin, float largest) {
    if (largest <= value) return;  // the running maximum did not rise in this tile
    value = largest;
    index = begin + static_cast<std::uint64_t>(std::find(logits, logits + n, largest) - logits);
  }
};

struct RowState {
  simd::LogSumExp model;
  simd::Divergence both;
  Top model_top, reference_top;
  float target = 0, reference_target = 0;
};

struct TileArea {
  FloatBuffer model, reference;
};

struct Side {
  OutputHead* head;
  FloatBuffer hidden;  // normalised
};

TokenScore token_score(const RowState& state, bool compared, std::uint64_t row) {
  TokenScore out;
  const simd::LogSumExp& sum = compared ? state.both.model : state.model;
  out.nll = simd::value(sum) - static_cast<double>(state.target);
  out.is_top1 = state.target >= sum.max;
  if (compared) {
    out.kl = simd::value(state.both);
    out.reference_nll = simd::value(state.both.reference) - static_cast<double>(state.reference_target);
    out.same_top1 = state.model_top.index == state.reference_top.index;
  }
  if (!std::isfinite(out.nll) || !std::isfinite(out.kl)) {
    throw Error(ErrorKind::input, "logits are not finite").found("scored token " + std::to_string(row));
  }
  return out;
}

// Scores of each model [models][rows]. The reference's logits, and parts of a head that models share, are
// made once for all of them.
std::vector<std::vector<TokenScore>> score(std::span<const Side> models, const Side* reference,
                                           std::span<const std::int32_t> targets, int threads) {
  const std::uint64_t rows = targets.size();
  const std::uint64_t vocab = models.front().head->vocab(), part_rows = models.front().head->part_rows();
  const auto comparable = [&](const Side& side) {
    return side.head->vocab() == vocab && side.head->part_rows() == part_rows;
  };
  if (!std::all_of(models.begin(), models.end(), comparable) ||
      (reference != nullptr && !comparable(*reference))) {
    throw Error(ErrorKind::internal, "output heads that cannot be compared");
  }
  std::vector<RowState> states(models.size() * rows);
  Pool<TileArea> pool;
  for (std::uint64_t begin = 0; begin < vocab; begin += part_rows) {
    check_interrupt();
    std::map<OutputHead*, const Panels*> parts;
    const auto part_of = [&](const Side& side) -> const Panels& {
      const Panels*& part = parts[side.head];
      if (part == nullptr) part = &side.head->part(begin / part_rows);
      return *part;
    };
    std::vector<const Panels*> model_parts;
    for (const Side& model : models) model_parts.push_back(&part_of(model));
    const Panels* const reference_part = reference == nullptr ? nullptr : &part_of(*reference);
    const std::uint64_t columns = model_parts.front()->rows();
    parallel_for((rows + kRowBlock - 1) / kRowBlock, threads, [&](std::size_t block) {
      const std::uint64_t first = block * kRowBlock;
      const std::uint64_t count = std::min(kRowBlock, rows - first);
      Pool<TileArea>::Loan area(pool);
      const auto logits = [&](const Side& side, const Panels& panels, std::uint64_t column, std::uint64_t n,
                              FloatBuffer& out) {
        const std::size_t stride = padded_stride(side.head->hidden());
        out.resize(kRowBlock * kTile);
        simd::kernels().gemm(side.hidden.data() + first * stride, stride, count,
                             panels.panel(column / simd::kPanel), simd::kPanel * panels.cols(), n,
                             panels.cols(), out.data(), kTile, false);
      };
      const auto update = [&](std::uint64_t i, std::uint64_t column, std::uint64_t n, RowState& state) {
        const float* row = area->model.data() + i * kTile;
        const auto target = static_cast<std::uint64_t>(targets[first + i]);
        const bool here = target >= begin + column && target < begin + column + n;
        if (here) state.target = row[target - begin - column];
        if (reference == nullptr) {
          simd::kernels().log_sum_exp(state.model, row, n);
          return;
        }
        const float* other = area->reference.data() + i * kTile;
        if (here) state.reference_target = other[target - begin - column];
        simd::kernels().divergence(state.both, other, row, n);
        state.model_top.update(row, n, begin + column, state.both.model.max);
        state.reference_top.update(other, n, begin + column, state.both.reference.max);
      };
      for (std::uint64_t column = 0; column < columns; column += kTile) {
        const std::uint64_t n = std::min(kTile, columns - column);
        if (reference != nullptr) logits(*reference, *reference_part, column, n, area->reference);
        for (std::size_t m = 0; m < models.size(); ++m) {
          logits(models[m], *model_parts[m], column, n, area->model);
          for (std::uint64_t i = 0; i < count; ++i) update(i, column, n, states[m * rows + first + i]);
        }
      }
    });
  }
  std::vector<std::vector<TokenScore>> out(models.size(), std::vector<TokenScore>(rows));
  for (std::size_t m = 0; m < models.size(); ++m) {
    for (std::uint64_t i = 0; i < rows; ++i)
      out[m][i] = token_score(states[m * rows + i], reference != nullptr, i);
  }
  return out;
}

Side make_side(OutputHead& head, std::span<const float> hidden, std::uint64_t rows) {
  if (hidden.size() != rows * head.hidden())
    throw Error(ErrorKind::internal, "hidden states of another size");
  Side side{&head, {}};
  head.normalise(hidden, rows, side.hidden);
  return side;
}

}  // namespace

std::uint64_t OutputHead::part_rows_for(std::uint64_t hidden, std::uint64_t bytes) noexcept {
  return std::max<std::uint64_t>(kTile, bytes / (hidden * sizeof(float)) / kTile * kTile);
}

OutputHead::OutputHead(const WeightSource& source, bool keep, std::uint64_t part_rows, int threads)
    : source_(source),
      threads_(threads),
      vocab_(source.config().vocab),
      hidden_(source.config().hidden),
      part_rows_(part_rows),
      norm_(source.final_norm()),
      keep_(keep) {
  panels_.resize(keep ? parts() : 1);
  if (keep) {
    for (std::uint64_t i = 0; i < parts(); ++i) load(i, panels_[i]);
  }
}

void OutputHead::load(std::uint64_t index, Panels& panels) {
  const auto start = std::chrono::steady_clock::now();
  const std::uint64_t begin = index * part_rows_;
  const std::uint64_t count = std::min(part_rows_, vocab_ - begin);
  if (panels.rows() != count) panels = Panels(count, hidden_);
  constexpr std::uint64_t kStep = kTile;
  parallel_for((count + kStep - 1) / kStep, threads_, [&](std::size_t task) {
    const std::uint64_t first = task * kStep;
    std::vector<float> values(std::min(kStep, count - first) * hidden_);
    source_.head_rows(begin + first, values.size() / hidden_, values);
    panels.set_rows(first, values);
  });
  if (!keep_) {  // or the mapped pages of the whole matrix would stay resident beside the part
    for (const char* const module : {formats::kHeadModule, formats::kEmbeddingModule}) {
      source_.reader().release(std::string(module) + ".weight");
      for (const std::string& part : int4_parts(source_.reader(), module)) source_.reader().release(part);
    }
  }
  load_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

const Panels& OutputHead::part(std::uint64_t index) {
  if (keep_) return panels_[index];
  load(index, panels_[0]);
  return panels_[0];
}

void OutputHead::normalise(std::span<const float> hidden, std::uint64_t rows, FloatBuffer& out) const {
  const std::size_t stride = padded_stride(hidden_);
  out.resize(rows * stride);
  const auto eps = static_cast<float>(source_.config().rms_eps);
  for (std::uint64_t i = 0; i < rows; ++i) {
    simd::kernels().rms_norm(hidden.data() + i * hidden_, norm_.data(), eps, hidden_,
                             out.data() + i * stride);
  }
}

std::vector<TokenScore> score_tokens(OutputHead& head, std::span<const float> hidden,
                                     std::span<const std::int32_t> targets, int threads) {
  const Side model = make_side(head, hidden, targets.size());
  return std::move(score({&model, 1}, nullptr, targets, threads).front());
}

std::vector<TokenScore> score_tokens(OutputHead& head, std::span<const float> hidden, OutputHead& reference,
                                     std::span<const float> reference_hidden,
                                     std::span<const std::int32_t> targets, int threads) {
  const Side model = make_side(head, hidden, targets.size());
  const Side other = make_side(reference, reference_hidden, targets.size());
  return std::move(score({&model, 1}, &other, targets, threads).front());
}

std::vector<double> mean_divergences(OutputHead& head, std::span<const std::vector<float>> models,
                                     std::span<const float> reference, int threads) {
  const std::uint64_t rows = reference.size() / head.hidden();
  const Side other = make_side(head, reference, rows);
  std::vector<Side> sides;
  for (const std::vector<float>& hidden : models) sides.push_back(make_side(head, hidden, rows));
  const std::vector<std::int32_t> targets(rows, 0);  // of no use: KL looks at no target
  std::vector<double> out;
  if (sides.empty()) return out;
  for (const std::vector<TokenScore>& scores : score(sides, &other, targets, threads)) {
    double sum = 0;
    for (const TokenScore& s : scores) sum += s.kl;
    out.push_back(sum / static_cast<double>(rows));
  }
  return out;
}

void write_logits(OutputHead& head, std::span<const float> hidden, std::span<float> logits, int threads) {
  const std::uint64_t rows = hidden.size() / head.hidden();
  if (logits.size() != rows * head.vocab()) throw Error(ErrorKind::internal, "logits of another size");
  const Side side = make_side(head, hidden, rows);
  for (std::uint64_t part = 0; part < head.parts(); ++part) {
    multiply(side.hidden.data(), padded_stride(head.hidden()), rows, head.part(part),
             logits.data() + part * head.part_rows(), head.vocab(), threads);
  }
}

}  // namespace fireq::calib
