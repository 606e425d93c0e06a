#include "formats/unicode.hpp"

#include "common/error.hpp"
#include "formats/tokenizer.hpp"

namespace fireq::formats {

Utf8Step utf8_step(std::string_view text, std::size_t at) noexcept {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(at);
  if (lead < 0x80) return {lead, 1, true, false};
  std::size_t length = 0;
  char32_t value = 0;
  // Bounds of the second byte keep out overlong forms, surrogates and code points above U+10FFFF.
  unsigned char lowest = 0x80;
  unsigned char highest = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
    value = lead & 0x1FU;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    value = lead & 0x0FU;
    if (lead == 0xE0) lowest = 0xA0;
    if (lead == 0xED) highest = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    value = lead & 0x07U;
    if (lead == 0xF0) lowest = 0x90;
    if (lead == 0xF4) highest = 0x8F;
  } else {
    return {};
  }
  for (std::size_t i = 1; i < length; ++i) {
    if (at + i >= text.size()) return {0xFFFD, i, false, true};
    const unsigned char next = byte(at + i);
    if (next < lowest || next > highest) return {0xFFFD, i, false, false};
    lowest = 0x80;
    highest = 0xBF;
    value = (value << 6U) | (next & 0x3FU);
  }
  return {value, length, true, false};
}

void append_utf8(char32_t c, std::string& out) {
  const auto put = [&](char32_t byte) { out += static_cast<char>(static_cast<unsigned char>(byte)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xC0U | (c >> 6U));
    put(0x80U | (c & 0x3FU));
  } else if (c < 0x10000) {
    put(0xE0U | (c >> 12U));
    put(0x80U | ((c >> 6U) & 0x3FU));
    put(0x80U | (c & 0x3FU));
  } else {
    put(0xF0U | (c >> 18U));
    put(0x80U | ((c >> 12U) & 0x3FU));
    put(0x80U | ((c >> 6U) & 0x3FU));
    put(0x80U | (c & 0x3FU));
  }
}

void append_repaired_utf8(std::string_view bytes, std::string& out, std::string* held) {
  for (std::size_t at = 0; at < bytes.size();) {
    const Utf8Step step = utf8_step(bytes, at);
    if (step.valid) {
      out.append(bytes, at, step.length);
    } else if (step.truncated && held != nullptr) {
      held->append(bytes, at, step.length);
    } else {
      out += "\xEF\xBF\xBD";
    }
    at += step.length;
  }
}

void check_utf8(std::string_view text, const std::string& path_for_errors) {
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Step step = utf8_step(text, at);
    if (!step.valid) {
      Error error(ErrorKind::input, "text is not valid UTF-8");
      error.offset(at).hint(step.truncated ? "the text ends inside a character"
                                           : "convert the text to UTF-8 (for example with iconv)");
      if (!path_for_errors.empty()) error.path(path_for_errors);
      throw error;
    }
    at += step.length;
  }
}

std::string_view slice_code_points(std::string_view text, std::uint64_t skip, std::uint64_t count) {
  // Every byte that is no continuation byte starts a code point.
  const auto starts = [&](std::size_t i) { return (static_cast<unsigned char>(text[i]) & 0xC0U) != 0x80U; };
  std::size_t at = 0;
  const auto advance = [&](std::uint64_t n) {
    for (; n > 0 && at < text.size(); --n) {
      ++at;
      while (at < text.size() && !starts(at)) ++at;
    }
  };
  advance(skip);
  const std::size_t begin = at;
  if (count == 0) return text.substr(begin);
  advance(count);
  return text.substr(begin, at - begin);
}

}  // namespace fireq::formats
