#include <algorithm>
#include <functional>
#include <utility>

#include "common/error.hpp"
#include "formats/tokenizer_parts.hpp"
#include "formats/tokenizer_regex.hpp"
#include "formats/unicode.hpp"

namespace fireq::formats {

namespace {

enum class Behavior : std::uint8_t { removed, isolated, merged_with_previous, merged_with_next, contiguous };

Behavior read_behavior(const JsonFields& fields, const std::string& otherwise) {
  const std::string name =
      otherwise.empty() ? fields.text("behavior") : fields.text_or("behavior", otherwise);
  if (name == "Removed") return Behavior::removed;
  if (name == "Isolated") return Behavior::isolated;
  if (name == "MergedWithPrevious") return Behavior::merged_with_previous;
  if (name == "MergedWithNext") return Behavior::merged_with_next;
  if (name == "Contiguous") return Behavior::contiguous;
  fields.fail("behavior", "is of no known kind",
              "Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous");
}

// What becomes of the stretches; afterwards `matched` means "drop it".
void apply(Behavior behavior, std::vector<MatchSpan>& spans) {
  if (behavior == Behavior::removed) return;
  std::vector<MatchSpan> out;
  bool previous = false;
  switch (behavior) {
    case Behavior::removed:
    case Behavior::isolated:
      out = spans;
      break;
    case Behavior::contiguous:  // neighbours of one kind grow together
      for (const MatchSpan& span : spans) {
        if (span.matched == previous && !out.empty()) {
          out.back().end = span.end;
        } else {
          out.push_back(span);
        }
        previous = span.matched;
      }
      break;
    case Behavior::merged_with_previous:
      for (const MatchSpan& span : spans) {
        if (span.matched && !previous && !out.empty()) {
          out.back().end = span.end;
        } else {
          out.push_back(span);
        }
        previous = span.matched;
      }
      break;
    case Behavior::merged_with_next:
      std::reverse(spans.begin(), spans.end());
      for (const MatchSpan& span : spans) {
        if (span.matched && !previous && !out.empty()) {
          out.back().begin = span.begin;
        } else {
          out.push_back(span);
        }
        previous = span.matched;
      }
      std::reverse(out.begin(), out.end());
      break;
  }
  for (MatchSpan& span : out) span.matched = false;
  spans = std::move(out);
}

using Splitter = std::function<void(std::string_view, std::vector<MatchSpan>&)>;

PreTokenizer::Step split_step(Splitter splitter, Behavior behavior, bool invert) {
  return [splitter = std::move(splitter), behavior, invert](std::vector<Piece>& pieces,
                                                            PreTokenizer::Texts&) {
    std::vector<Piece> out;
    std::vector<MatchSpan> spans;
    for (const Piece& piece : pieces) {
      spans.clear();
      splitter(piece.text, spans);
      if (invert) {
        for (MatchSpan& span : spans) span.matched = !span.matched;
      }
      apply(behavior, spans);
      for (const MatchSpan& span : spans) {
        if (span.matched || span.begin == span.end) continue;
        out.push_back({piece.text.substr(span.begin, span.end - span.begin), piece.first && span.begin == 0});
      }
    }
    pieces = std::move(out);
  };
}

// Each character that `is` holds for is a match of its own.
Splitter character_splitter(bool (*is)(char32_t)) {
  return [is](std::string_view text, std::vector<MatchSpan>& spans) {
    std::size_t covered = 0;
    for (std::size_t at = 0; at < text.size();) {
      const Utf8Step step = utf8_step(text, at);
      if (is(step.code_point)) {
        if (covered < at) spans.push_back({covered, at, false});
        spans.push_back({at, at + step.length, true});
        covered = at + step.length;
      }
      at += step.length;
    }
    if (covered < text.size()) spans.push_back({covered, text.size(), false});
  };
}

Splitter pattern_splitter(Pattern pattern) {
  return [pattern = std::make_shared<const Pattern>(std::move(pattern))](
             std::string_view text, std::vector<MatchSpan>& spans) { pattern->split(text, spans); };
}

// The alphabet of GPT-2: bytes that print stand for themselves, the others for U+0100 and following.
struct ByteAlphabet {
  std::array<std::string, 256> character;
  std::array<std::int16_t, 0x144> byte{};

