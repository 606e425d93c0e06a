#include "calib/packed_tensors.hpp"

#include <algorithm>
#include <cstring>
#include <span>
#include <utility>

#include "common/error.hpp"
#include "libquant/packing.hpp"

namespace fireq::calib {
namespace {

using formats::WeightLayout;

constexpr const char* kCodes = ".weight_codes";
constexpr const char* kTiles = ".weight_tiles";
constexpr const char* kGroupScale = ".weight_group_scale";
constexpr const char* kRowScale = ".weight_row_scale";
constexpr const char* kShape = ".weight_shape";
constexpr const char* kLevels = ".weight_levels";
constexpr const char* kFp8Weight = ".weight";
constexpr const char* kFp8Scale = ".weight_scale";

template <typename T>
void read_into(const formats::SafetensorsFile& file, const std::string& name, std::vector<T>& out) {
  const auto& tensors = file.header().tensors;
  const auto found =
      std::find_if(tensors.begin(), tensors.end(), [&](const auto& t) { return t.name == name; });
  const std::size_t bytes = out.size() * sizeof(T);
  if (found == tensors.end() || found->end - found->begin != bytes) {
    throw Error(ErrorKind::input, "a staged tensor is missing or has another size")
        .path(file.path())
        .tensor(name)
        .expected(std::to_string(bytes) + " bytes")
        .found(found == tensors.end() ? "none" : std::to_string(found->end - found->begin));
  }
  if (bytes > 0) std::memcpy(out.data(), file.tensor(*found).data.data(), bytes);
  file.release(*found);
}

}  // namespace

formats::FireqWriter::Tensor owned_tensor(std::string name, Dtype dtype, std::vector<std::uint64_t> shape,
                                          std::vector<std::byte> bytes) {
  return {{std::move(name), dtype, std::move(shape)}, std::move(bytes), {}};
}

std::vector<formats::FireqWriter::Tensor> packed_tensors(const std::string& name,
                                                         const libquant::QuantizedLinear& q,
                                                         WeightLayout layout, bool own_levels) {
  std::vector<formats::FireqWriter::Tensor> list;
  const std::uint64_t kp = q.padded_cols();
  if (layout == WeightLayout::row) {
    list.push_back(owned_tensor(name + kCodes, Dtype::u8, {q.rows, kp / 2}, to_bytes(q.codes)));
    list.push_back(
        owned_tensor(name + kGroupScale, Dtype::f8_e4m3, {q.rows, q.groups()}, to_bytes(q.group_scales)));
  } else {
    const std::uint64_t row_tiles = (q.rows + libquant::kTileRows - 1) / libquant::kTileRows;
    list.push_back(owned_tensor(name + kTiles, Dtype::u8, {row_tiles, q.groups(), libquant::kTileBytes},
                                to_bytes(libquant::pack_sm90(q))));
  }
  list.push_back(owned_tensor(name + kRowScale, Dtype::f32, {q.row_scales.size()}, to_bytes(q.row_scales)));
  const std::vector<std::int64_t> shape{static_cast<std::int64_t>(q.rows), static_cast<std::int64_t>(q.cols)};
  list.push_back(owned_tensor(name + kShape, Dtype::i64, {2}, to_bytes(shape)));
  if (own_levels) {
    const std::vector<float> levels(q.levels.magnitude.begin(), q.levels.magnitude.end());
    list.push_back(owned_tensor(name + kLevels, Dtype::f32, {levels.size()}, to_bytes(levels)));
  }
  return list;
}

std::vector<formats::FireqWriter::Tensor> fp8_tensors(const std::string& name, const libquant::Fp8Linear& q) {
  std::vector<formats::FireqWriter::Tensor> list;
  list.push_back(owned_tensor(name + kFp8Weight, Dtype::f8_e4m3, {q.rows, q.cols}, to_bytes(q.codes)));
  list.push_back(owned_tensor(name + kFp8Scale, Dtype::f32, {q.rows}, to_bytes(q.row_scales)));
  return list;
}

void read_fp8(const formats::SafetensorsFile& file, const std::string& name, libquant::Fp8Linear& out) {
  read_into(file, name + kFp8Weight, out.codes);
  read_into(file, name + kFp8Scale, out.row_scales);
  try {
    libquant::check_fp8_linear(out);
  } catch (Error& error) {
    throw error.path_if_unset(file.path()).tensor_if_unset(name);
  }
}

void read_packed(const formats::SafetensorsFile& file, const std::string& name, WeightLayout layout,
                 libquant::QuantizedLinear& out) {
  if (layout == WeightLayout::row) {
    read_into(file, name + kCodes, out.codes);
    read_into(file, name + kGroupScale, out.group_scales);
  } else {
    std::vector<std::uint8_t> tiles(libquant::tile_bytes(out.rows, out.cols));
    read_into(file, name + kTiles, tiles);
    libquant::unpack_sm90(tiles, out);
  }
  read_into(file, name + kRowScale, out.row_scales);
  const auto& tensors = file.header().tensors;
  if (std::any_of(tensors.begin(), tensors.end(), [&](const auto& t) { return t.name == name + kLevels; })) {
    std::vector<float> levels(out.levels.magnitude.size());
    read_into(file, name + kLevels, levels);
    std::copy(levels.begin(), levels.end(), out.levels.magnitude.begin());
  }
  try {
    libquant::check_quantized_linear(out);
  } catch (Error& error) {
    throw error.path_if_unset(file.path()).tensor_if_unset(name);
  }
}

}  // namespace fireq::calib
