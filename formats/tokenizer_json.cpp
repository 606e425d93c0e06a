// tokenizer.json: the pipeline put together.
#include <algorithm>
#include <unordered_map>
#include <utility>

#include "common/error.hpp"
#include "formats/tokenizer_parts.hpp"
#include "formats/tokenizer_regex.hpp"
#include "formats/unicode.hpp"

namespace fireq::formats {
namespace {

using nlohmann::json;

constexpr std::size_t kLongestCached = 64;    // bytes of a piece whose ids are kept for the rest of the text
constexpr std::size_t kMostCached = 100'000;  // pieces

class BpeTokenizer final : public Tokenizer {
 public:
  explicit BpeTokenizer(const JsonFields& root) : model_(root.object("model")) {
    if (root.find("normalizer") != nullptr) normalizer_ = Normalizer(root.object("normalizer"));
    if (root.find("pre_tokenizer") != nullptr) pre_tokenizer_ = PreTokenizer(root.object("pre_tokenizer"));
    if (root.find("decoder") != nullptr) decoder_ = Decoder(root.object("decoder"));
    std::uint64_t size = 0;
    for (const auto& [token, id] : model_.vocab()) size = std::max(size, static_cast<std::uint64_t>(id) + 1);
    tokens_.resize(size);
    for (const auto& [token, id] : model_.vocab()) {
      Entry& entry = tokens_[static_cast<std::size_t>(id)];
      entry.text = token;
      entry.known = true;
    }
    read_added(root);
  }

  std::vector<std::int32_t> encode(std::string_view text, bool parse_special) const override {
    check_utf8(text, "");
    Call call;
    std::vector<AddedTokens::Span> raw;
    raw_added_.split(text, parse_special, raw);
    for (const AddedTokens::Span& span : raw) {
      if (span.id >= 0) {
        call.ids.push_back(span.id);
      } else {
        encode_text(span.text, span.text.data() == text.data(), parse_special, call);
      }
    }
    return std::move(call.ids);
  }

  std::uint64_t vocab_size() const override { return tokens_.size(); }

  std::optional<std::int32_t> token_id(std::string_view token) const override {
    if (const auto at = added_ids_.find(token); at != added_ids_.end()) return at->second;
    return model_.id_of(token);
  }

  std::optional<TokenBytes> token_bytes(std::int32_t id, bool first, bool skip_special) const override {
    if (id < 0 || static_cast<std::size_t>(id) >= tokens_.size()) return {};
    const Entry& entry = tokens_[static_cast<std::size_t>(id)];
    if (!entry.known || (skip_special && entry.special)) return {};
    Decoder::Bytes bytes = decoder_.token(entry.text, first);
    return TokenBytes{std::move(bytes.text), bytes.raw};
  }

  const TextStrip& text_strip() const noexcept override { return decoder_.strip(); }

 private:
  struct Entry {
    std::string text;
    bool known = false, special = false;
  };

  // What one call of encode() keeps.
  struct Call {
    std::vector<std::int32_t> ids;
    BpeModel::Scratch scratch;
    PreTokenizer::Texts texts;
    struct Range {
      std::size_t begin = 0, count = 0;
    };
    std::unordered_map<std::string_view, Range> cache;  // ids of a piece, as a range of `cached`
    std::vector<std::int32_t> cached;
  };

  void read_added(const JsonFields& root) {
    std::vector<AddedToken> raw, normalized;
    if (root.find("added_tokens") == nullptr) return;
    const json& list = root.array("added_tokens");
    for (std::size_t i = 0; i < list.size(); ++i) {
      const JsonFields fields(list[i], root.path(), "added_tokens[" + std::to_string(i) + "].");
      AddedToken token = read_added_token(fields, {});
      if (token.content.empty()) continue;
      const auto index = static_cast<std::size_t>(token.id);
      if (const auto id = token_id(token.content); id && *id != token.id) {
        fields.fail("id", "is not the id that this token has elsewhere in the file", std::to_string(*id));
      }
      if (index >= tokens_.size()) tokens_.resize(index + 1);
      Entry& entry = tokens_[index];
      if (entry.known && entry.text != token.content) fields.fail("id", "is the id of another token");
      entry.text = token.content;
      entry.known = true;
      entry.special = entry.special || token.special;
      added_ids_.emplace(token.content, token.id);
      if (token.normalized && !normalizer_.empty()) {
        token.content = normalizer_.run(token.content);  // it is looked for in normalised text
        check_added_length(fields, token.content);
        normalized.push_back(std::move(token));
      } else if (token.normalized) {
        normalized.push_back(std::move(token));
      } else {
        raw.push_back(std::move(token));
      }
    }
    raw_added_ = AddedTokens(raw);
    normalized_added_ = AddedTokens(normalized);
  }

