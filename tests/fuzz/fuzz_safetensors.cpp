// Headers of safetensors files. An input is taken twice: as a whole file, and, so that the JSON is reached
// without guessing a length word, as the header's text behind two bytes that say how much data follows it.
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "formats/safetensors.hpp"
#include "tests/fuzz/fuzz.hpp"

namespace {

using fireq::fuzz::require;
using namespace fireq::formats;

std::uint64_t bytes_of(const TensorInfo& tensor) {
  // No overflow check: the parser promised that there is none, and UBSan does not look at unsigned products,
  // so 128 bits are used.
  unsigned __int128 bytes = fireq::dtype_size(tensor.dtype);
  for (const std::uint64_t d : tensor.shape) {
    bytes *= d;
    require(bytes <= UINT64_MAX, "a tensor's size overflows");
  }
  return static_cast<std::uint64_t>(bytes);
}

void check(std::span<const std::byte> head, std::uint64_t file_size) {
  SafetensorsHeader header;
  if (!fireq::fuzz::accepted([&] { header = parse_safetensors_header(head, file_size); })) return;
  require(header.data_start >= 8 && header.data_start <= head.size(), "data begin outside of the file");
  std::uint64_t cursor = 0;
  std::vector<TensorPlan> plan;
  for (const TensorInfo& tensor : header.tensors) {
    require(tensor.begin == cursor && tensor.end >= tensor.begin, "ranges do not follow one another");
    require(tensor.end - tensor.begin == bytes_of(tensor), "a range does not fit its shape");
    cursor = tensor.end;
    plan.push_back({tensor.name, tensor.dtype, tensor.shape});
  }
  require(header.data_start + cursor == file_size, "the data do not end with the file");

  // What was read, written and read again, is the same.
  const std::string again = make_safetensors_head(plan, header.metadata);
  const SafetensorsHeader second =
      parse_safetensors_header(std::as_bytes(std::span(again)), again.size() + cursor);
  require(second.metadata == header.metadata, "metadata changed on the way");
  require(second.tensors.size() == header.tensors.size(), "tensors were lost on the way");
  for (std::size_t i = 0; i < plan.size(); ++i) {
    const TensorInfo &a = header.tensors[i], &b = second.tensors[i];
    require(
        a.name == b.name && a.dtype == b.dtype && a.shape == b.shape && a.begin == b.begin && a.end == b.end,
        "a tensor changed on the way");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  check(bytes, size);
  if (size < 2) return 0;
  const std::uint64_t data_bytes = data[0] | static_cast<std::uint64_t>(data[1]) << 8U;
  std::vector<std::byte> head(8);
  for (std::size_t i = 0; i < 8; ++i) head[i] = static_cast<std::byte>((size - 2) >> (8 * i) & 0xffU);
  head.insert(head.end(), bytes.begin() + 2, bytes.end());
  check(head, head.size() + data_bytes);
  return 0;
}
