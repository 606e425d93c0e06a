#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <vector>

#include "common/error.hpp"
#include "formats/unicode.hpp"
#include "formats/unicode_additions.hpp"

namespace fireq::formats {
namespace {

utf8proc_category_t category(char32_t c) noexcept {
  return utf8proc_category(static_cast<utf8proc_int32_t>(c));
}

bool between(char32_t c, char32_t lowest, char32_t highest) noexcept {
  return c >= lowest && c <= highest;
}

}  // namespace

bool is_white_space(char32_t c) noexcept {
  if (c < 0x80) return c == ' ' || between(c, '\t', '\r');
  return c == 0x85 || c == 0xA0 || c == 0x1680 || between(c, 0x2000, 0x200A) || c == 0x2028 || c == 0x2029 ||
         c == 0x202F || c == 0x205F || c == 0x3000;
}

bool is_number(char32_t c) noexcept {
  if (c < 0x80) return between(c, '0', '9');
  const auto k = category(c);
  if (k == UTF8PROC_CATEGORY_CN) {
    return std::any_of(kUnicodeAdditions.begin(), kUnicodeAdditions.end(), [c](const CategoryRange& range) {
      return range.category.starts_with('N') && between(c, range.first, range.last);
    });
  }
  return k == UTF8PROC_CATEGORY_ND || k == UTF8PROC_CATEGORY_NL || k == UTF8PROC_CATEGORY_NO;
}

bool is_punctuation(char32_t c) noexcept {
  if (c < 0x80)
    return between(c, '!', '/') || between(c, ':', '@') || between(c, '[', '`') || between(c, '{', '~');
  const auto k = category(c);
  return k == UTF8PROC_CATEGORY_PC || k == UTF8PROC_CATEGORY_PD || k == UTF8PROC_CATEGORY_PS ||
         k == UTF8PROC_CATEGORY_PE || k == UTF8PROC_CATEGORY_PI || k == UTF8PROC_CATEGORY_PF ||
         k == UTF8PROC_CATEGORY_PO;
}

bool is_mark(char32_t c) noexcept {
  const auto k = category(c);
  return k == UTF8PROC_CATEGORY_MN || k == UTF8PROC_CATEGORY_MC || k == UTF8PROC_CATEGORY_ME;
}

bool is_word(char32_t c) noexcept {
  switch (category(c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      // Joiners, and the symbols that are alphabetic: circled, squared and negative letters.
      return c == 0x200C || c == 0x200D || between(c, 0x24B6, 0x24E9) || between(c, 0x1F130, 0x1F149) ||
             between(c, 0x1F150, 0x1F169) || between(c, 0x1F170, 0x1F189);
  }
}

// Steps of utf8proc_map(), but for the order of marks: that one bubbles them into place, which takes minutes
// for a text of a million marks.
std::string normal_form(std::string_view text, NormalForm form) {
  const bool ascii =
      std::all_of(text.begin(), text.end(), [](char c) { return static_cast<signed char>(c) >= 0; });
  if (ascii) return std::string(text);
  const bool compose = form == NormalForm::nfc || form == NormalForm::nfkc;
  const bool compat = form == NormalForm::nfkc || form == NormalForm::nfkd;
  const auto options =
      static_cast<utf8proc_option_t>(UTF8PROC_STABLE | (compose ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE) |
                                     (compat ? UTF8PROC_COMPAT : UTF8PROC_STABLE));
  std::vector<utf8proc_int32_t> codes;
  codes.reserve(text.size());
  const auto check = [](utf8proc_ssize_t length) {
    if (length < 0)
      throw Error(ErrorKind::input, std::string("text cannot be normalised: ") + utf8proc_errmsg(length));
    return static_cast<std::size_t>(length);
  };
  std::array<utf8proc_int32_t, 64> parts{};  // no decomposition is longer than 18
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Step step = utf8_step(text, at);
    at += step.length;
    int boundary = 0;
    const std::size_t count =
        check(utf8proc_decompose_char(static_cast<utf8proc_int32_t>(step.code_point), parts.data(),
                                      static_cast<utf8proc_ssize_t>(parts.size()), options, &boundary));
    codes.insert(codes.end(), parts.begin(),
                 parts.begin() + static_cast<std::ptrdiff_t>(std::min(count, parts.size())));
  }
  // Between two starters (class 0), marks go by their class; equals keep their order.
  const auto combining = [](utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; };
  for (auto begin = codes.begin(); begin != codes.end();) {
    if (combining(*begin) == 0) {
      ++begin;
      continue;
    }
    const auto end = std::find_if(begin, codes.end(), [&](utf8proc_int32_t c) { return combining(c) == 0; });
    std::stable_sort(begin, end, [&](auto a, auto b) { return combining(a) < combining(b); });
    begin = end;
  }
  const std::size_t length =
      check(utf8proc_normalize_utf32(codes.data(), static_cast<utf8proc_ssize_t>(codes.size()), options));
  std::string out;
  out.reserve(text.size());
  for (std::size_t i = 0; i < length; ++i) append_utf8(static_cast<char32_t>(codes[i]), out);
  return out;
}

std::string lower_case(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Step step = utf8_step(text, at);
    at += step.length;
    if (step.code_point == 0x130) {  // the one letter whose lower case is two code points
      out += "i\xCC\x87";
    } else {
      append_utf8(static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(step.code_point))),
                  out);
    }
  }
  return out;
}

}  // namespace fireq::formats
