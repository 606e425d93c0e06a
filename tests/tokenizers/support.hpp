// What the tests of the tokenizers share: the families of tests/data, files, random Unicode text, and a UTF-8
// check that owes nothing to the code under test.
#pragma once

#include <gtest/gtest.h>
#include <iconv.h>
#include <stdlib.h>

#include <array>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <ostream>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "common/error.hpp"
#include "formats/tokenizer.hpp"
#include "tests/support/temp_folder.hpp"

namespace fireq::test {

using Ids = std::vector<std::int32_t>;

inline std::string read_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline void write_bytes(const std::string& path, std::string_view bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  out.close();
  if (!out) throw std::runtime_error("cannot write " + path);
}

// A tokenizer file of the test data and what its pipeline does to a text before it is cut up.
struct Family {
  enum class Changes : std::uint8_t { nothing, composes, marks_spaces };

  const char* name;  // for the test's name
  const char* file;  // below FIREQ_TEST_DATA
  Changes changes;

  std::string path() const { return std::string(FIREQ_TEST_DATA "/") + file; }
  std::string beside(const std::string& other) const {
    return (std::filesystem::path(path()).parent_path() / other).string();
  }
  std::unique_ptr<formats::Tokenizer> open() const {
    const std::string bytes = read_bytes(path());
    return path().ends_with(".json") ? formats::parse_tokenizer_json(bytes, path())
                                     : formats::parse_tokenizer_model(bytes, path());
  }
};

// For the names in ctest's list.
inline void PrintTo(const Family& family, std::ostream* out) {
  *out << family.name;
}

inline constexpr std::array<Family, 6> kFamilies = {{
    {"gpt2", "tokenizers/gpt2/tokenizer.json", Family::Changes::nothing},
    {"llama3", "tokenizers/llama3/tokenizer.json", Family::Changes::nothing},
    {"qwen2_5", "tokenizers/qwen2_5/tokenizer.json", Family::Changes::composes},
    {"smollm2", "tokenizers/smollm2/tokenizer.json", Family::Changes::nothing},
    {"llama2_json", "tokenizers/llama2/tokenizer.json", Family::Changes::marks_spaces},
    {"llama2_model", "tokenizers/llama2/tokenizer.model", Family::Changes::marks_spaces},
}};

// For what does not depend on the vocabulary: one of each kind of pipeline, the quickest to load.
inline constexpr std::array<Family, 3> kSmallFamilies = {kFamilies[3], kFamilies[4], kFamilies[5]};

inline std::string family_name(const testing::TestParamInfo<Family>& info) {
  return info.param.name;
}

// The Error that `call` ends with; nullopt when it returns.
template <typename Call>
std::optional<Error> error_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error;
  }
  return std::nullopt;
}

// The C library's opinion.
inline bool is_utf8(std::string text) {
  const iconv_t converter = ::iconv_open("UTF-32LE", "UTF-8");
  if (converter == reinterpret_cast<iconv_t>(-1)) throw std::runtime_error("iconv_open failed");
  std::string out(4 * text.size() + 8, '\0');
  char* from = text.data();
  char* to = out.data();
  std::size_t from_left = text.size();
  std::size_t to_left = out.size();
  const bool valid = ::iconv(converter, &from, &from_left, &to, &to_left) != static_cast<std::size_t>(-1);
  ::iconv_close(converter);
  return valid && from_left == 0;
}

inline std::string replaced(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  std::size_t at = 0;
  for (std::size_t found = text.find(from); found != std::string_view::npos; found = text.find(from, at)) {
    out += text.substr(at, found - at);
    out += to;
    at = found + from.size();
  }
  out += text.substr(at);
  return out;
}

