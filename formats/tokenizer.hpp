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

class Tokenizer {
 public:
  Tokenizer() = default;
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;
  virtual ~Tokenizer() = default;

  // UTF-8 text to ids; no BOS or EOS is added. Special tokens written in the text become their ids when
  // parse_special. Thread-safe.
  virtual std::vector<std::int32_t> encode(std::string_view text, bool parse_special = true) const = 0;
  // Whole sequence to text; skip_special drops control tokens.
  virtual std::string decode(std::span<const std::int32_t> ids, bool skip_special = true) const = 0;
  // The text that `id` adds after `previous` tokens: decode(previous + id) minus decode(previous), held back
  // until it is whole UTF-8 (generation).
  virtual std::uint64_t vocab_size() const = 0;

  std::optional<std::int32_t> bos_id;
  std::optional<std::int32_t> eos_id;
  BosMode default_bos = BosMode::none;
  std::string chat_template;  // Jinja source, empty when none
};

// Opens the folder's tokenizer. Error(input) when damaged, or a feature is not supported (named),
// Error(usage) when there is none.
std::unique_ptr<Tokenizer> open_tokenizer(const std::string& folder);

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
