#include <algorithm>
#include <utility>

#include "common/error.hpp"
#include "formats/tokenizer_parts.hpp"
#include "formats/tokenizer_regex.hpp"
#include "formats/unicode.hpp"

namespace fireq::formats {

namespace {

// The byte of a token "<0x0A>".
std::optional<char> fallback_byte(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return {};
  unsigned value = 0;
  for (const char c : token.substr(3, 2)) {
    value *= 16;
    if (c >= '0' && c <= '9') {
      value += static_cast<unsigned>(c - '0');
    } else if (c >= 'A' && c <= 'F') {
      value += static_cast<unsigned>(c - 'A' + 10);
    } else if (c >= 'a' && c <= 'f') {
      value += static_cast<unsigned>(c - 'a' + 10);
    } else {
      return {};
    }
  }
  return static_cast<char>(static_cast<unsigned char>(value));
}

std::string strip_ends(std::string_view text, const TextStrip& strip) {
  for (std::uint64_t i = 0; i < strip.start && text.starts_with(strip.content); ++i) {
    text.remove_prefix(strip.content.size());
  }
  for (std::uint64_t i = 0; i < strip.stop && text.ends_with(strip.content); ++i) {
    text.remove_suffix(strip.content.size());
  }
  return std::string(text);
}

// A run of byte-fallback bytes is one UTF-8 string or it is as many U+FFFD as bytes.
void append_run(std::string& run, std::string& out) {
  bool valid = true;
  for (std::size_t at = 0; valid && at < run.size();) {
    const Utf8Step step = utf8_step(run, at);
    valid = step.valid;
    at += step.length;
  }
  if (valid) {
    out += run;
  } else {
    for (std::size_t i = 0; i < run.size(); ++i) out += "\xEF\xBF\xBD";
  }
  run.clear();
}

}  // namespace

void Decoder::add(const JsonFields& fields) {
  const std::string type = fields.text("type");
  const auto before = [&](Stage last) {
    if (stage_ > last) fields.fail("type", "names a decoder in a place where it is not supported");
  };
  if (type == "Sequence") {
    const nlohmann::json& list = fields.array("decoders");
    for (std::size_t i = 0; i < list.size(); ++i) {
      add({list[i], fields.path(), fields.where() + "decoders[" + std::to_string(i) + "]."});
    }
  } else if (type == "Replace") {
    before(Stage::tokens);
    steps_.emplace_back(
        [pattern = std::make_shared<const Pattern>(read_pattern(fields)), content = fields.text("content")](
            const std::string& text, bool) { return pattern->replace(text, content); });
  } else if (type == "Strip") {
    TextStrip strip{fields.text("content"), fields.count("start", 0, kLargestTokenId),
                    fields.count("stop", 0, kLargestTokenId)};
    if (strip.content.empty() || utf8_step(strip.content, 0).length != strip.content.size()) {
      fields.fail("content", "is not one character", "one character");
    }
    if (stage_ == Stage::tokens) {
      steps_.emplace_back([strip](const std::string& text, bool) { return strip_ends(text, strip); });
    } else if (stage_ == Stage::fused && strip_.content.empty()) {
      strip_ = std::move(strip);
    } else {
      before(Stage::tokens);
    }
  } else if (type == "Metaspace") {
    before(Stage::tokens);
    const std::string mark = fields.text_or("replacement", "\xE2\x96\x81");
    const std::string scheme =
        fields.text_or("prepend_scheme", fields.boolean_or("add_prefix_space", true) ? "always" : "never");
    steps_.emplace_back([mark, drops = scheme != "never"](const std::string& text, bool first) {
      return Pattern::literal(mark).replace(text, first && drops ? "" : " ");
    });
  } else if (type == "ByteFallback") {
    before(Stage::tokens);
    stage_ = Stage::bytes;
    byte_fallback_ = true;
  } else if (type == "ByteLevel") {
    before(Stage::tokens);
    stage_ = Stage::bytes;
    byte_level_ = true;
  } else if (type == "Fuse") {
    stage_ = Stage::fused;
  } else {
    fields.fail("type", "names a decoder that is not supported",
                "Sequence, Replace, Strip, Metaspace, ByteFallback, ByteLevel or Fuse");
  }
}

Decoder::Bytes Decoder::token(std::string_view text, bool first) const {
  Bytes out{std::string(text), false};
  if (joined_by_space_) {
    if (!first) out.text.insert(out.text.begin(), ' ');
    return out;
  }
  for (const Step& step : steps_) {
    out.text = step(std::move(out.text), first);
    check_growth(text.size(), out.text.size());
  }
  if (byte_fallback_) {
    if (const std::optional<char> byte = fallback_byte(out.text)) return {std::string(1, *byte), true};
  }
  if (byte_level_) {
    if (std::optional<std::string> bytes = byte_level_bytes(out.text)) out.text = std::move(*bytes);
  }
  return out;
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, bool skip_special) const {
  std::string bytes;
  std::string run;
  bool first = true;
  for (const std::int32_t id : ids) {
    const std::optional<TokenBytes> token = token_bytes(id, first, skip_special);
    if (!token) continue;
    first = false;
    if (token->raw) {
      run += token->bytes;
    } else {
      append_run(run, bytes);
      bytes += token->bytes;
    }
  }
  append_run(run, bytes);
  std::string out;
  append_repaired_utf8(bytes, out);
  const TextStrip& strip = text_strip();
  return strip.content.empty() ? out : strip_ends(out, strip);
}

StreamingDecoder::StreamingDecoder(const Tokenizer& tokenizer, std::span<const std::int32_t> prompt,
                                   bool skip_special)
    : tokenizer_(tokenizer), skip_special_(skip_special), strip_left_(tokenizer.text_strip().start) {
  for (const std::int32_t id : prompt) push(id);
}

std::string StreamingDecoder::push(std::int32_t id) {
  const std::optional<Tokenizer::TokenBytes> token = tokenizer_.token_bytes(id, first_, skip_special_);
  if (!token) return {};
  first_ = false;
  std::string bytes = std::move(held_);
  held_.clear();
  bytes += token->bytes;
  std::string out = std::move(tail_);
  tail_.clear();
  append_repaired_utf8(bytes, out, &held_);
  strip_start(out);
  const TextStrip& strip = tokenizer_.text_strip();
  std::size_t end = out.size();
  for (std::uint64_t i = 0; i < strip.stop && std::string_view(out).substr(0, end).ends_with(strip.content);
       ++i)
    end -= strip.content.size();
  tail_ = out.substr(end);
  out.resize(end);
  return out;
}

// A tail is kept only behind text that stays, so while this has work to do `text` is all there was.
void StreamingDecoder::strip_start(std::string& text) {
  const std::string& content = tokenizer_.text_strip().content;
  while (strip_left_ > 0 && !text.empty()) {
    if (text.starts_with(content)) {
      text.erase(0, content.size());
      --strip_left_;
    } else {
      strip_left_ = 0;
    }
  }
}

std::string StreamingDecoder::finish() {
  std::string out = std::move(tail_);
  append_repaired_utf8(held_, out);
  strip_start(out);
  tail_.clear();
  held_.clear();
  return strip_ends(out, {tokenizer_.text_strip().content, 0, tokenizer_.text_strip().stop});
}

}  // namespace fireq::formats
