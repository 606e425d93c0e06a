// Chat templates: the families known are recognised from markers in the template's text; no Jinja is run.
#include <string>

#include "common/error.hpp"
#include "formats/tokenizer.hpp"

namespace fireq::formats {
namespace {

bool has(const std::string& text, std::string_view marker) {
  return text.find(marker) != std::string::npos;
}

// The system prompt that a ChatML template writes when the conversation has none: the literal that follows
// "<|im_start|>system\n" in it (an escaped newline in the Jinja source), up to its "<|im_end|>".
std::string default_system(const std::string& chat_template) {
  static constexpr std::string_view kBegin = "<|im_start|>system\\n";
  static constexpr std::string_view kEnd = "<|im_end|>";
  for (std::size_t at = chat_template.find(kBegin); at != std::string::npos;
       at = chat_template.find(kBegin, at + 1)) {
    const std::size_t begin = at + kBegin.size();
    const std::size_t end = chat_template.find(kEnd, begin);
    if (end == std::string::npos) break;
    const std::string literal = chat_template.substr(begin, end - begin);
    // A quote or a brace means that the text is put together from variables there.
    if (!literal.empty() && literal.find_first_of("'\"{}") == std::string::npos) return literal;
  }
  return {};
}

std::string chatml(const std::string& chat_template, std::span<const ChatMessage> messages) {
  std::string out;
  if (messages.empty() || messages.front().role != "system") {
    const std::string system = default_system(chat_template);
    if (!system.empty()) out += "<|im_start|>system\n" + system + "<|im_end|>\n";
  }
  for (const ChatMessage& m : messages) out += "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n";
  return out + "<|im_start|>assistant\n";
}

std::string trimmed(const std::string& text) {
  const std::size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string::npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1);
}

std::string llama3(std::span<const ChatMessage> messages) {
  std::string out = "<|begin_of_text|>";
  for (const ChatMessage& m : messages) {
    out += "<|start_header_id|>" + m.role + "<|end_header_id|>\n\n" + trimmed(m.content) + "<|eot_id|>";
  }
  return out + "<|start_header_id|>assistant<|end_header_id|>\n\n";
}

// Llama 2 and Mistral: [INST] user [/INST] answer; a system message goes into the first user turn.
std::string inst(std::span<const ChatMessage> messages, bool llama2) {
  std::string out;
  std::string system;
  bool first = true;
  for (const ChatMessage& m : messages) {
    if (m.role == "system") {
      system = llama2 ? "<<SYS>>\n" + m.content + "\n<</SYS>>\n\n" : m.content + "\n\n";
    } else if (m.role == "user") {
      if (llama2 || first) out += "<s>";
      out += "[INST] " + trimmed(system + m.content) + " [/INST]";
      system.clear();
      first = false;
    } else {
      out += " " + trimmed(m.content) + (llama2 ? " </s>" : "</s>");
    }
  }
  return out;
}

}  // namespace

std::string render_chat(const Tokenizer& tokenizer, std::span<const ChatMessage> messages) {
  const std::string& source = tokenizer.chat_template;
  if (source.empty()) {
    throw Error(ErrorKind::usage, "the model has no chat template").hint("leave --chat out");
  }
  for (const ChatMessage& m : messages) {
    if (m.role != "system" && m.role != "user" && m.role != "assistant") {
      throw Error(ErrorKind::usage, "unknown role in a conversation")
          .expected("system, user or assistant")
          .found(m.role);
    }
  }
  if (has(source, "<|im_start|>")) return chatml(source, messages);
  if (has(source, "<|start_header_id|>")) return llama3(messages);
  if (has(source, "[INST]")) return inst(messages, has(source, "<<SYS>>"));
  throw Error(ErrorKind::input, "this chat template is not supported")
      .expected("ChatML, Llama 2, Llama 3 or Mistral")
      .hint("write the prompt yourself and leave --chat out");
}

}  // namespace fireq::formats