  void encode_text(std::string_view text, bool first, bool parse_special, Call& call) const {
    if (!normalizer_.empty()) text = call.texts.emplace_back(normalizer_.run(text));
    std::vector<AddedTokens::Span> spans;
    normalized_added_.split(text, parse_special, spans);
    std::vector<Piece> pieces;
    for (const AddedTokens::Span& span : spans) {
      if (span.id >= 0) {
        call.ids.push_back(span.id);
        continue;
      }
      pieces.assign(1, Piece{span.text, first && span.text.data() == text.data()});
      pre_tokenizer_.run(pieces, call.texts);
      for (const Piece& piece : pieces) encode_piece(piece.text, call);
    }
  }

  void encode_piece(std::string_view piece, Call& call) const {
    const bool cacheable = piece.size() <= kLongestCached;
    if (cacheable) {
      if (const auto at = call.cache.find(piece); at != call.cache.end()) {
        const auto begin = call.cached.begin() + static_cast<std::ptrdiff_t>(at->second.begin);
        call.ids.insert(call.ids.end(), begin, begin + static_cast<std::ptrdiff_t>(at->second.count));
        return;
      }
    }
    const std::size_t before = call.ids.size();
    if (pre_tokenizer_.byte_level()) {
      model_.encode(byte_level_text(piece), call.scratch, call.ids);
    } else {
      model_.encode(piece, call.scratch, call.ids);
    }
    if (cacheable && call.cache.size() < kMostCached) {
      call.cache.emplace(piece, Call::Range{call.cached.size(), call.ids.size() - before});
      call.cached.insert(call.cached.end(), call.ids.begin() + static_cast<std::ptrdiff_t>(before),
                         call.ids.end());
    }
  }

  BpeModel model_;
  Normalizer normalizer_;
  PreTokenizer pre_tokenizer_;
  Decoder decoder_;
  std::vector<Entry> tokens_;  // by id
  TokenMap added_ids_;
  AddedTokens raw_added_, normalized_added_;
};

// The id that the post-processor puts before a single text, if any.
std::optional<std::int32_t> leading_special(const JsonFields& fields) {
  const std::string type = fields.text("type");
  if (type == "ByteLevel") return {};
  if (type == "Sequence") {
    const json& list = fields.array("processors");
    std::optional<std::int32_t> found;
    for (std::size_t i = 0; i < list.size(); ++i) {
      const auto id = leading_special(
          {list[i], fields.path(), fields.where() + "processors[" + std::to_string(i) + "]."});
      if (id) found = id;
    }
    return found;
  }
  if (type != "TemplateProcessing") {
    fields.fail("type", "names a post-processor that is not supported",
                "Sequence, TemplateProcessing or ByteLevel");
  }
  const json& single = fields.array("single");
  if (single.empty() || !single[0].is_object()) fields.fail("single", "is not a list of objects");
  const JsonFields head(single[0], fields.path(), fields.where() + "single[0].");
  if (head.find("SpecialToken") == nullptr) return {};
  const std::string name = head.object("SpecialToken").text("id");
  const JsonFields special = fields.object("special_tokens").object(name);
  const json& ids = special.array("ids");
  if (ids.empty() || !ids[0].is_number_unsigned() || ids[0].get<std::uint64_t>() > kLargestTokenId) {
    special.fail("ids", "is not a list of token ids");
  }
  return ids[0].get<std::int32_t>();
}

}  // namespace

TokenizerJson read_tokenizer_json(std::string_view text, const std::string& path) {
  const json document = parse_json(text, path);
  const JsonFields root(document, path);
  TokenizerJson result;
  try {
    auto tokenizer = std::make_unique<BpeTokenizer>(root);
    if (root.find("post_processor") != nullptr) {
      result.has_post_processor = true;
      result.leading_special = leading_special(root.object("post_processor"));
    }
    result.tokenizer = std::move(tokenizer);
  } catch (Error& error) {
    error.path_if_unset(path);
    throw;
  }
  return result;
}

std::unique_ptr<Tokenizer> parse_tokenizer_json(std::string_view text, const std::string& path_for_errors) {
  return read_tokenizer_json(text, path_for_errors).tokenizer;
}

}  // namespace fireq::formats
