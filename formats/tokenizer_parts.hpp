// The stations of a tokenizer.json pipeline, in the order in which text passes them: added tokens are cut
// out, the rest is normalised, pre-tokenised into pieces, and each piece is merged by BPE; the decoder goes
// back. Meanings are those of the Hugging Face tokenizers library. Internal: included by .cpp files.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "formats/model_config_json.hpp"
#include "formats/tokenizer.hpp"

namespace fireq::formats {

// Token ids index tables here, so a file cannot name ones far beyond any real vocabulary.
inline constexpr std::uint64_t kLargestTokenId = (std::uint64_t{1} << 22U) - 1;

// Looking for added tokens takes, at worst, the text's length times this.
inline constexpr std::size_t kLongestAddedToken = 512;

// Lets maps keyed by std::string be searched by std::string_view.
struct TextHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const noexcept { return std::hash<std::string_view>{}(text); }
};
using TokenMap = std::unordered_map<std::string, std::int32_t, TextHash, std::equal_to<>>;

struct AddedToken {
  std::string content;
  std::int32_t id = 0;
  bool special = false;      // a control token: dropped by decode(skip_special), ignored unless parse_special
  bool normalized = false;   // looked for in the normalised text instead of the raw text
  bool lstrip = false;       // takes the white space before it along
  bool rstrip = false;       // and behind it
  bool single_word = false;  // only between non-word characters
};

// Finds added tokens in text: leftmost, longest first.
class AddedTokens {
 public:
  struct Span {
    std::string_view text;
    std::int32_t id = -1;  // -1: ordinary text
  };

  AddedTokens() = default;
  explicit AddedTokens(const std::vector<AddedToken>& tokens);
  void split(std::string_view text, bool parse_special, std::vector<Span>& out) const;
  bool empty() const noexcept { return tokens_.empty(); }

 private:
  std::size_t longest_match(std::string_view text, std::size_t at, std::size_t& token) const;

  std::vector<AddedToken> tokens_;
  // A byte trie: (node << 8 | byte) -> node; `ends_[node]` is the token that ends there, or -1.
  std::unordered_map<std::uint64_t, std::uint32_t> edges_;
  std::vector<std::int64_t> ends_{-1};
  std::array<bool, 256> first_byte_{};
};
// One entry of "added_tokens" in tokenizer.json; also the value in "added_tokens_decoder", without its id.
AddedToken read_added_token(const JsonFields& fields, std::optional<std::int32_t> id);
void check_added_length(const JsonFields& fields, std::string_view content);

// {"String": s} or {"Regex": s} under "pattern" (Replace, Split).
class Pattern;
Pattern read_pattern(const JsonFields& fields);

using TextStep = std::function<std::string(std::string_view)>;

// normalizer: null, Sequence, Prepend, Replace, NFC, NFD, NFKC, NFKD, Lowercase, Strip, StripAccents.
class Normalizer {
 public:
  Normalizer() = default;
  explicit Normalizer(const JsonFields& fields) { add(fields); }
  bool empty() const noexcept { return steps_.empty(); }
  std::string run(std::string_view text) const;

 private:
  void add(const JsonFields& fields);
  std::vector<TextStep> steps_;
};

struct Piece {
  std::string_view text;
  bool first = false;  // begins where the whole text begins
};

// pre_tokenizer: null, Sequence, Split, Digits, ByteLevel (last), Metaspace, Whitespace, WhitespaceSplit,
// Punctuation.
class PreTokenizer {
 public:
  using Texts = std::deque<std::string>;  // owns what steps rewrite; addresses stay valid
  using Step = std::function<void(std::vector<Piece>&, Texts&)>;

  PreTokenizer() = default;
  explicit PreTokenizer(const JsonFields& fields) { add(fields); }
  void run(std::vector<Piece>& pieces, Texts& texts) const;
  bool byte_level() const noexcept { return byte_level_; }  // pieces then go to the BPE as byte_level_text()

