#include "libquant/mean_rounding.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/error.hpp"

namespace fireq::libquant {
namespace {

constexpr int kSweeps = 2;

// One row at work.
struct Row {
  std::span<const float> w, mean, mean_square;
  std::uint8_t* codes;        // two a byte
  const std::uint8_t* sigma;  // of each group
  double r;
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
  const auto code_of = [&](std::size_t k) { return unsigned{row.codes[k / 2]} >> (k % 2 * 4U) & 15U; };
  for (std::size_t k = 0; k < row.w.size(); ++k) {
    const double v = value_of(table, row.sigma[k / kGroupSize], code_of(k), row.r);
    lean += static_cast<double>(row.mean[k]) * (static_cast<double>(row.w[k]) - v);
  }
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    for (std::size_t k = 0; k < row.w.size(); ++k) {
      const std::uint8_t sigma = row.sigma[k / kGroupSize];
      const unsigned code = code_of(k);
      const double v = value_of(table, sigma, code, row.r);
      const auto m = static_cast<double>(row.mean[k]);
      const double s = std::max(static_cast<double>(row.mean_square[k]), m * m);
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

}  // namespace

void keep_row_means(std::span<const float> w, std::uint64_t row_begin, std::uint64_t count,
                    std::span<const float> mean, std::span<const float> mean_square, QuantizedLinear& out) {
  const std::uint64_t k = out.cols;
  if (w.size() != count * k || mean.size() != k || mean_square.size() != k || row_begin + count > out.rows) {
    throw Error(ErrorKind::internal, "rows, means and weights of different sizes");
  }
  const ProductTable table(out.levels);
  const bool has_zero = out.levels.magnitude[0] == 0;
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::uint64_t row = row_begin + i;
    const float r = out.row_scales[out.row_scales.size() == 1 ? 0 : row];
    revise({w.subspan(i * k, k), mean, mean_square, out.codes.data() + row * out.padded_cols() / 2,
            out.group_scales.data() + row * out.groups(), static_cast<double>(r)},
           table, has_zero);
  }
}

}  // namespace fireq::libquant
