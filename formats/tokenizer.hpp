// Tokenizers of Llama-family checkpoints: tokenizer.json (BPE) before tokenizer.model (SentencePiece).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace fireq::formats {

enum class BosMode : std::uint8_t { none, head };  // the checkpoint's own default

// Characters taken off the two ends of a decoded text (SentencePiece puts a space before every text).
struct TextStrip {
  std::string content;
  std::uint64_t start = 0;  // at most so many at the start
  std::uint64_t stop = 0;   // and at the end
};

class Tokenizer {
 public:
  Tokenizer() = default;
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;
  virtual ~Tokenizer() = default;

  // UTF-8 text to ids; no BOS or EOS is added. Special tokens written in the text become their ids when
  // parse_special. Error(input) with the byte offset when the text is not UTF-8. Thread-safe.
  virtual std::vector<std::int32_t> encode(std::string_view text, bool parse_special = true) const = 0;

  // Whole sequence to valid UTF-8 (U+FFFD where bytes do not make a character). skip_special drops control
  // tokens; ids that the tokenizer does not know are dropped always.
  std::string decode(std::span<const std::int32_t> ids, bool skip_special = true) const;

  // One past the largest token id.
  virtual std::uint64_t vocab_size() const = 0;
  // The id of exactly this token ("<|im_end|>"), special or not.
  virtual std::optional<std::int32_t> token_id(std::string_view token) const = 0;

  // Decoding, token by token: what `id` contributes before broken UTF-8 is repaired and the ends are
  // stripped. `first`: no earlier token of the sequence was kept. nullopt: the token is dropped.
  struct TokenBytes {
    std::string bytes;
    bool raw = false;  // one byte of byte fallback
  };
  virtual std::optional<TokenBytes> token_bytes(std::int32_t id, bool first, bool skip_special) const = 0;
  virtual const TextStrip& text_strip() const noexcept = 0;

  std::optional<std::int32_t> bos_id;
  std::optional<std::int32_t> eos_id;
  BosMode default_bos = BosMode::none;
  std::string chat_template;  // Jinja source, empty when none
};

// Text of a growing sequence, piece by piece: what each new token adds to the text of `prompt` and the tokens
// pushed so far, held back while a character is incomplete. All pieces together are decode(prompt + ids)
// minus decode(prompt): the first piece keeps its leading space when there is a prompt. Nothing printed is
// ever taken back, so where byte-fallback bytes make no valid UTF-8 the number of U+FFFD may differ from
// decode()'s.
class StreamingDecoder {
 public:
  explicit StreamingDecoder(const Tokenizer& tokenizer, std::span<const std::int32_t> prompt = {},
                            bool skip_special = true);  // the tokenizer must outlive it
  std::string push(std::int32_t id);
  std::string finish();  // what is still held back; a cut-off character as U+FFFD

 private:
  const Tokenizer& tokenizer_;
  bool skip_special_;
  bool first_ = true;
  std::uint64_t strip_left_ = 0;
  std::string held_;  // the beginning of a character
  std::string tail_;  // characters that go if the text ends here (TextStrip::stop)

  void strip_start(std::string& text);
};

// Opens the folder's tokenizer: tokenizer.json before tokenizer.model. Error(input) when damaged, or a
// feature is not supported (named), Error(usage) when there is none. BOS by default: tokenizer_config.json's
// add_bos_token, else tokenizer.json's post-processor, else head for config.json's model_type "llama".
std::unique_ptr<Tokenizer> open_tokenizer(const std::string& folder);

// The same from memory, without the settings around it.
std::unique_ptr<Tokenizer> parse_tokenizer_json(std::string_view text, const std::string& path_for_errors);
std::unique_ptr<Tokenizer> parse_tokenizer_model(std::string_view bytes, const std::string& path_for_errors);

struct ChatMessage {
  std::string role;  // "system", "user", "assistant"
  std::string content;
};
// Renders a conversation with the generation prompt, for the template families known (ChatML, Llama 2, Llama
// 3, Mistral), recognised from the template's text; refused by name otherwise.
std::string render_chat(const Tokenizer& tokenizer, std::span<const ChatMessage> messages);

// UTF-8: throws Error(input) with the byte offset at the first malformed sequence.
void check_utf8(std::string_view text, const std::string& path_for_errors);
// Byte range of code points [skip, skip + count) of valid UTF-8 (count 0: to the end).
std::string_view slice_code_points(std::string_view text, std::uint64_t skip, std::uint64_t count);

}  // namespace fireq::formats
