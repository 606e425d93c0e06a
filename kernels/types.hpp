// The operands of a FireQ linear layer as the kernels see them: plain pointers and shapes. M tokens, N output
// channels, K input channels, Kp = K rounded up to 128, groups = Kp / 128. The same structs describe device
// memory for the GPU functions and host memory for their CPU twins. The product (docs/numerics.md): y[m, n] =
// bf16( (a[m] r[n]) sum_k x8[m, k] w8[n, k] + bias[n] + residual[m, n] ), w8 = +-RN8(level sigma), FP32
// arithmetic.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace fireq::kernels {

using Stream = void*;  // a cudaStream_t; nullptr is the default stream

enum class WeightLayout : std::uint8_t { row, sm90 };  // docs/checkpoint-format.md

struct WeightRef {
  std::uint64_t rows = 0;  // N
  std::uint64_t cols = 0;  // K, before padding
  WeightLayout layout = WeightLayout::row;
  const std::uint8_t* codes = nullptr;         // row: [N, Kp/2], element 2i in the low nibble of byte i
  const std::uint8_t* group_scales = nullptr;  // row: [N, Kp/128], E4M3 bytes 0x01 .. 0x7e
  const std::uint8_t* tiles = nullptr;         // sm90: [ceil(N/128), Kp/128, 8320], 16-byte aligned
  const float* row_scales = nullptr;           // [N], or [1] when per_tensor
  bool per_tensor = false;
  std::array<float, 8> levels{};  // finite, >= 0, ascending, <= 448

  std::uint64_t groups() const noexcept { return (cols + 127) / 128; }
  std::uint64_t padded_cols() const noexcept { return groups() * 128; }
  std::uint64_t row_tiles() const noexcept { return (rows + 127) / 128; }
  std::uint64_t tile_bytes() const noexcept { return row_tiles() * groups() * 8320; }
};

struct TokensRef {
  const std::uint8_t* x8 = nullptr;  // E4M3 [M, pitch]; 16-byte aligned; columns K .. pitch are never read
  const float* scale = nullptr;      // a [M]
  std::uint64_t tokens = 0;          // M >= 1
  std::uint64_t pitch = 0;           // bytes, >= K, a multiple of 16
};

struct OutputRef {
  std::uint16_t* data = nullptr;  // bf16 [M, pitch]
  std::uint64_t pitch = 0;        // elements, >= N
};

struct Epilogue {
  const float* bias = nullptr;              // [N]
  const std::uint16_t* residual = nullptr;  // bf16 [M, residual_pitch]; may be the output itself
  std::uint64_t residual_pitch = 0;         // elements
};

}  // namespace fireq::kernels
