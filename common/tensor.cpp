#include "common/tensor.hpp"

#include <array>

namespace fireq {
namespace {

struct DtypeRow {
  Dtype dtype;
  std::string_view name;
  std::size_t size;
};
constexpr std::array<DtypeRow, 15> kDtypes{{{Dtype::f64, "F64", 8},
                                            {Dtype::f32, "F32", 4},
                                            {Dtype::f16, "F16", 2},
                                            {Dtype::bf16, "BF16", 2},
                                            {Dtype::f8_e4m3, "F8_E4M3", 1},
                                            {Dtype::f8_e5m2, "F8_E5M2", 1},
                                            {Dtype::i64, "I64", 8},
                                            {Dtype::i32, "I32", 4},
                                            {Dtype::i16, "I16", 2},
                                            {Dtype::i8, "I8", 1},
                                            {Dtype::u64, "U64", 8},
                                            {Dtype::u32, "U32", 4},
                                            {Dtype::u16, "U16", 2},
                                            {Dtype::u8, "U8", 1},
                                            {Dtype::boolean, "BOOL", 1}}};

}  // namespace

std::size_t dtype_size(Dtype dtype) noexcept {
  return kDtypes[static_cast<std::size_t>(dtype)].size;
}
std::string_view dtype_name(Dtype dtype) noexcept {
  return kDtypes[static_cast<std::size_t>(dtype)].name;
}

std::optional<Dtype> parse_dtype(std::string_view name) noexcept {
  for (const DtypeRow& row : kDtypes) {
    if (row.name == name) return row.dtype;
  }
  return std::nullopt;
}

std::string shape_text(std::span<const std::uint64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + "]";
}

}  // namespace fireq
