#include <algorithm>

#include "formats/tokenizer_parts.hpp"
#include "formats/unicode.hpp"

namespace fireq::formats {
namespace {

// The code point that ends just before `at` (at > 0, valid UTF-8).
Utf8Step step_before(std::string_view text, std::size_t at) {
  std::size_t begin = at - 1;
  while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xC0U) == 0x80U) --begin;
  return utf8_step(text, begin);
}

bool word_before(std::string_view text, std::size_t at) {
  return at > 0 && is_word(step_before(text, at).code_point);
}
bool word_at(std::string_view text, std::size_t at) {
  return at < text.size() && is_word(utf8_step(text, at).code_point);
}

}  // namespace

AddedTokens::AddedTokens(const std::vector<AddedToken>& tokens) {
  for (const AddedToken& token : tokens) {
    if (token.content.empty()) continue;
    std::uint64_t node = 0;
    for (const char c : token.content) {
      const auto byte = static_cast<unsigned char>(c);
      const auto [edge, fresh] =
          edges_.try_emplace((node << 8U) | byte, static_cast<std::uint32_t>(ends_.size()));
      if (fresh) ends_.push_back(-1);
      node = edge->second;
    }
    if (ends_[node] >= 0) continue;  // the first of two equal ones counts
    ends_[node] = static_cast<std::int64_t>(tokens_.size());
    tokens_.push_back(token);
    first_byte_[static_cast<unsigned char>(token.content[0])] = true;
  }
}

std::size_t AddedTokens::longest_match(std::string_view text, std::size_t at, std::size_t& token) const {
  std::uint64_t node = 0;
  std::size_t length = 0;
  for (std::size_t i = at; i < text.size(); ++i) {
    const auto edge = edges_.find((node << 8U) | static_cast<unsigned char>(text[i]));
    if (edge == edges_.end()) break;
    node = edge->second;
    if (ends_[node] >= 0) {
      length = i + 1 - at;
      token = static_cast<std::size_t>(ends_[node]);
    }
  }
  return length;
}

void AddedTokens::split(std::string_view text, bool parse_special, std::vector<Span>& out) const {
  std::size_t covered = 0;
  for (std::size_t at = 0; at < text.size();) {
    std::size_t index = 0;
    const std::size_t length =
        first_byte_[static_cast<unsigned char>(text[at])] ? longest_match(text, at, index) : 0;
    if (length == 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[index];
    std::size_t begin = at;
    std::size_t end = at + length;
    at = end;
    if (token.special && !parse_special) continue;
    if (token.single_word && (word_before(text, begin) || word_at(text, end))) continue;
    if (begin < covered) continue;  // an earlier token's rstrip took it
    if (token.lstrip) {
      while (begin > covered) {
        const Utf8Step step = step_before(text, begin);
        if (!is_white_space(step.code_point)) break;
        begin -= step.length;
      }
    }
    if (token.rstrip) {
      while (end < text.size()) {
        const Utf8Step step = utf8_step(text, end);
        if (!is_white_space(step.code_point)) break;
        end += step.length;
      }
    }
    if (covered < begin) out.push_back({text.substr(covered, begin - covered), -1});
    out.push_back({text.substr(begin, end - begin), token.id});
    covered = end;
  }
  if (covered < text.size()) out.push_back({text.substr(covered), -1});
}

void check_added_length(const JsonFields& fields, std::string_view content) {
  if (content.size() <= kLongestAddedToken) return;
  fields.fail("content", "is too long for an added token",
              "at most " + std::to_string(kLongestAddedToken) + " bytes");
}

AddedToken read_added_token(const JsonFields& fields, std::optional<std::int32_t> id) {
  AddedToken token;
  token.id = id ? *id : static_cast<std::int32_t>(fields.count("id", 0, kLargestTokenId));
  token.content = fields.text("content");
  check_added_length(fields, token.content);
  token.special = fields.boolean_or("special", false);
  token.normalized = fields.boolean_or("normalized", !token.special);
  token.lstrip = fields.boolean_or("lstrip", false);
  token.rstrip = fields.boolean_or("rstrip", false);
  token.single_word = fields.boolean_or("single_word", false);
  return token;
}

}  // namespace fireq::formats
