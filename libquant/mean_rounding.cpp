#include "libquant/mean_rounding.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/error.hpp"
#include "libquant/group_table.hpp"

namespace fireq::libquant {
namespace {

constexpr int kSweeps = 2;
constexpr int kFits = 3;
constexpr double kLeastShare = 0.8, kMostShare = 1.25;
constexpr double kLargestBf16 = 0x1.fep127;

// One row at work.
struct Row {
  std::span<const float> w, mean, mean_square;
  std::uint8_t* codes;        // two a byte
  const std::uint8_t* sigma;  // of each group
  double r;

  unsigned code(std::size_t k) const { return unsigned{codes[k / 2]} >> (k % 2 * 4U) & 15U; }
  double square(std::size_t k) const {  // the mean square, not under the mean's square by rounding
    const auto m = static_cast<double>(mean[k]);
    return std::max(static_cast<double>(mean_square[k]), m * m);
  }
};

double value_of(const ProductTable& table, std::uint8_t sigma, unsigned code, double r) {
  const double magnitude = static_cast<double>(table.value[sigma][code & 7U]) * r;
  return (code & 8U) != 0 ? -magnitude : magnitude;
}

// The next value above (up) or below a code's.
unsigned neighbour(unsigned code, bool up, bool has_zero) {
  const bool negative = (code & 8U) != 0;
  const unsigned index = code & 7U;
  if (negative != up) return index == 7 ? code : code + 1;  // away from zero
  if (index == 0) return has_zero ? (up ? 1U : 9U) : code ^ 8U;
  return has_zero && index == 1 ? 0U : code - 1;
}

void revise(const Row& row, const ProductTable& table, bool has_zero) {
  double lean = 0;  // sum of m_k e_k
  for (std::size_t k = 0; k < row.w.size(); ++k) {
    const double v = value_of(table, row.sigma[k / kGroupSize], row.code(k), row.r);
    lean += static_cast<double>(row.mean[k]) * (static_cast<double>(row.w[k]) - v);
  }
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    for (std::size_t k = 0; k < row.w.size(); ++k) {
      const std::uint8_t sigma = row.sigma[k / kGroupSize];
      const unsigned code = row.code(k);
      const double v = value_of(table, sigma, code, row.r);
      const auto m = static_cast<double>(row.mean[k]);
      const double s = row.square(k);
      const double e = static_cast<double>(row.w[k]) - v;
      const double gradient = (s - m * m) * e + m * lean;
      const unsigned other = neighbour(code, gradient > 0, has_zero);
      const double step = value_of(table, sigma, other, row.r) - v;
      if (!(step * (s * step - 2 * gradient) < 0)) continue;
      std::uint8_t& byte = row.codes[k / 2];
      byte = static_cast<std::uint8_t>(k % 2 == 0 ? (byte & 0xf0U) | other : (byte & 0x0fU) | other << 4U);
      lean -= m * step;
    }
  }
}

// The r of least cost for these codes; that of the row where all products are zero.
double fitted(const Row& row, const ProductTable& table) {
  double wv = 0, vv = 0, mw = 0, mv = 0;
  for (std::size_t k = 0; k < row.w.size(); ++k) {
    const double v = value_of(table, row.sigma[k / kGroupSize], row.code(k), 1);
    const auto w = static_cast<double>(row.w[k]), m = static_cast<double>(row.mean[k]);
    const double spread = row.square(k) - m * m;
    wv += spread * w * v;
    vv += spread * v * v;
    mw += m * w;
    mv += m * v;
  }
  const double norm = vv + mv * mv;
  return norm > 0 ? (wv + mw * mv) / norm : row.r;
}

}  // namespace

void keep_row_means(std::span<const float> w, std::uint64_t row_begin, std::uint64_t count,
                    std::span<const float> mean, std::span<const float> mean_square, bool pin_top_scale,
                    QuantizedLinear& out) {
  const std::uint64_t k = out.cols;
  if (w.size() != count * k || mean.size() != k || mean_square.size() != k || row_begin + count > out.rows) {
    throw Error(ErrorKind::internal, "rows, means and weights of different sizes");
  }
  const ProductTable table(out.levels);
  const bool has_zero = out.levels.magnitude[0] == 0;
  const bool per_tensor = out.row_scales.size() == 1;
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::uint64_t row = row_begin + i;
    float& r = out.row_scales[per_tensor ? 0 : row];
    const auto first = static_cast<double>(r);
    Row at{w.subspan(i * k, k),
           mean,
           mean_square,
           out.codes.data() + row * out.padded_cols() / 2,
           out.group_scales.data() + row * out.groups(),
           first};
    revise(at, table, has_zero);
    const bool stays = per_tensor || (pin_top_scale && r <= kLeastRowScale);
    for (int fit = 0; fit < kFits && !stays; ++fit) {
      // r is one of the storable numbers, and so the nearest to the fitted one costs no more.
      const double wanted = std::clamp(fitted(at, table), kLeastShare * first, kMostShare * first);
      r = row_scale_with_top(static_cast<float>(std::min(56 * wanted, kLargestBf16)));
      if (static_cast<double>(r) == at.r) break;
      at.r = static_cast<double>(r);
      revise(at, table, has_zero);
    }
  }
}

}  // namespace fireq::libquant
