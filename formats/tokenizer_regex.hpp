// Regular expressions of tokenizer.json. They are written for Oniguruma (Ruby's dialect); PCRE2 runs them.
// What the two read differently is rewritten, and what cannot be rewritten is refused by name.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace fireq::formats {

// A stretch of the text, matched or lying between two matches; stretches cover the text in order.
struct MatchSpan {
  std::size_t begin = 0, end = 0;
  bool matched = false;
};

class Regex {
 public:
  // Error(input) when the pattern does not compile or means something else to PCRE2.
  explicit Regex(std::string_view pattern);
  ~Regex();
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;

  // Appends the stretches of valid UTF-8 `text`. Thread-safe. Error(input) when a match needs more steps or
  // memory than a sane pattern does.
  void split(std::string_view text, std::vector<MatchSpan>& spans) const;

  const std::string& pattern() const noexcept { return pattern_; }

 private:
  struct Compiled;
  std::unique_ptr<Compiled> compiled_;
  std::string pattern_;
};

// A pattern of tokenizer.json: {"String": s} or {"Regex": s}.
class Pattern {
 public:
  static Pattern literal(std::string text);
  static Pattern regex(std::string_view text);
  void split(std::string_view text, std::vector<MatchSpan>& spans) const;
  // `content` is taken literally. Error(input) when the result would be absurdly long.
  std::string replace(std::string_view text, std::string_view content) const;

 private:
  std::string literal_;
  std::unique_ptr<Regex> regex_;
};

// Steps that replace text can double it, and a file may list many of them. Error(input) when a text of
// `before` bytes has become one of `after` that no real tokenizer would make.
void check_growth(std::size_t before, std::size_t after);

// The rewritten pattern (for tests).
std::string translate_oniguruma(std::string_view pattern);

}  // namespace fireq::formats
