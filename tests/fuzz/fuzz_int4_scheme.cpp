// quantization_config of other programs' 4-bit folders: what is accepted has a size that shapes are made of.
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "formats/int4_scheme.hpp"
#include "tests/fuzz/fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace fireq::formats;
  using fireq::fuzz::require;
  const std::string text(reinterpret_cast<const char*>(data), size);
  std::optional<Int4Scheme> scheme;
  if (!fireq::fuzz::accepted([&] { scheme = parse_int4_scheme(text, "config.json"); }) || !scheme) return 0;
  require(scheme->group_size <= std::uint64_t{1} << 24U, "a group size out of range");
  require(scheme->format == Int4Format::gptq || !scheme->zero_plus_one, "GPTQ's zeros in another format");
  require(!int4_method(scheme->format).empty(), "a method without a name");
  return 0;
}