 private:
  void add(const JsonFields& fields);
  std::vector<Step> steps_;
  bool byte_level_ = false;
};

// GPT-2's alphabet: each byte as one printable character.
std::string byte_level_text(std::string_view bytes);
std::optional<std::string> byte_level_bytes(std::string_view text);  // nullopt when a character is not of it

// decoder: null, or any number of Replace, Strip, Metaspace (per token); then ByteFallback or ByteLevel; then
// Fuse; then Strip of the whole text. Other orders are refused by name.
class Decoder {
 public:
  Decoder() = default;
  explicit Decoder(const JsonFields& fields) : joined_by_space_(false) { add(fields); }

  struct Bytes {
    std::string text;
    bool raw = false;  // one byte of a character, from byte fallback
  };
  // What one token contributes; `first` is the first token that is not dropped.
  Bytes token(std::string_view text, bool first) const;
  const TextStrip& strip() const noexcept { return strip_; }

 private:
  using Step = std::function<std::string(std::string, bool first)>;
  enum class Stage : std::uint8_t { tokens, bytes, fused };
  void add(const JsonFields& fields);

  std::vector<Step> steps_;
  bool joined_by_space_ = true;  // no decoder at all: tokens with a space between
  bool byte_fallback_ = false, byte_level_ = false;
  Stage stage_ = Stage::tokens;
  TextStrip strip_;
};

// model: BPE.
class BpeModel {
 public:
  explicit BpeModel(const JsonFields& fields);

  // Buffers and a cache of one encode() call.
  struct Scratch {
    struct Symbol {
      std::int32_t id = 0;
      std::int64_t previous = -1, next = -1;
      bool gone = false;
    };
    struct Candidate {
      std::uint64_t order = 0;  // rank << 32 | position: the lowest rank first, then the leftmost
      std::int32_t id = 0;      // what the merge makes
      bool operator>(const Candidate& other) const noexcept { return order > other.order; }
    };
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
  };
  // Appends the ids of one piece of valid UTF-8.
  void encode(std::string_view piece, Scratch& scratch, std::vector<std::int32_t>& out) const;

  std::optional<std::int32_t> id_of(std::string_view token) const;
  const TokenMap& vocab() const noexcept { return vocab_; }

 private:
  struct Merge {
    std::uint64_t pair = ~std::uint64_t{0};
    std::uint32_t rank = 0;
    std::int32_t id = 0;
  };
  void read_vocab(const JsonFields& fields);
  void read_merges(const JsonFields& fields);
  void insert_merge(const Merge& merge);
  const Merge* find_merge(std::int32_t left, std::int32_t right) const noexcept;
  std::int32_t character_id(std::string_view character) const;
  void split_characters(std::string_view piece, std::vector<Scratch::Symbol>& symbols) const;

  TokenMap vocab_;
  std::vector<Merge> merges_;  // open addressing, a power of two
  std::uint64_t mask_ = 0;
  std::array<std::int32_t, 0x800> short_characters_{};  // ids of one- and two-byte characters, -1: none
  std::array<std::int32_t, 256> byte_tokens_{};         // "<0x00>" ...
  bool byte_fallback_ = false, ignore_merges_ = false, fuse_unk_ = false;
  std::int32_t unk_ = -1;
};

// tokenizer.json and tokenizer.model from memory; open_tokenizer() reads the folder around them.
struct TokenizerJson {
  std::unique_ptr<Tokenizer> tokenizer;
  bool has_post_processor = false;
  std::optional<std::int32_t> leading_special;  // what the post-processor puts before the text
};
TokenizerJson read_tokenizer_json(std::string_view text, const std::string& path);
std::unique_ptr<Tokenizer> read_sentencepiece(std::string_view bytes, const std::string& path,
                                              const std::vector<AddedToken>& added);

}  // namespace fireq::formats
