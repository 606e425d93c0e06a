// The reference loops in plain C++ (row_kernels.hpp). What the vector tables must reproduce byte for byte.
#include <algorithm>
#include <bit>
#include <cstring>

#include "libquant/float_bits.hpp"
#include "libquant/row_kernels.hpp"

namespace fireq::libquant {
namespace {

template <typename T>
T load(const std::byte* p, std::size_t i) noexcept {
  T v;
  std::memcpy(&v, p + i * sizeof(T), sizeof(T));
  return v;
}

void decode_e4m3_plain(const std::uint8_t* in, float* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = bits::f32_from_e4m3(in[i]);
}
void encode_e4m3_plain(const float* in, std::uint8_t* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = bits::e4m3_from_f32(in[i]);
}
void decode_bf16_plain(const std::byte* in, float* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = bits::f32_from_bf16(load<std::uint16_t>(in, i));
}
void encode_bf16_plain(const float* in, std::uint16_t* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = bits::bf16_from_f32(in[i]);
}
void decode_f16_plain(const std::byte* in, float* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = bits::f32_from_f16(load<std::uint16_t>(in, i));
}
void encode_f16_plain(const float* in, std::uint16_t* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = bits::f16_from_f32(in[i]);
}

template <typename T>
void group_absmax_plain(const std::byte* row, std::size_t n, std::uint32_t* out) {
  constexpr T kMagnitude = static_cast<T>(~T{0}) >> 1U;
  for (std::size_t begin = 0; begin < n; begin += kGroupSize) {
    const std::size_t end = std::min<std::size_t>(n, begin + kGroupSize);
    T largest = 0;
    for (std::size_t i = begin; i < end; ++i) {
      largest = std::max(largest, static_cast<T>(load<T>(row, i) & kMagnitude));
    }
    *out++ = largest;
  }
}

template <typename T>
void encode_row_plain(const std::byte* row, const std::byte* /*next*/, std::size_t n,
                      const GroupTable* const* tables, std::uint8_t* out) {
  constexpr T kMagnitude = static_cast<T>(~T{0}) >> 1U;
  for (std::size_t begin = 0; begin < n; begin += kGroupSize, ++tables, out += kGroupSize / 2) {
    std::array<T, 8> threshold{};
    if constexpr (sizeof(T) == 2) {
      threshold = (*tables)->threshold16;
    } else {
      threshold = (*tables)->threshold;
    }
    std::array<std::uint8_t, kGroupSize> code{};
    const std::size_t count = std::min<std::size_t>(n - begin, kGroupSize);
    for (std::size_t i = 0; i < count; ++i) {
      const T x = load<T>(row, begin + i);
      const T magnitude = static_cast<T>(x & kMagnitude);
      unsigned index = 0;
      for (std::size_t j = 0; j < 7; ++j) index += magnitude >= threshold[j] ? 1U : 0U;
      const unsigned sign = x != magnitude && magnitude >= threshold[7] ? 8U : 0U;
      code[i] = static_cast<std::uint8_t>(sign | index);
    }
    for (std::size_t i = 0; i < kGroupSize / 2; ++i) {
      out[i] = static_cast<std::uint8_t>(code[2 * i] | (code[2 * i + 1] << 4U));
    }
  }
}

void search_errors_plain(const float* magnitude, const float* weight, const GroupTable* const* tables,
                         std::size_t n, float* errors) {
  for (std::size_t c = 0; c < n; ++c) {
    const GroupTable& table = *tables[c];
    std::array<float, 16> partial{};
    for (std::size_t k = 0; k < kGroupSize; ++k) {
      const auto m = std::bit_cast<std::uint32_t>(magnitude[k]);
      float value = table.value[0];
      for (std::size_t j = 0; j < 7; ++j) value = m >= table.threshold[j] ? table.value[j + 1] : value;
      const float error = magnitude[k] - value;
      partial[k % 16] += weight[k] * (error * error);
    }
    errors[c] = fold_partials(partial);
  }
}

void divide_to_e4m3_plain(const float* x, float a, std::uint8_t* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = bits::e4m3_from_f32(x[i] / a);
}
void divide_round_e4m3_plain(float* x, float a, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) x[i] = bits::f32_from_e4m3(bits::e4m3_from_f32(x[i] / a));
}
void round_bf16_plain(const float* in, float* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = bits::f32_from_bf16(bits::bf16_from_f32(in[i]));
}
std::uint32_t absmax32_plain(const float* x, std::size_t n) {
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::bit_cast<std::uint32_t>(x[i]) & bits::kAbs);
  }
  return largest;
}

constexpr RowKernels kPlain{"plain",
                            decode_e4m3_plain,
                            encode_e4m3_plain,
                            decode_bf16_plain,
                            encode_bf16_plain,
                            decode_f16_plain,
                            encode_f16_plain,
                            group_absmax_plain<std::uint16_t>,
                            group_absmax_plain<std::uint32_t>,
                            encode_row_plain<std::uint16_t>,
                            encode_row_plain<std::uint32_t>,
                            search_errors_plain,
                            divide_to_e4m3_plain,
                            divide_round_e4m3_plain,
                            round_bf16_plain,
                            absmax32_plain};

}  // namespace

const RowKernels& plain_kernels() noexcept {
  return kPlain;
}

#ifndef FIREQ_HIGHWAY  // else row_kernels_simd.cpp has them
const RowKernels& kernels() noexcept {
  return kPlain;
}
std::vector<const RowKernels*> available_kernels() {
  return {&kPlain};
}
void use_kernels(const RowKernels* /*table*/) noexcept {}
#endif

}  // namespace fireq::libquant
