// Text as Unicode: well-formed UTF-8, repair of broken UTF-8, and the character classes and normal forms that
// tokenizers ask for. Classes and normal forms come from utf8proc, UTF-8 itself needs no tables.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace fireq::formats {

// One step through UTF-8 text. Ill-formed text follows Unicode's recommended practice: `length` is then the
// maximal subpart, the bytes that one U+FFFD stands for.
struct Utf8Step {
  char32_t code_point = 0xFFFD;
  std::size_t length = 1;
  bool valid = false;
  bool truncated = false;  // ill-formed only because the text ends inside a sequence
};
Utf8Step utf8_step(std::string_view text, std::size_t at) noexcept;  // at < text.size()

void append_utf8(char32_t code_point, std::string& out);

// Appends `bytes` with U+FFFD for each maximal ill-formed subpart. With `held` != nullptr a sequence that the
// end of `bytes` cuts off is moved there instead.
void append_repaired_utf8(std::string_view bytes, std::string& out, std::string* held = nullptr);

// Unicode classes (unicode_classes.cpp).
bool is_white_space(char32_t c) noexcept;  // property White_Space
bool is_number(char32_t c) noexcept;       // Nd, Nl, No
bool is_punctuation(char32_t c) noexcept;  // P*, and all ASCII punctuation
bool is_mark(char32_t c) noexcept;         // Mn, Mc, Me
bool is_word(char32_t c) noexcept;  // \w of UTS 18: alphabetic, marks, decimal digits, connectors, joiners

enum class NormalForm : std::uint8_t { nfc, nfd, nfkc, nfkd };
std::string normal_form(std::string_view text, NormalForm form);  // text is valid UTF-8
std::string lower_case(std::string_view text);                    // code point by code point, no context

}  // namespace fireq::formats
