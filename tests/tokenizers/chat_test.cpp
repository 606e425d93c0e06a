// Chat templates against renderings written by hand from each family's documentation. The templates here are
// as long as it takes to tell the families and their members apart.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "tests/tokenizers/support.hpp"

namespace fireq::test {
namespace {

using formats::ChatMessage;
using nlohmann::json;

constexpr std::string_view kChatMl =
    R"jinja({% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %})jinja";

constexpr std::string_view kSmolLm2 =
    R"jinja({% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %})jinja";

constexpr std::string_view kQwen25 = R"jinja({%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
)jinja";

// Of Qwen 3: thoughts of earlier turns are left out.
constexpr std::string_view kReasoning = R"jinja({%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
)jinja";

constexpr std::string_view kChatMlWithBos =
    R"jinja({{ bos_token }}{% for message in messages %}{{"<|im_start|>" + message["role"] + "\n" + message["content"] + "<|im_end|>\n"}}{% endfor %}{{ "<|im_start|>assistant\n" }})jinja";

constexpr std::string_view kLlama3 =
    R"jinja({% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %})jinja";

constexpr std::string_view kLlama31 = R"jinja({{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
)jinja";

constexpr std::string_view kLlama2 =
    R"jinja({% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %})jinja";

// The first template of Mistral 7B Instruct: no system message.
constexpr std::string_view kMistral1 =
    R"jinja({{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %})jinja";

// Version 0.3: the system message goes into the last turn.
constexpr std::string_view kMistral3 = R"jinja({%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
)jinja";

// And one that puts it into the first.
constexpr std::string_view kMistralFirst = R"jinja({%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\n\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- endif %}
{%- endfor %}
)jinja";

std::unique_ptr<formats::Tokenizer> with_template(std::string_view chat_template) {
  const json document = {{"model", {{"vocab", {{"<s>", 0}, {"</s>", 1}}}, {"merges", json::array()}}}};
  auto tokenizer = formats::parse_tokenizer_json(document.dump(), "tokenizer.json");
  tokenizer->bos_id = 0;
  tokenizer->eos_id = 1;
  tokenizer->chat_template = chat_template;
  return tokenizer;
}

std::string render(std::string_view chat_template, const std::vector<ChatMessage>& messages) {
  return formats::render_chat(*with_template(chat_template), messages);
}

const std::vector<ChatMessage> kUser = {{"user", "Hi!\n"}};
const std::vector<ChatMessage> kSystem = {{"system", " Be brief. "}, {"user", " Hi! "}};
const std::vector<ChatMessage> kTurns = {
    {"system", "Be brief."}, {"user", "Hi!"}, {"assistant", " Hello. "}, {"user", "Bye \xE3\x80\x80"}};
const std::vector<ChatMessage> kTurnsWithoutSystem = {kTurns.begin() + 1, kTurns.end()};

TEST(Chat, ChatMl) {
  EXPECT_EQ(render(kChatMl, kUser), "<|im_start|>user\nHi!\n<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(render(kChatMl, kSystem),
            "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\n Hi! "
            "<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(render(kChatMl, kTurns),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
            "<|im_start|>assistant\n Hello. <|im_end|>\n<|im_start|>user\nBye \xE3\x80\x80<|im_end|>\n"
            "<|im_start|>assistant\n");
  EXPECT_EQ(render(kChatMlWithBos, kUser), "<s><|im_start|>user\nHi!\n<|im_end|>\n<|im_start|>assistant\n");
}

TEST(Chat, TheSystemPromptOfTheTemplateIsUsedWhenThereIsNoOther) {
  EXPECT_EQ(
      render(kSmolLm2, kUser),
      "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
      "<|im_start|>user\nHi!\n<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(
      render(kQwen25, kUser),
      "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
      "<|im_start|>user\nHi!\n<|im_end|>\n<|im_start|>assistant\n");
  for (const std::string_view source : {kSmolLm2, kQwen25})
    EXPECT_EQ(render(source, kSystem), render(kChatMl, kSystem));
  // Some files write a real line break instead of \n.
  for (const std::string_view source : {kSmolLm2, kQwen25, kChatMl, kLlama31, kLlama2, kMistral3})
    EXPECT_EQ(render(replaced(source, "\\n", "\n"), kUser), render(source, kUser));
  const std::string quoted = "{{ \"<|im_start|>system\\nDon't \\\"hurry\\\".\\nPlease.<|im_end|>\\n\" }}";
  EXPECT_EQ(render(replaced(quoted, "\\\"hurry\\\"", "hurry"), kUser),
            "<|im_start|>system\nDon't hurry.\nPlease.<|im_end|>\n" + render(kChatMl, kUser));
}

