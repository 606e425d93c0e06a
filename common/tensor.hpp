// Types that several folders share: element types of safetensors, and a borrowed view of one tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace fireq {

// Element types of the safetensors format that this program names. Order is of no meaning.
enum class Dtype : std::uint8_t {
  f64,
  f32,
  f16,
  bf16,
  f8_e4m3,
  f8_e5m2,
  i64,
  i32,
  i16,
  i8,
  u64,
  u32,
  u16,
  u8,
  boolean
};

std::size_t dtype_size(Dtype dtype) noexcept;       // bytes of one element
std::string_view dtype_name(Dtype dtype) noexcept;  // the safetensors spelling: "F32", "F8_E4M3", "BOOL"
std::optional<Dtype> parse_dtype(std::string_view name) noexcept;

// Borrowed bytes of one tensor, valid as long as the reader it came from. Row-major, little-endian. The bytes
// of a tensor may start at any address: read elements with memcpy.
struct TensorView {
  std::string name;
  Dtype dtype = Dtype::f32;
  std::vector<std::uint64_t> shape;
  std::span<const std::byte> data;

  std::uint64_t elements() const noexcept {
    std::uint64_t n = 1;
    for (const std::uint64_t d : shape) n *= d;  // validated by the reader
    return n;
  }
};

std::string shape_text(std::span<const std::uint64_t> shape);  // "[288, 768]"

}  // namespace fireq
