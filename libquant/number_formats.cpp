#include "libquant/number_formats.hpp"

#include <bit>
#include <cmath>
#include <string>

#include "common/error.hpp"
#include "libquant/float_bits.hpp"
#include "libquant/row_kernels.hpp"

namespace fireq::libquant {
namespace {

void check_sizes(std::size_t in, std::size_t out) {
  if (in == out) return;
  throw Error(ErrorKind::internal, "conversion between spans of different sizes")
      .expected(std::to_string(in))
      .found(std::to_string(out));
}

}  // namespace

std::uint8_t encode_e4m3(float value) noexcept {
  return bits::e4m3_from_f32(value);
}
float decode_e4m3(std::uint8_t byte) noexcept {
  return bits::f32_from_e4m3(byte);
}
std::uint8_t encode_e4m3_from_double(double value) noexcept {
  // Round to odd: FP32 has over two bits more than E4M3, so an inexact FP32 with its last bit set rounds as
  // the double would have.
  auto narrow = static_cast<float>(value);
  if (static_cast<double>(narrow) != value && value == value) {
    auto u = std::bit_cast<std::uint32_t>(narrow);
    if (std::abs(static_cast<double>(narrow)) > std::abs(value)) --u;
    narrow = std::bit_cast<float>(u | 1U);
  }
  return bits::e4m3_from_f32(narrow);
}
std::uint16_t encode_bf16(float value) noexcept {
  return bits::bf16_from_f32(value);
}
float decode_bf16(std::uint16_t bits16) noexcept {
  return bits::f32_from_bf16(bits16);
}
std::uint16_t encode_f16(float value) noexcept {
  return bits::f16_from_f32(value);
}
float decode_f16(std::uint16_t bits16) noexcept {
  return bits::f32_from_f16(bits16);
}

void decode_e4m3(std::span<const std::uint8_t> in, std::span<float> out) {
  check_sizes(in.size(), out.size());
  kernels().decode_e4m3(in.data(), out.data(), in.size());
}
void encode_e4m3(std::span<const float> in, std::span<std::uint8_t> out) {
  check_sizes(in.size(), out.size());
  kernels().encode_e4m3(in.data(), out.data(), in.size());
}
void decode_bf16(std::span<const std::uint16_t> in, std::span<float> out) {
  check_sizes(in.size(), out.size());
  kernels().decode_bf16(std::as_bytes(in).data(), out.data(), in.size());
}
void encode_bf16(std::span<const float> in, std::span<std::uint16_t> out) {
  check_sizes(in.size(), out.size());
  kernels().encode_bf16(in.data(), out.data(), in.size());
}
void decode_f16(std::span<const std::uint16_t> in, std::span<float> out) {
  check_sizes(in.size(), out.size());
  kernels().decode_f16(std::as_bytes(in).data(), out.data(), in.size());
}
void encode_f16(std::span<const float> in, std::span<std::uint16_t> out) {
  check_sizes(in.size(), out.size());
  kernels().encode_f16(in.data(), out.data(), in.size());
}

std::string_view simd_target() noexcept {
  return kernels().name;
}

}  // namespace fireq::libquant
