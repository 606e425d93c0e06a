// Chat templates: the families known are recognised from markers in the template's text, and rendered as
// their documentation says. No Jinja is run; of the [INST] family, whose members differ by a space here and
// there, the strings that the template adds up are read from it.
#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "common/error.hpp"
#include "formats/tokenizer.hpp"
#include "formats/unicode.hpp"

namespace fireq::formats {
namespace {

using Messages = std::span<const ChatMessage>;

bool has(std::string_view text, std::string_view marker) {
  return text.find(marker) != std::string_view::npos;
}

[[noreturn]] void refuse(const std::string& found) {
  Error error(ErrorKind::input, "this chat template is not supported");
  error.expected("ChatML, Llama 2, Llama 3 or Mistral")
      .hint("write the prompt yourself and leave --chat out");
  if (!found.empty()) error.found(found);
  throw error;
}

// White space of Python's str.strip(), which templates call.
std::string trimmed(std::string_view text) {
  std::size_t begin = text.size();
  std::size_t end = 0;
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Step step = utf8_step(text, at);
    const bool blank =
        is_white_space(step.code_point) || (step.code_point >= 0x1C && step.code_point <= 0x1F);
    if (!blank && end == 0) begin = at;
    at += step.length;
    if (!blank) end = at;
  }
  return end == 0 ? std::string() : std::string(text.substr(begin, end - begin));
}

std::string token_text(const Tokenizer& tokenizer, std::optional<std::int32_t> id) {
  if (!id) return {};
  return tokenizer.decode(std::array{*id}, false);
}

// The insides of {{ ... }} in order.
std::vector<std::string_view> outputs(std::string_view source) {
  std::vector<std::string_view> found;
  for (std::size_t at = source.find("{{"); at != std::string_view::npos; at = source.find("{{", at)) {
    const std::size_t begin = at + 2;
    char quote = '\0';
    std::size_t end = begin;
    for (; end < source.size(); ++end) {
      const char c = source[end];
      if (quote != '\0') {
        if (c == '\\') {
          ++end;
        } else if (c == quote) {
          quote = '\0';
        }
      } else if (c == '\'' || c == '"') {
        quote = c;
      } else if (source.substr(end).starts_with("}}")) {
        break;
      }
    }
    if (end >= source.size()) break;
    std::string_view inside = source.substr(begin, end - begin);
    if (inside.starts_with('-')) inside.remove_prefix(1);
    if (inside.ends_with('-')) inside.remove_suffix(1);
    found.push_back(inside);
    at = end;
  }
  return found;
}

// An output that adds up strings: "[INST] " + message["content"] | trim + " [/INST]".
struct Sum {
  enum class Kind : std::uint8_t { literal, bos, eos, system, content };
  struct Term {
    Kind kind = Kind::literal;
    std::string text;
    bool trims = false;
  };
  std::vector<Term> terms;

