// A checkpoint folder's tokenizer: which file counts, where BOS, EOS and the chat template come from.
#include <filesystem>
#include <nlohmann/json.hpp>

#include "tests/tokenizers/support.hpp"

namespace fireq::test {
namespace {

using formats::BosMode;
using nlohmann::json;

json small_tokenizer() {
  return {{"model", {{"vocab", {{"<s>", 0}, {"</s>", 1}, {"a", 2}}}, {"merges", json::array()}}},
          {"added_tokens",
           {{{"id", 0}, {"content", "<s>"}, {"special", true}},
            {{"id", 1}, {"content", "</s>"}, {"special", true}}}}};
}

json bos_template() {
  return {
      {"type", "TemplateProcessing"},
      {"single",
       {{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}}, {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}},
      {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {0}}, {"tokens", {"<s>"}}}}}}};
}

class Folder : public testing::Test {
 protected:
  void put(const std::string& name, const json& document) { write_bytes(folder_ / name, document.dump()); }
  std::unique_ptr<formats::Tokenizer> open() { return formats::open_tokenizer(folder_.path()); }
  std::optional<Error> error() {
    return error_of([&] { open(); });
  }

  TempFolder folder_;
};

TEST_F(Folder, WithoutATokenizerIsAUsageError) {
  const auto e = error();
  ASSERT_TRUE(e);
  EXPECT_EQ(e->kind(), ErrorKind::usage);
  EXPECT_EQ(e->path(), folder_.path());
  EXPECT_EQ(e->expected(), "tokenizer.json or tokenizer.model");
  EXPECT_FALSE(e->hint().empty());
}

TEST_F(Folder, TokenizerJsonComesBeforeTokenizerModel) {
  std::filesystem::copy(FIREQ_TEST_DATA "/models/stories260K/tokenizer.model", folder_.path());
  EXPECT_EQ(open()->vocab_size(), 512U);
  put("tokenizer.json", small_tokenizer());
  EXPECT_EQ(open()->vocab_size(), 3U);
}

TEST_F(Folder, BosComesFromTheSettingsThenThePostProcessorThenTheModelType) {
  put("tokenizer.json", small_tokenizer());
  EXPECT_EQ(open()->default_bos, BosMode::none);
  EXPECT_EQ(open()->bos_id, std::nullopt);

  put("config.json", {{"model_type", "llama"}, {"bos_token_id", 0}, {"eos_token_id", {1, 2}}});
  EXPECT_EQ(open()->default_bos, BosMode::head);
  EXPECT_EQ(open()->bos_id, 0);
  EXPECT_EQ(open()->eos_id, 1);  // the first of several

  put("config.json", {{"model_type", "qwen2"}, {"bos_token_id", 0}});
  EXPECT_EQ(open()->default_bos, BosMode::none);

  json with_template = small_tokenizer();
  with_template["post_processor"] = bos_template();
  put("tokenizer.json", with_template);
  EXPECT_EQ(open()->default_bos, BosMode::head);

  put("tokenizer_config.json", {{"add_bos_token", false}});
  EXPECT_EQ(open()->default_bos, BosMode::none);
  put("tokenizer_config.json",
      {{"add_bos_token", true}, {"bos_token", {{"content", "</s>"}}}, {"eos_token", "a"}});
  EXPECT_EQ(open()->default_bos, BosMode::head);
  EXPECT_EQ(open()->bos_id, 1);  // an added token written as an object
  EXPECT_EQ(open()->eos_id, 2);

  // encode() adds none by itself.
  EXPECT_EQ(open()->encode("a"), (Ids{2}));
}

TEST_F(Folder, APostProcessorWithoutBosOutvotesTheModelType) {
  json document = small_tokenizer();
  document["post_processor"] = {{"type", "ByteLevel"}};
  put("tokenizer.json", document);
  put("config.json", {{"model_type", "llama"}, {"bos_token_id", 0}});
  EXPECT_EQ(open()->default_bos, BosMode::none);
  document["post_processor"] = {{"type", "Sequence"},
                                {"processors", {{{"type", "ByteLevel"}}, bos_template()}}};
  put("tokenizer.json", document);
  EXPECT_EQ(open()->default_bos, BosMode::head);
}

TEST_F(Folder, ABosThatNobodyNamesIsAnError) {
  put("tokenizer.json", small_tokenizer());
  put("tokenizer_config.json", {{"add_bos_token", true}});
  const auto e = error();
  ASSERT_TRUE(e);
  EXPECT_EQ(e->kind(), ErrorKind::input);
  EXPECT_EQ(e->path(), folder_.path());
  EXPECT_NE(e->hint().find("bos_token"), std::string::npos);
}

