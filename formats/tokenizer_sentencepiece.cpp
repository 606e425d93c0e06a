// tokenizer.model, encoded by libsentencepiece. Decoding is piece by piece, so that special and added tokens
// and streaming fit in: U+2581 is a space, byte pieces are bytes, and the space that was put before the text
// is taken off again.
#include <sentencepiece_processor.h>

#include <exception>
#include <utility>

#include "common/error.hpp"
#include "formats/tokenizer_parts.hpp"
#include "formats/tokenizer_sentencepiece_model.hpp"
#include "formats/unicode.hpp"

namespace fireq::formats {
namespace {

constexpr std::string_view kSpaceMark = "\xE2\x96\x81";

std::string replace_marks(std::string_view text) {
  std::string out;
  for (std::size_t at = 0; at < text.size();) {
    if (text.substr(at).starts_with(kSpaceMark)) {
      out += ' ';
      at += kSpaceMark.size();
    } else {
      out += text[at++];
    }
  }
  return out;
}

Error refused(const std::string& why, const std::string& path) {
  return Error(ErrorKind::input, "libsentencepiece refuses the model: " + why)
      .path(path)
      .hint("the file may be damaged");
}

class SentencePieceTokenizer final : public Tokenizer {
 public:
  SentencePieceTokenizer(std::string_view bytes, const std::string& path,
                         const std::vector<AddedToken>& added) {
    const SentencePieceModel model = check_sentencepiece_model(bytes, path);
    const auto status = processor_.LoadFromSerializedProto({bytes.data(), bytes.size()});
    if (!status.ok()) {
      throw refused(status.ToString(), path);
    }
    if (static_cast<std::size_t>(processor_.GetPieceSize()) != model.pieces.size()) {
      throw Error(ErrorKind::internal, "libsentencepiece counts its pieces differently").path(path);
    }
    read_pieces(model);
    // Special tokens written in a text are found before the library sees it; it never makes them itself.
    std::vector<AddedToken> special;
    for (std::size_t i = 0; i < tokens_.size(); ++i) {
      if (!tokens_[i].special) continue;
      AddedToken token;
      token.content = tokens_[i].bytes;
      token.id = static_cast<std::int32_t>(i);
      token.special = true;
      special.push_back(std::move(token));
    }
    for (const AddedToken& token : added) add(token, path, special);
    added_ = AddedTokens(special);
    if (const int id = processor_.bos_id(); id >= 0) bos_id = id;
    if (const int id = processor_.eos_id(); id >= 0) eos_id = id;
    if (model.add_dummy_prefix) strip_ = {" ", 1, 0};
  }

  std::vector<std::int32_t> encode(std::string_view text, bool parse_special) const override {
    check_utf8(text, "");
    std::vector<AddedTokens::Span> spans;
    added_.split(text, parse_special, spans);
    std::vector<std::int32_t> ids;
    std::vector<int> part;
    for (const AddedTokens::Span& span : spans) {
      if (span.id >= 0) {
        ids.push_back(span.id);
        continue;
      }
      const auto status = processor_.Encode({span.text.data(), span.text.size()}, &part);
      if (!status.ok())
        throw Error(ErrorKind::input, "libsentencepiece refuses the text: " + status.ToString());
      ids.insert(ids.end(), part.begin(), part.end());
    }
    return ids;
  }

  std::uint64_t vocab_size() const override { return tokens_.size(); }

  std::optional<std::int32_t> token_id(std::string_view token) const override {
    const auto at = ids_.find(token);
    if (at == ids_.end()) return {};
    return at->second;
  }

  std::optional<TokenBytes> token_bytes(std::int32_t id, bool, bool skip_special) const override {
    if (id < 0 || static_cast<std::size_t>(id) >= tokens_.size()) return {};
    const Entry& entry = tokens_[static_cast<std::size_t>(id)];
    if (!entry.known || (skip_special && entry.special)) return {};
    return TokenBytes{entry.bytes, entry.raw};
  }

  const TextStrip& text_strip() const noexcept override { return strip_; }

 private:
  struct Entry {
    std::string bytes;
    bool known = false, special = false, raw = false;
  };

  void read_pieces(const SentencePieceModel& model) {
    tokens_.resize(model.pieces.size());
    for (std::size_t i = 0; i < tokens_.size(); ++i) {
      const SentencePieceModel::Piece& piece = model.pieces[i];
      Entry& entry = tokens_[i];
      ids_.emplace(piece.text, static_cast<std::int32_t>(i));
      entry.known = true;
      entry.special = piece.type == PieceType::control || piece.type == PieceType::unknown;
      if (piece.type == PieceType::byte) {
        entry.raw = true;
        const auto byte =
            std::stoul(piece.text.substr(3, 2), nullptr, 16);  // "<0x0A>", as the library checked
        entry.bytes = std::string(1, static_cast<char>(static_cast<unsigned char>(byte)));
      } else {
        entry.bytes = entry.special ? piece.text : replace_marks(piece.text);
      }
    }
  }

  void add(const AddedToken& token, const std::string& path, std::vector<AddedToken>& special) {
    if (token.content.empty()) return;
    const auto fail = [&](const std::string& problem) {
      throw Error(ErrorKind::input, "added token '" + token.content + "' " + problem)
          .path(path)
          .hint("the tokenizer's files do not belong together");
    };
    const auto index = static_cast<std::size_t>(token.id);
    if (const auto id = token_id(token.content); id && *id != token.id)
      fail("has another id in tokenizer.model");
    if (index >= tokens_.size()) tokens_.resize(index + 1);
    Entry& entry = tokens_[index];
    if (entry.known && !token_id(token.content)) fail("has the id of another token");
    if (!entry.known) {
      entry.bytes = token.content;
      entry.known = true;
      ids_.emplace(token.content, token.id);
    }
    entry.special = entry.special || token.special;
    for (const AddedToken& have : special) {
      if (have.content == token.content) return;
    }
    special.push_back(token);
  }

  sentencepiece::SentencePieceProcessor processor_;
  std::vector<Entry> tokens_;
  TokenMap ids_;
  AddedTokens added_;
  TextStrip strip_;
};

}  // namespace

std::unique_ptr<Tokenizer> read_sentencepiece(std::string_view bytes, const std::string& path,
                                              const std::vector<AddedToken>& added) {
  try {
    return std::make_unique<SentencePieceTokenizer>(bytes, path, added);
  } catch (const Error&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& error) {  // the library's trie builder throws its own
    throw refused(error.what(), path);
  }
}

std::unique_ptr<Tokenizer> parse_tokenizer_model(std::string_view bytes, const std::string& path_for_errors) {
  return read_sentencepiece(bytes, path_for_errors, {});
}

}  // namespace fireq::formats
