#define PCRE2_CODE_UNIT_WIDTH 8
#include "formats/tokenizer_regex.hpp"

#include <pcre2.h>

#include <array>
#include <cstdio>
#include <new>
#include <utility>

#include "common/error.hpp"
#include "formats/unicode.hpp"
#include "formats/unicode_additions.hpp"

namespace fireq::formats {
namespace {

constexpr std::size_t kLongestPattern = 32'768;
constexpr std::uint32_t kMatchLimit = 10'000'000;
constexpr std::uint32_t kDeepestGroups = 200;
constexpr std::uint32_t kHeapLimitKiB = 64 * 1024;
constexpr std::size_t kAlwaysFine = std::size_t{1} << 20U;  // bytes of rewritten text
constexpr std::size_t kMostGrowth = 32;  // the longest compatibility decomposition is 11 times as long
constexpr std::size_t kJitStackFirst = 32 * 1024;
constexpr std::size_t kJitStackMost = 8 * 1024 * 1024;

// What to put into a class for the general category `name` ("L", "Nd"), with the characters that PCRE2's
// tables may lack.
void append_category(std::string_view name, std::string& out) {
  const auto put = [&](char32_t c) {
    std::array<char, 16> text{};
    std::snprintf(text.data(), text.size(), "\\x{%x}", static_cast<unsigned>(c));
    out += text.data();
  };
  out.append("\\p{").append(name) += '}';
  for (const CategoryRange& range : kUnicodeAdditions) {
    if (!range.category.starts_with(name)) continue;
    put(range.first);
    if (range.last > range.first) out += '-';
    if (range.last > range.first) put(range.last);
  }
}

// \w of Oniguruma: alphabetic characters, marks, decimal digits, connectors and, by its tables, the Latin-1
// fractions and superscripts. PCRE2's own means letters, numbers and underscore only.
const std::string& word_characters() {
  static const std::string text = [] {
    std::string out = R"(\p{Alphabetic}\p{Pc}\xb2\xb3\xb9\xbc-\xbe)";
    for (const std::string_view name : {"L", "M", "Nd"}) append_category(name, out);
    return out;
  }();
  return text;
}

bool is_category(std::string_view name) {
  constexpr std::string_view kNames =
      " L Lu Ll Lt Lm Lo M Mn Mc Me N Nd Nl No P Pc Pd Ps Pe Pi Pf Po S Sm Sc Sk So Z Zs Zl Zp C Cc Cf Cs Co "
      "Cn ";
  std::string padded(1, ' ');
  padded.append(name) += ' ';
  return kNames.find(padded) != std::string_view::npos;
}

[[noreturn]] void refuse(std::string_view pattern, std::size_t at, const std::string& problem) {
  throw Error(ErrorKind::input, "regular expression '" + std::string(pattern) + "' " + problem +
                                    " at position " + std::to_string(at));
}

class Translator {
 public:
  explicit Translator(std::string_view pattern) : in_(pattern) {}

  std::string run() {
    while (at_ < in_.size()) {
      const char c = in_[at_];
      if (c == '\\') {
        escape(false);
      } else if (c == '[') {
        char_class();
      } else if (c == '(') {
        group();
      } else if (c == '{') {
        interval();
      } else {
        out_ += c;
        ++at_;
      }
    }
    return std::move(out_);
  }

 private:
  char peek(std::size_t ahead) const { return at_ + ahead < in_.size() ? in_[at_ + ahead] : '\0'; }