  std::string value(const Tokenizer& tokenizer, const std::string& content, const std::string& system) const {
    std::string out;
    for (const Term& term : terms) {
      const std::string text = term.kind == Kind::literal  ? term.text
                               : term.kind == Kind::bos    ? token_text(tokenizer, tokenizer.bos_id)
                               : term.kind == Kind::eos    ? token_text(tokenizer, tokenizer.eos_id)
                               : term.kind == Kind::system ? system
                                                           : content;
      out += term.trims ? trimmed(text) : text;
    }
    return out;
  }
};

std::string literal(std::string_view quoted) {
  std::string out;
  for (std::size_t i = 1; i + 1 < quoted.size(); ++i) {
    char c = quoted[i];
    if (c == '\\' && i + 2 < quoted.size()) {
      c = quoted[++i];
      c = c == 'n' ? '\n' : c == 't' ? '\t' : c == 'r' ? '\r' : c;
    }
    out += c;
  }
  return out;
}

Sum::Term read_term(std::string_view source) {
  const std::string text = trimmed(source);
  if (text.size() >= 2 && (text[0] == '\'' || text[0] == '"') && text.back() == text[0])
    return {Sum::Kind::literal, literal(text), false};
  std::string bare;  // without blanks
  for (const char c : text) {
    if (c != ' ') bare += c == '"' ? '\'' : c;
  }
  Sum::Term term;
  for (const std::string_view ending : {"|trim", ".strip()"}) {
    if (!bare.ends_with(ending)) continue;
    bare.resize(bare.size() - ending.size());
    term.trims = true;
  }
  if (bare == "bos_token") {
    term.kind = Sum::Kind::bos;
  } else if (bare == "eos_token") {
    term.kind = Sum::Kind::eos;
  } else if (bare == "system_message") {
    term.kind = Sum::Kind::system;
  } else if (bare == "content" || bare == "message['content']" || bare == "message.content") {
    term.kind = Sum::Kind::content;
  } else {
    refuse(text);
  }
  return term;
}

Sum read_sum(std::string_view source) {
  Sum sum;
  char quote = '\0';
  std::size_t begin = 0;
  for (std::size_t i = 0; i < source.size(); ++i) {
    const char c = source[i];
    if (quote != '\0') {
      if (c == '\\') {
        ++i;
      } else if (c == quote) {
        quote = '\0';
      }
    } else if (c == '\'' || c == '"') {
      quote = c;
    } else if (c == '+') {
      sum.terms.push_back(read_term(source.substr(begin, i - begin)));
      begin = i + 1;
    }
  }
  sum.terms.push_back(read_term(source.substr(begin)));
  return sum;
}

// Takes a line break off the front: an escaped one, as most templates write it, or a real one.
bool take_newline(std::string_view& source) {
  for (const std::string_view newline : {"\\n", "\n"}) {
    if (!source.starts_with(newline)) continue;
    source.remove_prefix(newline.size());
    return true;
  }
  return false;
}

// The system prompt that a ChatML template writes when the conversation has none: the literal that follows
// "<|im_start|>system" and a line break in it, up to its "<|im_end|>".
std::string default_system(std::string_view source) {
  static constexpr std::string_view kBegin = "<|im_start|>system";
  for (std::size_t at = source.find(kBegin); at != std::string_view::npos; at = source.find(kBegin, at + 1)) {
    std::string_view text = source.substr(at + kBegin.size());
    if (!take_newline(text)) continue;
    text = text.substr(0, text.find("<|im_end|>"));
    // A closing quote or a brace means that the text is put together from variables there.
    const char quote = at > 0 ? source[at - 1] : '\'';
    if (text.empty() || has(text, std::string_view(&quote, 1)) ||
        text.find_first_of("{}") != std::string::npos)
      continue;
    return literal("'" + std::string(text) + "'");
  }
  return {};
}

std::string chatml(const Tokenizer& tokenizer, Messages messages) {
  const std::string_view source = tokenizer.chat_template;
  if (has(source, "<|im_sep|>")) refuse("<|im_sep|>");
  std::string out;
  for (const std::string_view output : outputs(source)) {
    if (trimmed(output) == "bos_token") out = token_text(tokenizer, tokenizer.bos_id);
  }
  if (messages.empty() || messages.front().role != "system") {
    const std::string system = default_system(source);
    if (!system.empty()) out += "<|im_start|>system\n" + system + "<|im_end|>\n";
  }
  for (const ChatMessage& m : messages) {
    std::string content = m.content;
    // Templates of models that reason leave the thoughts of earlier turns out.
    constexpr std::string_view kThought = "</think>";
    if (m.role == "assistant" && has(source, kThought) && has(content, kThought)) {
      content = content.substr(content.rfind(kThought) + kThought.size());
      content.erase(0, content.find_first_not_of('\n'));
    }
    out += "<|im_start|>" + m.role + "\n" + content + "<|im_end|>\n";
  }
  return out + "<|im_start|>assistant\n";
}

// Llama 3.1 and later begin with a system turn that tells dates. "Today" is the date that stands in the
// template, which Llama 3.2 takes only where it cannot ask for the day: a prompt must not depend on the day.
std::string llama3_dates(std::string_view source) {
  static constexpr std::string_view kKnowledge = "Cutting Knowledge Date: December 2023";
  std::string_view rest = source.substr(std::min(source.find(kKnowledge), source.size()));
  rest.remove_prefix(std::min(rest.size(), kKnowledge.size()));
  if (!take_newline(rest)) refuse("another knowledge date");
  static constexpr std::string_view kDate = "date_string = \"";
  const std::size_t at = source.find(kDate);
  const std::size_t end = at == std::string_view::npos ? at : source.find('"', at + kDate.size());
  if (end == std::string_view::npos) refuse("no date");
  const std::string_view date = source.substr(at + kDate.size(), end - at - kDate.size());
  return "Cutting Knowledge Date: December 2023\nToday Date: " + std::string(date) + "\n\n";
}

std::string llama3(std::string_view source, Messages messages) {
  std::string out = "<|begin_of_text|>";
  const auto turn = [&](const std::string& role, const std::string& content) {
    out += "<|start_header_id|>" + role + "<|end_header_id|>\n\n" + content + "<|eot_id|>";
  };
  if (has(source, "Cutting Knowledge Date")) {
    const bool given = !messages.empty() && messages.front().role == "system";
    turn("system", llama3_dates(source) + (given ? trimmed(messages.front().content) : ""));
    if (given) messages = messages.subspan(1);
  }
  for (const ChatMessage& m : messages) turn(m.role, trimmed(m.content));
  return out + "<|start_header_id|>assistant<|end_header_id|>\n\n";
}

// Llama 2 and Mistral: [INST] user [/INST] answer; a system message goes into a user's turn.
std::string inst(const Tokenizer& tokenizer, Messages messages) {
  const std::string_view source = tokenizer.chat_template;
  const bool llama2 = has(source, "<<SYS>>");
  std::optional<Sum> user, user_with_system, assistant;
  std::string out;
  for (const std::string_view output : outputs(source)) {
    const bool behind = output.data() > source.data() + source.find("[/INST]");
    if (has(output, "[INST]") && has(output, "[/INST]")) {
      (has(output, "system_message") ? user_with_system : user) = read_sum(output);
    } else if (trimmed(output) == "bos_token" && !behind) {
      out = token_text(tokenizer, tokenizer.bos_id);
    } else if (behind && has(output, "eos_token") && has(output, "content") && !assistant) {
      assistant = read_sum(output);
    }
  }
  if (!user || !assistant) refuse("[INST] written in another way");

  std::string system;
  if (!messages.empty() && messages.front().role == "system") {
    system = messages.front().content;
    messages = messages.subspan(1);
    if (!llama2 && !user_with_system) {
      throw Error(ErrorKind::usage, "this model's chat template knows no system message")
          .hint("put it into the user's message");
    }
  }
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& m = messages[i];
    if (m.role != (i % 2 == 0 ? "user" : "assistant")) {
      throw Error(ErrorKind::usage, "roles of a conversation do not alternate, as this chat template wants")
          .expected(i % 2 == 0 ? "user" : "assistant")
          .found(m.role);
    }
    if (m.role == "assistant") {
      out += assistant->value(tokenizer, m.content, {});
      continue;
    }
    const bool here =
        !system.empty() && (!llama2 && has(source, "loop.last") ? i + 1 == messages.size() : i == 0);
    if (here && llama2) {
      out += user->value(tokenizer, "<<SYS>>\n" + system + "\n<</SYS>>\n\n" + m.content, {});
    } else {
      out += (here ? *user_with_system : *user).value(tokenizer, m.content, system);
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
  if (has(source, "<|im_start|>")) return chatml(tokenizer, messages);
  if (has(source, "<|start_header_id|>")) return llama3(source, messages);
  if (has(source, "[INST]")) return inst(tokenizer, messages);
  refuse({});
}

}  // namespace fireq::formats
