// The hot loops of libquant, as one table of functions per instruction set. Internal. Two sources fill it:
// row_kernels_plain.cpp (C++, always built) and row_kernels_simd.cpp (Highway, picked at run time). Every
// table gives the same bytes: comparisons are on integer bits, sums have a fixed lane structure, nothing is
// fused.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "libquant/levels.hpp"

namespace fireq::libquant {

// What one (second-level scale r, sigma) pair makes of a weight w. Its magnitude index is the number of j in
// 0..6 with |w| >= threshold[j]; its sign is kept where |w| >= threshold[7]. threshold[0..6] never descend
// and all are at least 1. They are bit patterns of non-negative numbers, which order like integers, so ">="
// is exact whatever the vector width: as FP32, and in the 16-bit format of the tensor that is read (the
// smallest number of that format at or over the FP32 one).
struct GroupTable {
  alignas(32) std::array<std::uint32_t, 8> threshold{};
  alignas(16) std::array<std::uint16_t, 8> threshold16{};
  std::array<float, 8> value{};  // FP32(r * product[i]), the reconstruction, for the sigma search
};

struct RowKernels {
  std::string_view name;

  // Conversions of n elements; 16-bit inputs may start at any address.
  void (*decode_e4m3)(const std::uint8_t* in, float* out, std::size_t n);
  void (*encode_e4m3)(const float* in, std::uint8_t* out, std::size_t n);
  void (*decode_bf16)(const std::byte* in, float* out, std::size_t n);
  void (*encode_bf16)(const float* in, std::uint16_t* out, std::size_t n);
  void (*decode_f16)(const std::byte* in, float* out, std::size_t n);
  void (*encode_f16)(const float* in, std::uint16_t* out, std::size_t n);

  // Largest |x| of each group of 128 as bits of the element type (a NaN counts as its bits: above infinity).
  // out has ceil(n / 128) entries.
  void (*group_absmax16)(const std::byte* row, std::size_t n, std::uint32_t* out);
  void (*group_absmax32)(const std::byte* row, std::size_t n, std::uint32_t* out);

  // `next` has the same size and is only prefetched: memory works while the row is encoded from cache.
  // Codes of one row, two per byte, element 2i low; tables[g] is group g's. out has ceil(n / 128) * 64 bytes,
  // the padding of the last group becomes code 0.
  void (*encode_row16)(const std::byte* row, const std::byte* next, std::size_t n,
                       const GroupTable* const* tables, std::uint8_t* out);
  void (*encode_row32)(const std::byte* row, const std::byte* next, std::size_t n,
                       const GroupTable* const* tables, std::uint8_t* out);

  // errors[c] = sum over k of weight[k] * (|w[k]| - value)^2 for each of n candidate tables, all in FP32: 16
  // partial sums (element k into partial k mod 16, k ascending), then folded 8 + 8, 4 + 4, 2 + 2, 1 + 1.
  // magnitude and weight have 128 entries.
  void (*search_errors)(const float* magnitude, const float* weight, const GroupTable* const* tables,
                        std::size_t n, float* errors);

  // FP8: RN8(x / a) by IEEE division, as bytes and in place as values.
  void (*divide_to_e4m3)(const float* x, float a, std::uint8_t* out, std::size_t n);
  void (*divide_round_e4m3)(float* x, float a, std::size_t n);
  void (*round_bf16)(const float* in, float* out, std::size_t n);
  std::uint32_t (*absmax32)(const float* x, std::size_t n);  // bits, as group_absmax32
};

const RowKernels& plain_kernels() noexcept;
const RowKernels& kernels() noexcept;  // the best table for this CPU, or what use_kernels set
// For tests and benches, from one thread and while nothing is being quantised: every table that this CPU can
// run, the plain one among them, and which one kernels() gives (null: the best again).
std::vector<const RowKernels*> available_kernels();
void use_kernels(const RowKernels* table) noexcept;

// The fold that search_errors ends with, shared by all tables.
inline float fold_partials(std::array<float, 16>& partial) noexcept {
  for (std::size_t step = 8; step > 0; step /= 2) {
    for (std::size_t i = 0; i < step; ++i) partial[i] += partial[i + step];
  }
  return partial[0];
}

}  // namespace fireq::libquant
