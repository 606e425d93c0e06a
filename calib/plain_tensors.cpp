#include "calib/plain_tensors.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/fp8_linear.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::calib {
namespace {

constexpr std::uint64_t kElementsPerTask = std::uint64_t{1} << 18U;

// Values as bytes of `dtype`, at `out`; the index of the first that does not fit its range, or values.size().
std::size_t narrow(std::span<const float> values, Dtype dtype, std::byte* out) {
  if (dtype == Dtype::f32) {
    std::memcpy(out, values.data(), values.size() * sizeof(float));
    return values.size();
  }
  std::array<std::uint16_t, 1024> half{};
  for (std::size_t done = 0; done < values.size(); done += half.size()) {
    const std::span<const float> part = values.subspan(done, std::min(half.size(), values.size() - done));
    const std::span<std::uint16_t> bits(half.data(), part.size());
    dtype == Dtype::f16 ? libquant::encode_f16(part, bits) : libquant::encode_bf16(part, bits);
    const std::uint16_t infinity = dtype == Dtype::f16 ? 0x7c00 : 0x7f80;
    for (std::size_t i = 0; i < bits.size(); ++i) {
      if ((bits[i] & 0x7fffU) == infinity) return done + i;
    }
    std::memcpy(out + done * sizeof(std::uint16_t), bits.data(), bits.size_bytes());
  }
  return values.size();
}

Error out_of_range(const std::string& tensor, float value, Dtype dtype) {
  Error error(ErrorKind::input, "a value is out of the range of the type to write");
  error.tensor(tensor).expected(std::string(dtype_name(dtype))).found(std::to_string(value));
  return error.hint(dtype == Dtype::f16 ? "use --dtype bf16 or f32" : "use --dtype f32");
}

}  // namespace

formats::FireqWriter::Tensor plain_tensor(const std::string& name, Dtype dtype,
                                          std::vector<std::uint64_t> shape,
                                          const std::function<void(std::uint64_t, std::span<float>)>& values,
                                          const std::string& path, int threads) {
  const std::uint64_t cols = shape.back();
  std::uint64_t elements = 1;
  for (const std::uint64_t extent : shape) elements *= extent;
  const std::uint64_t size = dtype_size(dtype);
  const std::uint64_t step =
      std::max<std::uint64_t>(1, kElementsPerTask / std::max<std::uint64_t>(1, cols)) * cols;
  formats::FireqWriter::Tensor out{
      {name, dtype, std::move(shape)}, std::vector<std::byte>(elements * size), {}};
  if (elements == 0) return out;
  try {
    parallel_for((elements + step - 1) / step, threads, [&](std::size_t t) {
      const std::uint64_t begin = t * step;
      std::vector<float> part(std::min(step, elements - begin));
      values(begin, part);
      const std::size_t bad = narrow(part, dtype, out.owned.data() + begin * size);
      if (bad < part.size()) throw out_of_range(name, part[bad], dtype);
    });
  } catch (Error& error) {
    throw error.path_if_unset(path);
  }
  return out;
}

Fp8Table::Fp8Table(const formats::CheckpointReader& reader, std::string module)
    : module_(std::move(module)),
      file_(reader.file_of(module_ + ".weight")),
      weight_(reader.tensor(module_ + ".weight")),
      scale_(reader.tensor(module_ + ".weight_scale")) {}

float Fp8Table::row_scale(std::uint64_t row) const {
  float r = 0;
  std::memcpy(&r, scale_.data.data() + row * sizeof(float), sizeof(float));
  return r;
}

void Fp8Table::operands(std::uint64_t row, std::uint64_t count, std::span<float> out) const {
  libquant::Fp8Linear part = libquant::make_fp8_linear(count, cols());
  if (out.size() != part.codes.size() || row + count > rows()) {
    throw Error(ErrorKind::internal, "rows outside an FP8 matrix").tensor(module_);
  }
  std::memcpy(part.codes.data(), weight_.data.data() + row * cols(), part.codes.size());
  for (std::uint64_t i = 0; i < count; ++i) part.row_scales[i] = row_scale(row + i);
  try {
    libquant::check_fp8_linear(part, row);
  } catch (Error& error) {
    throw error.path_if_unset(file_).tensor_if_unset(module_ + ".weight");
  }
  libquant::decode_e4m3(part.codes, out);
}

void Fp8Table::values(std::uint64_t begin, std::span<float> out) const {
  const std::uint64_t first = begin / cols();
  const std::uint64_t count = out.size() / cols();
  operands(first, count, out);
  for (std::uint64_t i = 0; i < count; ++i) {
    const float r = row_scale(first + i);
    for (float& value : out.subspan(i * cols(), cols())) value *= r;
  }
}

}  // namespace fireq::calib
