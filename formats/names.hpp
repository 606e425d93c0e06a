// Small helpers on file names and numbers as text, shared inside formats/.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "common/error.hpp"

namespace fireq::formats {

// ASCII only: file systems that fold case fold these at least.
inline std::string ascii_lower(std::string_view text) {
  std::string lower(text);
  for (char& c : lower) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return lower;
}

// 'text', for messages. (GCC 12 warns wrongly about "'" + a temporary string.)
inline std::string in_quotes(std::string_view text) {
  std::string quoted("'");
  quoted.append(text).append("'");
  return quoted;
}

// 16 or 32 lower-case hexadecimal digits of xxHash values, most significant first.
inline std::string hex64(std::uint64_t value) {
  std::string text(16, '0');
  for (std::size_t i = 0; i < 16; ++i) text[15 - i] = "0123456789abcdef"[value >> (4 * i) & 15U];
  return text;
}
inline std::string hex128(std::uint64_t high, std::uint64_t low) {
  return hex64(high) + hex64(low);
}

// Refuses a zero byte, which the JSON library would take for the end of the text and not look further.
inline void refuse_nul(std::string_view json_text, const std::string& path) {
  const std::size_t at = json_text.find('\0');
  if (at == std::string_view::npos) return;
  throw Error(ErrorKind::input, "not valid JSON: a zero byte").path(path).offset(at);
}

}  // namespace fireq::formats
