#include <utility>

#include "common/error.hpp"
#include "formats/tokenizer_parts.hpp"
#include "formats/tokenizer_regex.hpp"
#include "formats/unicode.hpp"

namespace fireq::formats {
namespace {

std::string strip(std::string_view text, bool left, bool right) {
  std::size_t begin = 0;
  while (left && begin < text.size()) {
    const Utf8Step step = utf8_step(text, begin);
    if (!is_white_space(step.code_point)) break;
    begin += step.length;
  }
  std::size_t end = begin;  // behind the last character that stays
  for (std::size_t at = begin; at < text.size();) {
    const Utf8Step step = utf8_step(text, at);
    at += step.length;
    if (!right || !is_white_space(step.code_point)) end = at;
  }
  return std::string(text.substr(begin, end - begin));
}

std::string strip_accents(std::string_view text) {
  std::string out;
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Step step = utf8_step(text, at);
    if (!is_mark(step.code_point)) out.append(text, at, step.length);
    at += step.length;
  }
  return out;
}

}  // namespace

Pattern read_pattern(const JsonFields& fields) {
  const JsonFields pattern = fields.object("pattern");
  if (pattern.find("String") != nullptr) return Pattern::literal(pattern.text("String"));
  if (pattern.find("Regex") == nullptr) {
    fields.fail("pattern", "is of no known kind", R"({"String": ...} or {"Regex": ...})");
  }
  try {
    return Pattern::regex(pattern.text("Regex"));
  } catch (Error& error) {
    throw error.path_if_unset(fields.path());
  }
}

void Normalizer::add(const JsonFields& fields) {
  const std::string type = fields.text("type");
  if (type == "Sequence") {
    const nlohmann::json& list = fields.array("normalizers");
    for (std::size_t i = 0; i < list.size(); ++i) {
      add({list[i], fields.path(), fields.where() + "normalizers[" + std::to_string(i) + "]."});
    }
  } else if (type == "Prepend") {
    steps_.emplace_back([prefix = fields.text("prepend")](std::string_view text) {
      return text.empty() ? std::string() : prefix + std::string(text);
    });
  } else if (type == "Replace") {
    steps_.emplace_back([pattern = std::make_shared<const Pattern>(read_pattern(fields)),
                         content = fields.text("content")](std::string_view text) {
      return pattern->replace(text, content);
    });
  } else if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") {
    const NormalForm form = type == "NFC"    ? NormalForm::nfc
                            : type == "NFD"  ? NormalForm::nfd
                            : type == "NFKC" ? NormalForm::nfkc
                                             : NormalForm::nfkd;
    steps_.emplace_back([form](std::string_view text) { return normal_form(text, form); });
  } else if (type == "Lowercase") {
    steps_.emplace_back(lower_case);
  } else if (type == "Strip") {
    const bool left = fields.boolean_or("strip_left", true);
    const bool right = fields.boolean_or("strip_right", true);
    steps_.emplace_back([left, right](std::string_view text) { return strip(text, left, right); });
  } else if (type == "StripAccents") {
    steps_.emplace_back(strip_accents);
  } else {
    fields.fail("type", "names a normalizer that is not supported",
                "Sequence, Prepend, Replace, NFC, NFD, NFKC, NFKD, Lowercase, Strip or StripAccents");
  }
}

std::string Normalizer::run(std::string_view text) const {
  std::string out(text);
  for (const TextStep& step : steps_) {
    out = step(out);
    check_growth(text.size(), out.size());
  }
  return out;
}

}  // namespace fireq::formats