// A stretch of text and its canonical composition (NFC), looked up in the Unicode charts. Each begins with a
// character that composes with nothing before it, so stretches can be put behind each other.
struct Stretch {
  std::string_view raw, composed;
};
inline constexpr auto kStretches = std::to_array<Stretch>({
    {"plain words", "plain words"},
    {" ", " "},
    {"  ", "  "},
    {"\r\n", "\r\n"},
    {"\n\n\n", "\n\n\n"},
    {"\t", "\t"},
    {"it's we'LL", "it's we'LL"},
    {"3.14159e-10", "3.14159e-10"},
    {"1234567", "1234567"},
    {"<|>[]{}\\\"'`~@#$%^&*", "<|>[]{}\\\"'`~@#$%^&*"},
    {"\xC3\xA9t\xC3\xA9", "\xC3\xA9t\xC3\xA9"},
    {"e\xCC\x81", "\xC3\xA9"},                                                 // e + acute
    {"q\xCC\x87\xCC\xA3", "q\xCC\xA3\xCC\x87"},                                // marks change places
    {"s\xCC\x87\xCC\xA3", "\xE1\xB9\xA9"},                                     // s + dot above + dot below
    {"\xE2\x84\xAB", "\xC3\x85"},                                              // the angstrom sign
    {"\xE1\x84\x92\xE1\x85\xA1\xE1\x86\xAB ", "\xED\x95\x9C "},                // jamo to a syllable
    {"\xEA\xB8\x80 ", "\xEA\xB8\x80 "},                                        // a syllable
    {"\xE4\xBD\xA0\xE5\xA5\xBD", "\xE4\xBD\xA0\xE5\xA5\xBD"},                  // Chinese
    {"\xD8\xB3\xD9\x84\xD8\xA7\xD9\x85", "\xD8\xB3\xD9\x84\xD8\xA7\xD9\x85"},  // Arabic
    {"\xE0\xA4\xA8\xE0\xA4\xAE\xE0\xA4\xB8", "\xE0\xA4\xA8\xE0\xA4\xAE\xE0\xA4\xB8"},  // Devanagari
    // A family of emoji with zero width joiners; a flag; a hand with skin tone; a heart with selector.
    {"\xF0\x9F\x91\xA8\xE2\x80\x8D\xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x91\xA7",
     "\xF0\x9F\x91\xA8\xE2\x80\x8D\xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x91\xA7"},
    {"\xF0\x9F\x87\xA9\xF0\x9F\x87\xAA", "\xF0\x9F\x87\xA9\xF0\x9F\x87\xAA"},
    {"\xF0\x9F\x91\x8D\xF0\x9F\x8F\xBD", "\xF0\x9F\x91\x8D\xF0\x9F\x8F\xBD"},
    {"\xE2\x9D\xA4\xEF\xB8\x8F", "\xE2\x9D\xA4\xEF\xB8\x8F"},
    // No-break space, ideographic space, zero width space, the byte order mark, U+FFFD itself.
    {"\xC2\xA0", "\xC2\xA0"},
    {"\xE3\x80\x80", "\xE3\x80\x80"},
    {"\xE2\x80\x8B", "\xE2\x80\x8B"},
    {"\xEF\xBB\xBF", "\xEF\xBB\xBF"},
    {"\xEF\xBF\xBD", "\xEF\xBF\xBD"},
    // Private use, a noncharacter, the last code point, control characters.
    {"\xEE\x80\x80", "\xEE\x80\x80"},
    {"\xEF\xBF\xBE", "\xEF\xBF\xBE"},
    {"\xF4\x8F\xBF\xBF", "\xF4\x8F\xBF\xBF"},
    {"\x01\x1B[0m\x7F", "\x01\x1B[0m\x7F"},
    {std::string_view("\0", 1), std::string_view("\0", 1)},
    {"\xE2\x96\x81", "\xE2\x96\x81"},  // the mark that stands for a space in Llama 2's vocabulary
});

struct RandomText {
  std::string raw, composed;
};

inline RandomText random_text(std::mt19937_64& random, std::size_t stretches) {
  RandomText text;
  for (std::size_t i = 0; i < stretches; ++i) {
    const Stretch& s = kStretches[random() % kStretches.size()];
    text.raw += s.raw;
    text.composed += s.composed;
  }
  return text;
}

// What decode(encode(text)) must be.
inline std::string expected_decode(const Family& family, const RandomText& text) {
  switch (family.changes) {
    case Family::Changes::nothing:
      return text.raw;
    case Family::Changes::composes:
      return text.composed;
    case Family::Changes::marks_spaces:
      return replaced(text.raw, "\xE2\x96\x81", " ");
  }
  return {};
}

}  // namespace fireq::test
