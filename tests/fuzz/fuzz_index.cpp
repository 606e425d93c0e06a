// model.safetensors.index.json: every shard name that is let through becomes part of a path.
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "formats/checkpoint.hpp"
#include "tests/fuzz/fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using fireq::fuzz::require;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  std::map<std::string, std::string> shard_of;
  if (!fireq::fuzz::accepted([&] { shard_of = fireq::formats::parse_safetensors_index(text, "index"); })) {
    return 0;
  }
  for (const auto& [tensor, shard] : shard_of) {
    require(shard.ends_with(".safetensors"), "a shard of another type");
    require(shard.find('/') == std::string::npos && shard.find('\\') == std::string::npos, "a folder");
    require(shard.find("..") == std::string::npos, "a way up");
    require(shard.find('\0') == std::string::npos, "a zero byte");
  }
  return 0;
}