TEST(Chat, ThoughtsOfEarlierTurnsAreLeftOut) {
  const std::vector<ChatMessage> messages = {
      {"user", "1+1?"}, {"assistant", "<think>\nhm\n</think>\n\n2"}, {"user", "</think> sure?"}};
  EXPECT_EQ(render(kReasoning, messages),
            "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
            "<|im_start|>user\n</think> sure?<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_NE(render(kChatMl, messages).find("hm"), std::string::npos);
}

TEST(Chat, Llama3) {
  EXPECT_EQ(render(kLlama3, kUser),
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n");
  EXPECT_EQ(render(kLlama3, kTurns),
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n");
}

TEST(Chat, Llama31TellsDates) {
  const std::string dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";
  EXPECT_EQ(render(kLlama31, kUser), "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" +
                                         dates +
                                         "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
                                         "<|start_header_id|>assistant<|end_header_id|>\n\n");
  EXPECT_EQ(render(kLlama31, kSystem),
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + dates +
                "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n");
}

TEST(Chat, Llama2) {
  EXPECT_EQ(render(kLlama2, kUser), "<s>[INST] Hi! [/INST]");
  EXPECT_EQ(render(kLlama2, kSystem), "<s>[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\n Hi! [/INST]");
  EXPECT_EQ(render(kLlama2, kTurns),
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi! [/INST] Hello. </s><s>[INST] Bye [/INST]");
}

TEST(Chat, MistralsDifferByTheirSpaces) {
  EXPECT_EQ(render(kMistral1, kUser), "<s>[INST] Hi!\n [/INST]");
  EXPECT_EQ(render(kMistral1, kTurnsWithoutSystem),
            "<s>[INST] Hi! [/INST] Hello. </s>[INST] Bye \xE3\x80\x80 [/INST]");
  EXPECT_EQ(render(kMistral3, kSystem), "<s>[INST]  Be brief. \n\n Hi! [/INST]");
  EXPECT_EQ(render(kMistral3, kTurns),
            "<s>[INST] Hi![/INST] Hello.</s>[INST] Be brief.\n\nBye \xE3\x80\x80[/INST]");
  EXPECT_EQ(render(kMistralFirst, kTurns),
            "<s> [INST] Be brief.\n\nHi! [/INST]  Hello. </s> [INST] Bye \xE3\x80\x80 [/INST]");
}

Error refusal(std::string_view chat_template, const std::vector<ChatMessage>& messages) {
  const auto error = error_of([&] { render(chat_template, messages); });
  EXPECT_TRUE(error);
  return error.value_or(Error(ErrorKind::internal, "none"));
}

TEST(ChatRefusals, SayWhatToDoInstead) {
  const Error none = refusal("", kUser);
  EXPECT_EQ(none.kind(), ErrorKind::input);
  EXPECT_EQ(none.message(), "the model has no chat template");
  EXPECT_FALSE(none.hint().empty());

  for (const std::string_view unknown :
       {"{{ '<|user|>' + messages[0].content }}", "<start_of_turn>user", "<|header_start|>",
        "<|im_start|>user<|im_sep|>",
        // [INST] put together in a way that is not read
        "[INST] {{ message }} [/INST]",
        "{{ '[INST] ' + shout(message) + ' [/INST]' }}{{ content + eos_token }}",
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}",
        // another Llama
        "<|start_header_id|> Cutting Knowledge Date: May 2031",
        "<|start_header_id|> Cutting Knowledge Date: December 2023\\n"}) {
    const Error error = refusal(unknown, kUser);
    EXPECT_EQ(error.kind(), ErrorKind::input) << unknown;
    EXPECT_EQ(error.message(), "this chat template is not supported") << unknown;
    EXPECT_FALSE(error.expected().empty()) << unknown;
    EXPECT_FALSE(error.hint().empty()) << unknown;
  }
}

TEST(ChatRefusals, RolesThatTheTemplateRefusesAreRefused) {
  const Error unknown = refusal(kChatMl, {{"tool", "x"}});
  EXPECT_EQ(unknown.kind(), ErrorKind::usage);
  EXPECT_EQ(unknown.expected(), "system, user or assistant");
  EXPECT_EQ(unknown.found(), "tool");

  const Error system = refusal(kMistral1, kSystem);
  EXPECT_EQ(system.kind(), ErrorKind::usage);
  EXPECT_NE(system.message().find("no system message"), std::string::npos);
  EXPECT_FALSE(system.hint().empty());

  const Error twice = refusal(kLlama2, {{"user", "a"}, {"user", "b"}});
  EXPECT_EQ(twice.kind(), ErrorKind::usage);
  EXPECT_EQ(twice.expected(), "assistant");
  EXPECT_EQ(twice.found(), "user");
  EXPECT_EQ(refusal(kMistral3, {{"assistant", "a"}}).expected(), "user");
  EXPECT_EQ(refusal(kLlama2, {{"user", "a"}, {"system", "b"}}).found(), "system");
}

// Templates come from strangers, too: any text is rendered or refused.
TEST(ChatRefusals, AnyTemplateIsRenderedOrRefused) {
  std::mt19937_64 random(70);
  const std::vector<std::string_view> sources = {kChatMl, kQwen25, kLlama31, kLlama2, kMistral3};
  for (int round = 0; round < 3000; ++round) {
    std::string source(sources[random() % sources.size()]);
    const auto changes = 1 + random() % 6;
    for (std::uint64_t i = 0; i < changes; ++i) {
      const std::size_t at = random() % source.size();
      if (random() % 2 == 0) {
        source.erase(at, random() % 40);
      } else {
        source[at] = "{}'\"+|\\ %"[random() % 9];
      }
      if (source.empty()) break;
    }
    const auto error = error_of([&] { render(source, kTurns); });
    if (error) {
      ASSERT_TRUE(error->kind() == ErrorKind::input || error->kind() == ErrorKind::usage) << error->what();
    }
  }
}

// A rendered conversation is one special token for each marker, and decodes to itself.
TEST(Chat, MarkersBecomeSpecialTokens) {
  const auto tokenizer = formats::open_tokenizer(FIREQ_TEST_DATA "/tokenizers/qwen2_5");
  tokenizer->chat_template = kQwen25;
  const std::string text = formats::render_chat(*tokenizer, kSystem);
  const Ids ids = tokenizer->encode(text, true);
  const std::int32_t start = tokenizer->token_id("<|im_start|>").value();
  const std::int32_t end = tokenizer->token_id("<|im_end|>").value();
  EXPECT_EQ(std::count(ids.begin(), ids.end(), start), 3);
  EXPECT_EQ(std::count(ids.begin(), ids.end(), end), 2);
  EXPECT_EQ(tokenizer->decode(ids, false), text);
}

}  // namespace
}  // namespace fireq::test
