// tokenizer.model: the protobuf of SentencePiece.
#include <cstddef>
#include <cstdint>
#include <memory>

#include "tests/fuzz/fuzz_tokenizer.hpp"

// NOLINTNEXTLINE(readability-identifier-naming): the name that libFuzzer calls
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  std::unique_ptr<fireq::formats::Tokenizer> tokenizer;
  const bool parsed = fireq::fuzz::accepted(
      [&] { tokenizer = fireq::formats::parse_tokenizer_model(bytes, "tokenizer.model"); });
  if (parsed) fireq::fuzz::use(*tokenizer, "the quick brown fox \xC3\xA9\xE4\xBD\xA0 jumps");
  return 0;
}