  static bool is_digit(char c) { return c >= '0' && c <= '9'; }
  static bool is_hex(char c) { return is_digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'); }
  static bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

  void escape(bool in_class) {
    const std::size_t start = at_;
    const char e = peek(1);
    if (at_ + 1 >= in_.size()) refuse(in_, start, "ends in a backslash");
    at_ += 2;
    switch (e) {
      case 's':  // PCRE2's own also takes U+180E
        out_ += R"(\p{White_Space})";
        return;
      case 'S':
        out_ += R"(\P{White_Space})";
        return;
      case 'd':
        put_category("Nd", false, in_class);
        return;
      case 'D':
        put_category("Nd", true, in_class);
        return;
      case 'w':
        put_set(word_characters(), false, in_class);
        return;
      case 'W':
        if (in_class) break;
        put_set(word_characters(), true, in_class);
        return;
      case 'b':
      case 'B':
        if (in_class) break;
        word_edge(e == 'b');
        return;
      case 'p':
      case 'P':
        property(start, e == 'P', in_class);
        return;
      case 'v':  // the vertical tab; to PCRE2 a class
        out_ += R"(\x{b})";
        return;
      case 'r':
      case 'n':
      case 't':
      case 'f':
      case 'a':
      case 'e':
        out_ += {'\\', e};
        return;
      case 'A':
      case 'z':
      case 'Z':
        if (in_class) break;
        out_ += {'\\', e};
        return;
      case 'x':
      case 'u':
        code_point(start, e);
        return;
      default:
        if (is_letter(e) || is_digit(e)) break;
        out_ += {'\\', e};  // for a byte of a longer character PCRE2 drops the backslash as Oniguruma does
        return;
    }
    refuse(in_, start, std::string("uses \\") + e + ", which is not supported");
  }

  void put_set(std::string_view content, bool negated, bool in_class) {
    if (!in_class) out_ += negated ? "[^" : "[";
    out_ += content;
    if (!in_class) out_ += ']';
  }

  void put_category(std::string_view name, bool negated, bool in_class) {
    if (negated && in_class) {  // a class cannot take characters out again
      out_.append("\\P{").append(name) += '}';
      return;
    }
    std::string content;
    append_category(name, content);
    put_set(content, negated, in_class);
  }

  void word_edge(bool edge) {
    const auto put = [&](std::string_view opening) {
      out_.append(opening) += '[';
      out_.append(word_characters()).append("])");
    };
    put("(?:(?<=");
    put(edge ? "(?!" : "(?=");
    put("|(?<!");
    put(edge ? "(?=" : "(?!");
    out_ += ')';
  }

  void property(std::size_t start, bool negated, bool in_class) {
    const std::size_t close = in_.find('}', at_);
    if (peek(0) != '{' || close == std::string_view::npos) refuse(in_, start, "has \\p without {name}");
    std::string_view name = in_.substr(at_ + 1, close - at_ - 1);
    at_ = close + 1;
    if (name.starts_with('^')) {
      negated = !negated;
      name.remove_prefix(1);
    }
    for (const char c : name) {
      if (!is_letter(c) && c != '_') refuse(in_, start, "has a strange \\p{name}");
    }
    if (is_category(name)) {
      put_category(name, negated, in_class);
      return;
    }
    const bool boolean = name == "Alphabetic" || name == "Lowercase" || name == "Uppercase" ||
                         name == "White_Space" || name == "Emoji" || name == "Any";
    std::string content(negated ? "\\P{" : "\\p{");
    // The rest are scripts. Without the prefix PCRE2 means the characters used by a script.
    content.append(boolean ? "" : "sc:").append(name) += '}';
    if (name == "Han" && !negated) content += R"(\x{2b739}\x{2ebf0}-\x{2ee5d}\x{31350}-\x{323af})";
    put_set(content, false, in_class);
  }

  void code_point(std::size_t start, char e) {
    std::string digits;
    if (e == 'x' && peek(0) == '{') {
      ++at_;
      while (is_hex(peek(0))) digits += in_[at_++];
      if (peek(0) != '}') refuse(in_, start, "has a broken \\x{...}");
      ++at_;
    } else {
      const std::size_t most = e == 'x' ? 2 : 4;
      while (digits.size() < most && is_hex(peek(0))) digits += in_[at_++];
      // Above 7f, \xHH is one byte of UTF-8 to Oniguruma and a code point to PCRE2.
      if (digits.size() != most || (e == 'x' && digits[0] >= '8')) {
        refuse(in_, start, std::string("has a \\") + e + " that is not supported");
      }
    }
    if (digits.empty() || digits.size() > 6) refuse(in_, start, "has a code point out of range");
    out_.append("\\x{").append(digits) += '}';
  }

  void char_class() {
    const std::size_t start = at_;
    out_ += '[';
    ++at_;
    if (peek(0) == '^') {
      out_ += '^';
      ++at_;
    }
    if (peek(0) == ']') refuse(in_, start, "has a class that begins with ]");
    while (at_ < in_.size() && in_[at_] != ']') {
      const char c = in_[at_];
      if (c == '\\') {
        escape(true);
        continue;
      }
      if (c == '[') refuse(in_, at_, "has a class inside a class, which is not supported");
      if (c == '&' && peek(1) == '&')
        refuse(in_, at_, "has an intersection of classes, which is not supported");
      out_ += c;
      ++at_;
    }
    if (at_ >= in_.size()) refuse(in_, start, "has a class without end");
    out_ += ']';
    ++at_;
  }

  void group() {
    const std::size_t start = at_;
    if (peek(1) == '*') refuse(in_, start, "has a verb (*...), which is not supported");
    if (peek(1) != '?') {
      out_ += '(';
      ++at_;
      return;
    }
    for (const std::string_view kind : {"(?:", "(?=", "(?!", "(?>", "(?<=", "(?<!", "(?i:"}) {
      if (in_.substr(at_).starts_with(kind)) {
        out_ += kind;
        at_ += kind.size();
        return;
      }
    }
    // Further inside, Ruby's (?i) takes in the alternatives that follow, Perl's does not.
    if (at_ == 0 && in_.starts_with("(?i)")) {
      out_ += "(?i)";
      at_ += 4;
      return;
    }
    refuse(in_, start, "has a kind of group that is not supported");
  }

  void interval() {
    std::size_t i = at_ + 1;
    std::string low, high;
    while (i < in_.size() && is_digit(in_[i])) low += in_[i++];
    const bool comma = i < in_.size() && in_[i] == ',';
    if (comma) {
      ++i;
      while (i < in_.size() && is_digit(in_[i])) high += in_[i++];
    }
    if (i >= in_.size() || in_[i] != '}' || (low.empty() && high.empty())) {
      out_ += "\\{";  // no quantifier: the character
      ++at_;
      return;
    }
    const char next = i + 1 < in_.size() ? in_[i + 1] : '\0';
    // After an interval Ruby's + repeats and its ? may be optional; Perl's are possessive and lazy.
    if (next == '+' || (next == '?' && !comma))
      refuse(in_, at_, "has a quantifier after {n}, which is not supported");
    out_.append("{").append(low.empty() ? "0" : low);
    if (comma) out_.append(",").append(high);
    out_ += '}';
    at_ = i + 1;
  }

  std::string_view in_;
  std::size_t at_ = 0;
  std::string out_;
};

std::string pcre2_message(int code) {
  std::array<PCRE2_UCHAR, 256> buffer{};
  pcre2_get_error_message(code, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

template <auto Free>
struct Deleter {
  template <typename T>
  void operator()(T* p) const noexcept {
    Free(p);
  }
};
template <typename T, auto Free>
using Owned = std::unique_ptr<T, Deleter<Free>>;

// Limits and buffers of a match. One set for each thread and all patterns: there may be a search for every
// word of a text, and making these takes longer than the search.
struct MatchScratch {
  Owned<pcre2_match_context, pcre2_match_context_free> context;
  Owned<pcre2_match_data, pcre2_match_data_free> data;
  Owned<pcre2_jit_stack, pcre2_jit_stack_free> stack;

  MatchScratch()
      : context(pcre2_match_context_create(nullptr)),
        data(pcre2_match_data_create(1, nullptr)),
        stack(pcre2_jit_stack_create(kJitStackFirst, kJitStackMost, nullptr)) {
    if (!context || !data) throw std::bad_alloc();
    pcre2_set_match_limit(context.get(), kMatchLimit);
    pcre2_set_heap_limit(context.get(), kHeapLimitKiB);
    if (stack) pcre2_jit_stack_assign(context.get(), nullptr, stack.get());  // none without a JIT
  }
};

}  // namespace

std::string translate_oniguruma(std::string_view pattern) {
  return Translator(pattern).run();
}

struct Regex::Compiled {
  Owned<pcre2_code, pcre2_code_free> code;
};

Regex::Regex(std::string_view pattern) : compiled_(std::make_unique<Compiled>()), pattern_(pattern) {
  if (pattern.size() > kLongestPattern) {
    throw Error(ErrorKind::input, "a regular expression is too long")
        .expected("at most " + std::to_string(kLongestPattern) + " bytes")
        .found(std::to_string(pattern.size()));
  }
  const std::string translated = translate_oniguruma(pattern);
  const Owned<pcre2_compile_context, pcre2_compile_context_free> context(
      pcre2_compile_context_create(nullptr));
  if (!context) throw std::bad_alloc();
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  pcre2_set_parens_nest_limit(context.get(), kDeepestGroups);
  int code = 0;
  PCRE2_SIZE offset = 0;
  compiled_->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                                      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
                                      &code, &offset, context.get()));
  if (!compiled_->code) refuse(pattern, offset, "does not compile: " + pcre2_message(code));
  // Without a JIT for this processor the interpreter takes over.
  pcre2_jit_compile(compiled_->code.get(), PCRE2_JIT_COMPLETE);
}

Regex::~Regex() = default;
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;

void Regex::split(std::string_view text, std::vector<MatchSpan>& spans) const {
  thread_local const MatchScratch scratch;
  pcre2_match_context* context = scratch.context.get();
  pcre2_match_data* data = scratch.data.get();

  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const PCRE2_SIZE* pair = pcre2_get_ovector_pointer(data);
  std::size_t from = 0;     // where the next search begins
  std::size_t covered = 0;  // end of the last stretch
  bool any = false;
  std::size_t last_end = 0;
  while (from <= text.size()) {
    // The text was checked once; checking it again for each match would be quadratic.
    const int code =
        pcre2_match(compiled_->code.get(), subject, text.size(), from, PCRE2_NO_UTF_CHECK, data, context);
    if (code == PCRE2_ERROR_NOMATCH) break;
    if (code < 0) {
      throw Error(ErrorKind::input,
                  "regular expression '" + pattern_ + "' fails on the text: " + pcre2_message(code))
          .offset(from)
          .hint("the pattern backtracks without bound");
    }
    const std::size_t begin = pair[0];
    const std::size_t end = pair[1];
    if (begin == end && any && end == last_end) {
      // An empty match right behind the last one does not count.
      if (from >= text.size()) break;
      from += utf8_step(text, from).length;
      continue;
    }
    if (covered < begin) spans.push_back({covered, begin, false});
    spans.push_back({begin, end, true});
    covered = from = last_end = end;
    any = true;
  }
  if (covered < text.size()) spans.push_back({covered, text.size(), false});
}

void check_growth(std::size_t before, std::size_t after) {
  if (after <= kAlwaysFine || after / kMostGrowth <= before) return;
  throw Error(ErrorKind::input, "the tokenizer's replacements make the text too long")
      .expected("at most " + std::to_string(kMostGrowth) + " times as long")
      .found(std::to_string(before) + " bytes became " + std::to_string(after))
      .hint("the tokenizer's file is damaged");
}

Pattern Pattern::literal(std::string text) {
  Pattern p;
  p.literal_ = std::move(text);
  return p;
}

Pattern Pattern::regex(std::string_view text) {
  Pattern p;
  p.regex_ = std::make_unique<Regex>(text);
  return p;
}

void Pattern::split(std::string_view text, std::vector<MatchSpan>& spans) const {
  if (regex_) {
    regex_->split(text, spans);
    return;
  }
  std::size_t covered = 0;
  if (!literal_.empty()) {
    for (std::size_t at = text.find(literal_); at != std::string_view::npos;
         at = text.find(literal_, covered)) {
      if (covered < at) spans.push_back({covered, at, false});
      spans.push_back({at, at + literal_.size(), true});
      covered = at + literal_.size();
    }
  }
  if (covered < text.size()) spans.push_back({covered, text.size(), false});
}

std::string Pattern::replace(std::string_view text, std::string_view content) const {
  std::vector<MatchSpan> spans;
  split(text, spans);
  std::size_t size = 0;
  for (const MatchSpan& span : spans) size += span.matched ? content.size() : span.end - span.begin;
  check_growth(text.size(), size);
  std::string out;
  out.reserve(size);
  for (const MatchSpan& span : spans)
    out += span.matched ? content : text.substr(span.begin, span.end - span.begin);
  return out;
}

}  // namespace fireq::formats
