#include "libquant/kv_rounding.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "common/error.hpp"
#include "libquant/float_bits.hpp"
#include "libquant/kv_quantizer.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::libquant {
namespace {

constexpr int kLargestScale = 0x7e;  // 448
constexpr double kDamping = 0.01;    // share of the mean diagonal
// Scales that are tried around that of the maximum, the nearest first.
constexpr int kOffsets[] = {0, 1, -1, 2, 3};

// a = U U^T, U over the upper triangle of a; false where a pivot is not positive.
bool factor(std::vector<double>& a, std::uint64_t n) {
  for (std::uint64_t j = n; j-- > 0;) {
    for (std::uint64_t i = j + 1; i-- > 0;) {
      double sum = a[i * n + j];
      for (std::uint64_t k = j + 1; k < n; ++k) sum -= a[i * n + k] * a[j * n + k];
      if (i < j) {
        a[i * n + j] = sum / a[j * n + j];
      } else {
        if (!(sum > 0)) return false;
        a[j * n + j] = std::sqrt(sum);
      }
    }
  }
  return true;
}

struct Codes {
  float sigma = 0;
  double error = std::numeric_limits<double>::infinity();
  std::vector<float> code;
};

// One rounding under `trial.sigma`; `due` [D] is room.
void round_together(std::span<const float> x, const float* factor, std::vector<float>& due, Codes& trial) {
  const std::size_t n = x.size();
  const float sigma = trial.sigma;
  due.assign(n, 0.0F);
  trial.code.resize(n);
  trial.error = 0;
  for (std::size_t j = 0; j < n; ++j) {
    const float code = bits::round_even(std::clamp((x[j] + due[j]) / sigma, -7.0F, 7.0F));
    trial.code[j] = code;
    const float e = x[j] - code * sigma;
    const auto left = static_cast<double>(due[j] + e);
    trial.error += static_cast<double>(factor[0]) * left * left;
    for (std::size_t k = 1; k < n - j; ++k) due[j + k] += e * factor[k];
    factor += n - j;
  }
}

}  // namespace

std::vector<float> kv_rounding(std::span<const double> moment, std::uint64_t head_dim) {
  const std::uint64_t n = head_dim;
  if (moment.size() != n * n) throw Error(ErrorKind::internal, "a second moment of another size");
  double mean = 0;
  for (std::uint64_t i = 0; i < n; ++i) mean += moment[i * n + i] / static_cast<double>(n);
  if (!std::all_of(moment.begin(), moment.end(), [](double v) { return std::isfinite(v); })) {
    throw Error(ErrorKind::input, "second moments of a head are not finite");
  }
  std::vector<double> upper;
  double lambda = mean > 0 ? kDamping * mean : 1;
  for (;; lambda *= 10) {
    upper.assign(moment.begin(), moment.end());
    for (std::uint64_t i = 0; i < n; ++i) upper[i * n + i] += lambda;
    if (factor(upper, n)) break;
    if (!std::isfinite(lambda)) throw Error(ErrorKind::input, "second moments of a head have no factor");
  }
  double largest = 0;
  for (std::uint64_t i = 0; i < n; ++i) largest = std::max(largest, upper[i * n + i]);
  std::vector<float> out;
  out.reserve(kv_rounding_size(n));
  constexpr float kLeast = 0x1p-60F;  // of a weight: never 0
  for (std::uint64_t i = 0; i < n; ++i) {
    const double weight = upper[i * n + i] / largest;
    out.push_back(std::max(round_bf16(static_cast<float>(weight * weight)), kLeast));
    for (std::uint64_t j = i + 1; j < n; ++j) {
      out.push_back(round_bf16(static_cast<float>(upper[i * n + j] / upper[j * n + j])));
    }
  }
  return out;
}

float quantize_kv_together(std::span<float> x, std::span<const float> factor, KvPart part) {
  if (factor.size() != kv_rounding_size(x.size())) {
    throw Error(ErrorKind::internal, "a rounding factor of another head size");
  }
  const int base = kv_scale_code(x);
  Codes best, trial;
  std::vector<float> due;
  for (const int offset : kOffsets) {
    const int code = base + offset;
    if (offset < 0 && part == KvPart::value) continue;
    if (code < 1 || code > kLargestScale) continue;
    trial.sigma = bits::f32_from_e4m3(static_cast<std::uint8_t>(code));
    round_together(x, factor.data(), due, trial);
    if (trial.error < best.error) std::swap(best, trial);
  }
  std::copy(best.code.begin(), best.code.end(), x.begin());
  return best.sigma;
}

}  // namespace fireq::libquant
