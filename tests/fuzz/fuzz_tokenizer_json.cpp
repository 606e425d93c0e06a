// tokenizer.json, up to a NUL; what follows is a text for the tokenizer.
#include <cstddef>
#include <cstdint>
#include <memory>

#include "tests/fuzz/fuzz_tokenizer.hpp"

// NOLINTNEXTLINE(readability-identifier-naming): the name that libFuzzer calls
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const std::size_t end = bytes.find('\0');
  std::unique_ptr<fireq::formats::Tokenizer> tokenizer;
  const bool parsed = fireq::fuzz::accepted(
      [&] { tokenizer = fireq::formats::parse_tokenizer_json(bytes.substr(0, end), "tokenizer.json"); });
  if (parsed) fireq::fuzz::use(*tokenizer, end < size ? bytes.substr(end + 1) : bytes.substr(0, 64));
  return 0;
}
