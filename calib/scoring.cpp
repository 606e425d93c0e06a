#include "calib/scoring.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <string>

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
  OutputHead& head;
  FloatBuffer hidden;  // normalised
};

std::vector<TokenScore> score(Side& model, Side* reference, std::span<const std::int32_t> targets,
                              int threads) {
  const std::uint64_t rows = targets.size();
  const std::uint64_t vocab = model.head.vocab();
  if (reference != nullptr &&
      (reference->head.vocab() != vocab || reference->head.part_rows() != model.head.part_rows())) {
    throw Error(ErrorKind::internal, "output heads that cannot be compared");
  }
  std::vector<RowState> states(rows);
  Pool<TileArea> pool;
  for (std::uint64_t begin = 0; begin < vocab; begin += model.head.part_rows()) {
    check_interrupt();
    const Panels& part = model.head.part(begin / model.head.part_rows());
    const Panels* reference_part = nullptr;
    if (reference != nullptr) reference_part = &reference->head.part(begin / model.head.part_rows());
    parallel_for((rows + kRowBlock - 1) / kRowBlock, threads, [&](std::size_t block) {
      const std::uint64_t first = block * kRowBlock;
      const std::uint64_t count = std::min(kRowBlock, rows - first);
      Pool<TileArea>::Loan area(pool);
      const auto logits = [&](const Side& side, const Panels& panels, std::uint64_t column, std::uint64_t n,
                              FloatBuffer& out) {
        const std::size_t stride = padded_stride(side.head.hidden());
        out.resize(kRowBlock * kTile);
        simd::kernels().gemm(side.hidden.data() + first * stride, stride, count,
                             panels.panel(column / simd::kPanel), simd::kPanel * panels.cols(), n,
                             panels.cols(), out.data(), kTile, false);
      };
      for (std::uint64_t column = 0; column < part.rows(); column += kTile) {
        const std::uint64_t n = std::min(kTile, part.rows() - column);
        logits(model, part, column, n, area->model);
        if (reference != nullptr) logits(*reference, *reference_part, column, n, area->reference);
        for (std::uint64_t i = 0; i < count; ++i) {
          RowState& state = states[first + i];
          const float* row = area->model.data() + i * kTile;
          const auto target = static_cast<std::uint64_t>(targets[first + i]);
          if (target >= begin + column && target < begin + column + n) {
            state.target = row[target - begin - column];
          }
          if (reference == nullptr) {
            simd::kernels().log_sum_exp(state.model, row, n);
          } else {
            const float* other = area->reference.data() + i * kTile;
            if (target >= begin + column && target < begin + column + n) {
              state.reference_target = other[target - begin - column];
            }
            simd::kernels().divergence(state.both, other, row, n);
            state.model_top.update(row, n, begin + column, state.both.model.max);
            state.reference_top.update(other, n, begin + column, state.both.reference.max);
          }
        }
      }
    });
  }
  std::vector<TokenScore> out(rows);
  for (std::uint64_t i = 0; i < rows; ++i) {
    const RowState& state = states[i];
    const simd::LogSumExp& sum = reference == nullptr ? state.model : state.both.model;
    out[i].nll = simd::value(sum) - static_cast<double>(state.target);
    out[i].is_top1 = state.target >= sum.max;
    if (reference != nullptr) {
      out[i].kl = simd::value(state.both);
      out[i].reference_nll = simd::value(state.both.reference) - static_cast<double>(state.reference_target);
      out[i].same_top1 = state.model_top.index == state.reference_top.index;
    }
    if (!std::isfinite(out[i].nll) || !std::isfinite(out[i].kl)) {
      throw Error(ErrorKind::input, "logits are not finite").found("scored token " + std::to_string(i));
    }
  }
  return out;
}

Side make_side(OutputHead& head, std::span<const float> hidden, std::uint64_t rows) {
  if (hidden.size() != rows * head.hidden())
    throw Error(ErrorKind::internal, "hidden states of another size");
  Side side{head, {}};
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
  Side model = make_side(head, hidden, targets.size());
  return score(model, nullptr, targets, threads);
}

std::vector<TokenScore> score_tokens(OutputHead& head, std::span<const float> hidden, OutputHead& reference,
                                     std::span<const float> reference_hidden,
                                     std::span<const std::int32_t> targets, int threads) {
  Side model = make_side(head, hidden, targets.size());
  Side other = make_side(reference, reference_hidden, targets.size());
  return score(model, &other, targets, threads);
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