TEST_F(Folder, ChatTemplateComesFromItsFileOrTheSettings) {
  put("tokenizer.json", small_tokenizer());
  EXPECT_EQ(open()->chat_template, "");
  put("tokenizer_config.json", {{"chat_template", "one"}});
  EXPECT_EQ(open()->chat_template, "one");
  put("tokenizer_config.json",
      {{"chat_template",
        {{{"name", "tool_use"}, {"template", "no"}}, {{"name", "default"}, {"template", "two"}}}}});
  EXPECT_EQ(open()->chat_template, "two");
  put("tokenizer_config.json", {{"chat_template", {{{"name", "tool_use"}, {"template", "no"}}}}});
  EXPECT_EQ(open()->chat_template, "");
  write_bytes(folder_ / "chat_template.jinja", "three\n");
  EXPECT_EQ(open()->chat_template, "three\n");
}

TEST_F(Folder, SideFilesAddTokensToASentencePieceModel) {
  std::filesystem::copy(FIREQ_TEST_DATA "/models/stories260K/tokenizer.model", folder_.path());
  put("added_tokens.json", {{"<|im_end|>", 513}, {"<|im_start|>", 512}});
  put("tokenizer_config.json",
      {{"added_tokens_decoder", {{"512", {{"content", "<|im_start|>"}, {"special", true}}}}}});
  const auto t = open();
  EXPECT_EQ(t->vocab_size(), 514U);
  EXPECT_EQ(t->token_id("<|im_end|>"), 513);
  const Ids ids = t->encode("<|im_start|>a<|im_end|>");
  EXPECT_EQ(ids.front(), 512);
  EXPECT_EQ(ids.back(), 513);
  EXPECT_EQ(t->decode(Ids{512, 513}, true), "<|im_end|>");
}

TEST_F(Folder, DamagedSideFilesAreNamed) {
  const auto expect = [&](const std::string& file, const std::string& message) {
    const auto e = error();
    ASSERT_TRUE(e) << message;
    EXPECT_EQ(e->kind(), ErrorKind::input);
    EXPECT_EQ(e->path(), folder_ / file) << e->what();
    EXPECT_NE(e->message().find(message), std::string::npos) << e->what();
  };
  std::filesystem::copy(FIREQ_TEST_DATA "/models/stories260K/tokenizer.model", folder_.path());
  write_bytes(folder_ / "tokenizer_config.json", "{");
  expect("tokenizer_config.json", "not valid JSON");
  put("tokenizer_config.json", {{"added_tokens_decoder", {{"x1", {{"content", "a"}}}}}});
  expect("tokenizer_config.json", "key 'added_tokens_decoder.x1' is not a token id");
  put("tokenizer_config.json", {{"added_tokens_decoder", {{"4194304", {{"content", "q"}}}}}});
  expect("tokenizer_config.json", "key 'added_tokens_decoder.4194304' is not a token id");
  put("tokenizer_config.json", {{"add_bos_token", "yes"}});
  expect("tokenizer_config.json", "key 'add_bos_token' is not true or false");
  put("tokenizer_config.json", {{"bos_token", 3}});
  expect("tokenizer_config.json", "key 'bos_token' is not a string");
  put("tokenizer_config.json", {{"chat_template", 3}});
  expect("tokenizer_config.json", "key 'chat_template' is not a string");
  put("tokenizer_config.json", {{"chat_template", {3}}});
  expect("tokenizer_config.json", "key 'chat_template[0]' is not a JSON object");
  put("tokenizer_config.json", json::object());
  put("config.json", {{"eos_token_id", {"a"}}});
  expect("config.json", "key 'eos_token_id' is not a list of token ids");
  put("config.json", {{"bos_token_id", -7}});
  expect("config.json", "key 'bos_token_id' is negative");
  put("config.json", json::object());
  put("added_tokens.json", {{"<x>", 5}});
  expect("tokenizer.model", "added token '<x>' has the id of another token");
  put("added_tokens.json", {{"<s>", 600}});
  expect("tokenizer.model", "added token '<s>' has another id in tokenizer.model");
  put("added_tokens.json", {{std::string(600, 'x'), 600}});
  expect("added_tokens.json", "is too long for an added token");
}

}  // namespace
}  // namespace fireq::test
