#include "libquant/fp8_linear.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "common/error.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::libquant {
namespace {

constexpr float kLeastMaximum = 0x1p-100F;  // r stays a normal number for rows of zeros

std::string place(std::uint64_t row, std::uint64_t col) {
  return "[" + std::to_string(row) + ", " + std::to_string(col) + "]";
}

}  // namespace

Fp8Linear make_fp8_linear(std::uint64_t rows, std::uint64_t cols) {
  return {rows, cols, std::vector<std::uint8_t>(rows * cols), std::vector<float>(rows, 1.0F)};
}

void quantize_fp8_rows(std::span<const float> w, std::uint64_t row_begin, std::uint64_t count,
                       Fp8Linear& out) {
  if (w.size() != count * out.cols || row_begin + count > out.rows) {
    throw Error(ErrorKind::internal, "rows outside an FP8 matrix");
  }
  std::vector<float> scaled(out.cols);
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::span<const float> row = w.subspan(i * out.cols, out.cols);
    float largest = kLeastMaximum;
    for (std::uint64_t c = 0; c < out.cols; ++c) {
      if (!std::isfinite(row[c])) {
        throw Error(ErrorKind::input, "a weight is not finite")
            .found((std::isnan(row[c]) ? "NaN at " : "infinity at ") + place(row_begin + i, c));
      }
      largest = std::max(largest, std::fabs(row[c]));
    }
    const float r = largest / kFp8Max;
    for (std::uint64_t c = 0; c < out.cols; ++c) scaled[c] = row[c] / r;
    out.row_scales[row_begin + i] = r;
    encode_e4m3(scaled, std::span(out.codes).subspan((row_begin + i) * out.cols, out.cols));
  }
}

void check_fp8_linear(const Fp8Linear& q, std::uint64_t first_row) {
  if (q.codes.size() != q.rows * q.cols || q.row_scales.size() != q.rows) {
    throw Error(ErrorKind::input, "an FP8 matrix has another size than its shape");
  }
  const auto bad =
      std::find_if(q.codes.begin(), q.codes.end(), [](std::uint8_t b) { return (b & 0x7FU) == 0x7FU; });
  if (bad != q.codes.end()) {
    const auto index = static_cast<std::uint64_t>(bad - q.codes.begin());
    throw Error(ErrorKind::input, "bad FP8 weight")
        .expected("finite values")
        .found("NaN at " + place(first_row + index / q.cols, index % q.cols));
  }
  for (std::uint64_t i = 0; i < q.rows; ++i) {
    if (std::isfinite(q.row_scales[i]) && q.row_scales[i] > 0) continue;
    throw Error(ErrorKind::input, "bad row scale")
        .expected("finite values above 0")
        .found(std::to_string(q.row_scales[i]) + " at row " + std::to_string(first_row + i));
  }
}

}  // namespace fireq::libquant