  ByteAlphabet() {
    byte.fill(-1);
    char32_t next = 0x100;
    for (unsigned b = 0; b < 256; ++b) {
      const bool prints = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      const char32_t c = prints ? b : next++;
      append_utf8(c, character[b]);
      byte[c] = static_cast<std::int16_t>(b);
    }
  }
};
const ByteAlphabet& byte_alphabet() {
  static const ByteAlphabet alphabet;
  return alphabet;
}

PreTokenizer::Step metaspace_step(const JsonFields& fields) {
  const std::string replacement = fields.text_or("replacement", "\xE2\x96\x81");
  if (replacement.empty() || utf8_step(replacement, 0).length != replacement.size()) {
    fields.fail("replacement", "is not one character", "one character");
  }
  const std::string scheme =
      fields.text_or("prepend_scheme", fields.boolean_or("add_prefix_space", true) ? "always" : "never");
  if (scheme != "always" && scheme != "first" && scheme != "never") {
    fields.fail("prepend_scheme", "is of no known kind", "always, first or never");
  }
  PreTokenizer::Step split;
  if (fields.boolean_or("split", true)) {
    split = split_step(pattern_splitter(Pattern::literal(replacement)), Behavior::merged_with_next, false);
  }
  return [replacement, scheme, split = std::move(split)](std::vector<Piece>& pieces,
                                                         PreTokenizer::Texts& texts) {
    const Pattern space = Pattern::literal(" ");
    for (Piece& piece : pieces) {
      std::string text = space.replace(piece.text, replacement);
      const bool wanted = scheme == "always" || (scheme == "first" && piece.first);
      if (wanted && !text.starts_with(replacement)) text.insert(0, replacement);
      piece.text = texts.emplace_back(std::move(text));
    }
    if (split) split(pieces, texts);
  };
}

}  // namespace

std::string byte_level_text(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size() + bytes.size() / 4);
  for (const char c : bytes) out += byte_alphabet().character[static_cast<unsigned char>(c)];
  return out;
}

std::optional<std::string> byte_level_bytes(std::string_view text) {
  std::string out;
  const ByteAlphabet& alphabet = byte_alphabet();
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Step step = utf8_step(text, at);
    if (!step.valid || step.code_point >= alphabet.byte.size() || alphabet.byte[step.code_point] < 0)
      return {};
    out += static_cast<char>(static_cast<unsigned char>(alphabet.byte[step.code_point]));
    at += step.length;
  }
  return out;
}

void PreTokenizer::add(const JsonFields& fields) {
  if (byte_level_) fields.fail("type", "comes after ByteLevel, which must be the last pre-tokenizer here");
  const std::string type = fields.text("type");
  if (type == "Sequence") {
    const nlohmann::json& list = fields.array("pretokenizers");
    for (std::size_t i = 0; i < list.size(); ++i) {
      add({list[i], fields.path(), fields.where() + "pretokenizers[" + std::to_string(i) + "]."});
    }
  } else if (type == "Split") {
    steps_.push_back(split_step(pattern_splitter(read_pattern(fields)), read_behavior(fields, ""),
                                fields.boolean_or("invert", false)));
  } else if (type == "Digits") {
    const bool single = fields.boolean_or("individual_digits", false);
    steps_.push_back(
        split_step(character_splitter(is_number), single ? Behavior::isolated : Behavior::contiguous, false));
  } else if (type == "Punctuation") {
    steps_.push_back(
        split_step(character_splitter(is_punctuation), read_behavior(fields, "Isolated"), false));
  } else if (type == "WhitespaceSplit") {
    steps_.push_back(split_step(character_splitter(is_white_space), Behavior::removed, false));
  } else if (type == "Whitespace") {
    // Words and runs of symbols; here \w is that of Rust's regex crate, which counts the joiners in.
    constexpr std::string_view word =
        R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200c}\x{200d}]+|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200c}\x{200d}\s]+)";
    steps_.push_back(split_step(pattern_splitter(Pattern::regex(word)), Behavior::removed, true));
  } else if (type == "Metaspace") {
    steps_.push_back(metaspace_step(fields));
  } else if (type == "ByteLevel") {
    if (fields.boolean_or("add_prefix_space", true)) {
      steps_.emplace_back([](std::vector<Piece>& pieces, Texts& texts) {
        for (Piece& piece : pieces) {
          if (!piece.text.starts_with(' '))
            piece.text = texts.emplace_back(std::string(1, ' ').append(piece.text));
        }
      });
    }
    if (fields.boolean_or("use_regex", true)) {
      constexpr std::string_view kGpt2 =
          R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
      steps_.push_back(split_step(pattern_splitter(Pattern::regex(kGpt2)), Behavior::isolated, false));
    }
    byte_level_ = true;
  } else {
    fields.fail("type", "names a pre-tokenizer that is not supported",
                "Sequence, Split, Digits, Punctuation, Whitespace, WhitespaceSplit, Metaspace or ByteLevel");
  }
}

void PreTokenizer::run(std::vector<Piece>& pieces, Texts& texts) const {
  for (const Step& step : steps_) step(pieces, texts);
}

}  // namespace fireq::formats
