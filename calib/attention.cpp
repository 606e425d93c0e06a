#include "calib/attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "calib/simd.hpp"
#include "libquant/kv_quantizer.hpp"

namespace fireq::calib {
namespace {

constexpr std::uint64_t kBlock = KvCache::kBlock;
static_assert(kBlock == libquant::kKeyBlock);
constexpr std::size_t kScoreStride = kBlock;

// What one block does to a row's running sums.
struct RowStep {
  float keep = 1;    // what the sums so far are multiplied with
  float factor = 0;  // what this block's product is multiplied with
};

}  // namespace

void attend(const KvCache& cache, std::uint64_t sequence, std::uint64_t head, const QueryRows& rows,
            const AttentionMode& mode, AttentionArea& area, float* out, std::size_t out_stride) {
  const simd::Kernels& run = simd::kernels();
  const std::uint64_t dim = cache.head_dim();
  const std::size_t width = padded_stride(dim);
  area.scores.resize(QueryRows::kMost * kScoreStride);
  area.part.resize(QueryRows::kMost * width);
  area.sum.resize(QueryRows::kMost * width);
  std::fill(area.sum.begin(), area.sum.end(), 0.0F);

  float top[QueryRows::kMost];
  float total[QueryRows::kMost] = {};
  std::fill(std::begin(top), std::end(top), std::numeric_limits<float>::lowest());

  const auto first_key = [&](std::uint64_t position) {
    return mode.window == 0 || position + 1 <= mode.window ? 0 : position + 1 - mode.window;
  };
  const std::uint64_t last = rows.position[rows.count - 1];
  for (std::uint64_t block = first_key(rows.position[0]) / kBlock; block <= last / kBlock; ++block) {
    const std::uint64_t start = block * kBlock;
    const std::uint64_t keys = std::min(kBlock, last + 1 - start);
    const float* key_scales = mode.key_scales ? cache.key_scales(sequence, head, block) : nullptr;
    const float* value_scales = mode.value_scales ? cache.value_scales(sequence, head, block) : nullptr;
    run.gemm(rows.q, rows.stride, rows.count, cache.keys(sequence, head, block), cache.key_panel_stride(),
             keys, dim, area.scores.data(), kScoreStride, false);

    RowStep step[QueryRows::kMost];
    for (std::size_t i = 0; i < rows.count; ++i) {
      float* s = area.scores.data() + i * kScoreStride;
      const std::uint64_t low = std::max(first_key(rows.position[i]), start) - start;
      const std::uint64_t high =
          rows.position[i] < start ? 0 : std::min(rows.position[i] + 1 - start, kBlock);
      if (low >= high) {  // sees nothing of this block
        std::fill(s, s + keys, 0.0F);
        continue;
      }
      const std::size_t visible = high - low;
      float* p = s + low;
      const float largest =
          run.scale_scores(p, rows.scale[i], key_scales == nullptr ? nullptr : key_scales + low, visible);
      const float before = top[i];
      top[i] = std::max(before, largest);
      step[i].keep = std::exp(before - top[i]);
      // The denominator sums p before it is quantised.
      total[i] = total[i] * step[i].keep + run.exp_minus(p, top[i], visible);
      step[i].factor = 1;
      if (mode.fp8_p) {
        step[i].factor = libquant::quantize_probabilities_in_place(
            {p, visible},
            value_scales == nullptr ? std::span<const float>{} : std::span(value_scales + low, visible));
      } else if (value_scales != nullptr) {
        for (std::size_t j = 0; j < visible; ++j) p[j] *= value_scales[low + j];
      }
      std::fill(s, p, 0.0F);
      std::fill(s + high, s + keys, 0.0F);
    }

    run.gemm(area.scores.data(), kScoreStride, rows.count, cache.values(sequence, head, block), kBlock * 32,
             dim, keys, area.part.data(), width, false);
    for (std::size_t i = 0; i < rows.count; ++i) {
      run.rescale_add(area.sum.data() + i * width, step[i].keep, area.part.data() + i * width, step[i].factor,
                      dim);
    }
  }
  for (std::size_t i = 0; i < rows.count; ++i) {
    const float* sum = area.sum.data() + i * width;
    for (std::uint64_t c = 0; c < dim; ++c) out[i * out_stride + c] = sum[c] / total[i];
  }
}

}  // namespace fireq::calib
