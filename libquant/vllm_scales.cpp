#include "libquant/vllm_scales.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::libquant {
namespace {

constexpr std::uint64_t kRowsPerTask = 64;
constexpr float kLeastChannel = 1.0F / (448.0F * 512.0F);

// How often each magnitude occurs in one group of a row.
std::array<std::uint32_t, 8> count_magnitudes(const QuantizedLinear& q, std::uint64_t row,
                                              std::uint64_t group) {
  std::array<std::uint32_t, 8> count{};
  const std::uint64_t end = std::min(q.cols, (group + 1) * kGroupSize);
  for (std::uint64_t k = group * kGroupSize; k < end; ++k) ++count[q.code(row, k) & 7U];
  return count;
}

// Adds one row to `loss`.
void add_row(const QuantizedLinear& q, const ProductTable& table, std::uint64_t row, VllmRow& loaded,
             VllmLoss& loss) {
  const std::uint64_t groups = q.groups();
  const std::uint8_t* sigma = q.group_scales.data() + row * groups;
  const double r = q.row_scale(row);
  std::vector<std::uint16_t> stored(groups);
  for (std::uint64_t g = 0; g < groups; ++g) {
    stored[g] = bf16_group_scale(decode_e4m3(sigma[g]), q.row_scale(row));
  }
  load_vllm_row(stored, loaded);
  const double channel = loaded.channel;
  bool differs = false;
  for (std::uint64_t g = 0; g < groups; ++g) {
    const std::array<std::uint32_t, 8> count = count_magnitudes(q, row, g);
    for (std::size_t i = 1; i < count.size(); ++i) {
      if (count[i] == 0) continue;
      const double own = r * static_cast<double>(table.value[sigma[g]][i]);
      const double theirs = channel * static_cast<double>(table.value[loaded.codes[g]][i]);
      differs = differs || theirs != own;
      loss.error_sq += count[i] * (theirs - own) * (theirs - own);
      loss.reference_sq += count[i] * own * own;
    }
  }
  if (!differs) return;
  if (loss.rows == 0) loss.first_row = row;
  ++loss.rows;
}

}  // namespace

std::uint16_t bf16_group_scale(float sigma, float r) noexcept {
  // The product has 28 bits, exact in double. Through FP32 rounded to odd it is then rounded only once.
  const double exact = static_cast<double>(sigma) * static_cast<double>(r);
  auto narrow = static_cast<float>(exact);
  if (static_cast<double>(narrow) != exact) {
    auto bits = std::bit_cast<std::uint32_t>(narrow);
    if (static_cast<double>(narrow) > exact) --bits;
    narrow = std::bit_cast<float>(bits | 1U);
  }
  return encode_bf16(narrow);
}

void load_vllm_row(std::span<const std::uint16_t> weight_scale, VllmRow& out) {
  float largest = 0;
  for (const std::uint16_t s : weight_scale) largest = std::max(largest, std::fabs(decode_bf16(s)));
  const float channel = std::max(largest / kFp8Max, kLeastChannel);
  out.codes.resize(weight_scale.size());
  for (std::size_t g = 0; g < weight_scale.size(); ++g) {
    // Divided by 8 so that no product with -8 .. 7 saturates.
    const float code = round_e4m3(decode_bf16(weight_scale[g]) / channel);
    out.codes[g] = encode_e4m3(code / 8.0F);
  }
  out.channel = channel * 8.0F;
}

double VllmLoss::relative() const {
  return reference_sq > 0 ? std::sqrt(error_sq / reference_sq) : 0;
}

VllmLoss vllm_loss(const QuantizedLinear& q, int threads) {
  if (!q.levels.is_int4()) throw Error(ErrorKind::internal, "vLLM multiplies integer levels only");
  const ProductTable table(q.levels);
  std::vector<VllmLoss> parts((q.rows + kRowsPerTask - 1) / kRowsPerTask);
  parallel_for(parts.size(), threads, [&](std::size_t task) {
    VllmRow loaded;
    const std::uint64_t begin = task * kRowsPerTask;
    const std::uint64_t end = std::min(q.rows, begin + kRowsPerTask);
    for (std::uint64_t row = begin; row < end; ++row) add_row(q, table, row, loaded, parts[task]);
  });
  VllmLoss total;
  for (const VllmLoss& part : parts) {
    if (total.rows == 0) total.first_row = part.first_row;
    total.rows += part.rows;
    total.error_sq += part.error_sq;
    total.reference_sq += part.reference_sq;
  }
  return total;
}

}  // namespace fireq::libquant
