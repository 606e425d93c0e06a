// Each way to damage a tokenizer.json ends in one Error that says where, what was expected and what was
// found.
#include <nlohmann/json.hpp>

#include "tests/tokenizers/support.hpp"

namespace fireq::test {
namespace {

using nlohmann::json;

// A file that uses most of the format and is fine.
json sound() {
  return json::parse(R"({
    "version": "1.0",
    "added_tokens": [{"id": 1, "content": "<s>", "special": true}, {"id": 9, "content": "<x>", "lstrip": true}],
    "normalizer": {"type": "Sequence", "normalizers": [
      {"type": "Prepend", "prepend": "_"},
      {"type": "Replace", "pattern": {"String": " "}, "content": "_"}, {"type": "NFC"}]},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
      {"type": "Split", "pattern": {"Regex": "a+|b"}, "behavior": "Isolated", "invert": false},
      {"type": "Metaspace", "replacement": "_", "prepend_scheme": "never"},
      {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]},
    "post_processor": {"type": "TemplateProcessing",
      "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
      "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
    "decoder": {"type": "Sequence", "decoders": [
      {"type": "Replace", "pattern": {"String": "_"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
      {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
      "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": true, "ignore_merges": false,
      "vocab": {"<unk>": 0, "<s>": 1, "a": 2, "b": 3, "ab": 4, "_": 5, "<0x41>": 6},
      "merges": ["a b"]}})");
}

std::optional<Error> error_in(const std::string& text) {
  return error_of([&] { formats::parse_tokenizer_json(text, "dir/tokenizer.json"); });
}

void expect_clear(const Error& error) {
  EXPECT_EQ(error.kind(), ErrorKind::input);
  EXPECT_EQ(error.path(), "dir/tokenizer.json");
  EXPECT_FALSE(error.message().empty());
  EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
  EXPECT_LT(std::string(error.what()).size(), 1500U);
}

TEST(JsonDamage, TheSoundFileIsSound) {
  const auto t = formats::parse_tokenizer_json(sound().dump(), "dir/tokenizer.json");
  EXPECT_EQ(t->encode("ab"), (Ids{5, 2, 3}));
  EXPECT_EQ(t->encode("a"), (Ids{5, 2}));
  EXPECT_EQ(t->decode(Ids{5, 4, 6}), "abA");
}

struct Damage {
  const char* where;  // JSON pointer
  const char* value;  // new value, or nullptr: the key goes
  const char* message;
  const char* expected;
  const char* found;
};

constexpr auto kDamages = std::to_array<Damage>({
    {"/model", nullptr, "key 'model' is missing", "", ""},
    {"/model", "[]", "key 'model' is not a JSON object", "an object", "a list of 0"},
    {"/model/type", R"("WordPiece")", "key 'model.type' names a model that is not supported", "BPE",
     "\"WordPiece\""},
    {"/model/type", R"("Unigram")", "key 'model.type' names a model that is not supported", "BPE",
     "\"Unigram\""},
    {"/model/type", "7", "key 'model.type' is not a string", "a string", "7"},
    {"/model/dropout", "0.1", "key 'model.dropout' makes the tokens random", "null", "0.1"},
    {"/model/continuing_subword_prefix", R"("##")", "key 'model.continuing_subword_prefix' is not supported",
     "null", "\"##\""},
    {"/model/end_of_word_suffix", R"("</w>")", "key 'model.end_of_word_suffix' is not supported", "null",
     "\"</w>\""},
    {"/model/byte_fallback", "1", "key 'model.byte_fallback' is not true or false", "true or false", "1"},
    {"/model/ignore_merges", R"("no")", "key 'model.ignore_merges' is not true or false", "true or false",
     "\"no\""},
    {"/model/unk_token", R"("<unknown>")", "key 'model.unk_token' is not in the vocabulary", "",
     "\"<unknown>\""},
    {"/model/vocab", nullptr, "key 'model.vocab' is missing", "", ""},
    {"/model/vocab", "[]", "key 'model.vocab' is not a JSON object", "an object", "a list of 0"},
    {"/model/vocab/a", "-1", "key 'model.vocab.a' has no usable token id", "an integer from 0 to 4194303",
     "-1"},
    {"/model/vocab/a", "1.5", "key 'model.vocab.a' has no usable token id", "an integer", "1.5"},
    {"/model/vocab/a", "4194304", "key 'model.vocab.a' has no usable token id", "to 4194303", "4194304"},
    {"/model/vocab/a", "18446744073709551615", "key 'model.vocab.a' has no usable token id", "to 4194303",
     "18446744"},
    {"/model/vocab/a", R"("2")", "key 'model.vocab.a' has no usable token id", "an integer", "\"2\""},
    {"/model/vocab/b", "2", "key 'model.vocab.b' has the id of another token", "", "2"},
    {"/model/merges", nullptr, "key 'model.merges' is missing", "", ""},
    {"/model/merges", "{}", "key 'model.merges' is not a list", "a list", "an object"},
    {"/model/merges/0", R"("ab")", "key 'model.merges[0]' is not two tokens", "\"left right\"", "\"ab\""},
    {"/model/merges/0", R"("a b c")", "key 'model.merges[0]' is not two tokens", "\"left right\"",
     "\"a b c\""},
    {"/model/merges/0", R"(["a"])", "key 'model.merges[0]' is not two tokens", "\"left right\"",
     "a list of 1"},
    {"/model/merges/0", R"(["a", 3])", "key 'model.merges[0]' is not two tokens", "\"left right\"",
     "a list of 2"},
    {"/model/merges/0", "null", "key 'model.merges[0]' is not two tokens", "\"left right\"", "null"},
    {"/model/merges/0", R"("a z")", "key 'model.merges[0]' names a token that is not in the vocabulary",
     "tokens in the vocabulary", "\"a z\""},
    {"/model/merges/0", R"("b a")", "key 'model.merges[0]' makes a token that is not in the vocabulary",
     "tokens in the vocabulary", "\"b a\""},
    {"/added_tokens", "{}", "key 'added_tokens' is not a list", "a list", "an object"},
    {"/added_tokens/0", "5", "key 'added_tokens[0]' is not a JSON object", "an object", "5"},
    {"/added_tokens/0/id", nullptr, "key 'added_tokens[0].id' is missing", "", ""},
    {"/added_tokens/0/id", "3", "key 'added_tokens[0].id' is not the id that this token has elsewhere", "1",
     "3"},
    {"/added_tokens/1/id", "3", "key 'added_tokens[1].id' is the id of another token", "", "3"},
    {"/added_tokens/1/id", "4194304", "key 'added_tokens[1].id' is out of range", "from 0 to 4194303",
     "4194304"},
    {"/added_tokens/1/id", "-4", "key 'added_tokens[1].id' is negative", "from 0 to 4194303", "-4"},
    {"/added_tokens/1/content", "[1]", "key 'added_tokens[1].content' is not a string", "a string",
     "a list of 1"},
    {"/added_tokens/1/lstrip", "\"\"", "key 'added_tokens[1].lstrip' is not true or false", "true or false",
     "\"\""},
    {"/normalizer", "[]", "key 'normalizer' is not a JSON object", "an object", "a list of 0"},
    {"/normalizer/type", R"("BertNormalizer")",
     "key 'normalizer.type' names a normalizer that is not supported", "NFKC", "\"BertNormalizer\""},
    {"/normalizer/normalizers", "3", "key 'normalizer.normalizers' is not a list", "a list", "3"},
    {"/normalizer/normalizers/2/type", R"("Precompiled")",
     "key 'normalizer.normalizers[2].type' names a normalizer that is not supported", "Prepend",
     "\"Precompiled\""},
    {"/normalizer/normalizers/0/prepend", nullptr, "key 'normalizer.normalizers[0].prepend' is missing", "",
     ""},
    {"/normalizer/normalizers/1/pattern", "{}", "key 'normalizer.normalizers[1].pattern' is of no known kind",
     "{\"String\": ...} or {\"Regex\": ...}", "an object"},
    {"/pre_tokenizer/type", R"("BertPreTokenizer")",
     "key 'pre_tokenizer.type' names a pre-tokenizer that is not supported", "ByteLevel",
     "\"BertPreTokenizer\""},
    {"/pre_tokenizer/pretokenizers/0/behavior", R"("isolated")",
     "key 'pre_tokenizer.pretokenizers[0].behavior' is of no known kind", "MergedWithNext", "\"isolated\""},
    {"/pre_tokenizer/pretokenizers/0/pattern/Regex", "\"(a\"", "does not compile", "", ""},
    {"/pre_tokenizer/pretokenizers/0/pattern/Regex", R"("a\\")", "ends in a backslash", "", ""},
    {"/pre_tokenizer/pretokenizers/0/pattern/Regex", R"("[a[b]]")", "a class inside a class", "", ""},
    {"/pre_tokenizer/pretokenizers/0/pattern/Regex", R"("[a&&b]")", "an intersection of classes", "", ""},
    {"/pre_tokenizer/pretokenizers/0/pattern/Regex", R"("(*COMMIT)a")", "has a verb", "", ""},
    {"/pre_tokenizer/pretokenizers/0/pattern/Regex", R"("(?<name>a)b")",
     "kind of group that is not supported", "", ""},
    {"/pre_tokenizer/pretokenizers/0/pattern/Regex", R"("a{2}+")", "quantifier after {n}", "", ""},
    {"/pre_tokenizer/pretokenizers/0/pattern/Regex", R"("\\p{Nonsense}")", "does not compile", "", ""},
    {"/pre_tokenizer/pretokenizers/0/pattern/Regex", R"("(a)\\1")", "uses \\1, which is not supported", "",
     ""},
    {"/pre_tokenizer/pretokenizers/0/pattern/Regex", R"("\\h")", "uses \\h, which is not supported", "", ""},
    {"/pre_tokenizer/pretokenizers/1/replacement", R"("__")",
     "key 'pre_tokenizer.pretokenizers[1].replacement' is not one character", "one character", "\"__\""},
    {"/pre_tokenizer/pretokenizers/1/prepend_scheme", R"("sometimes")",
     "key 'pre_tokenizer.pretokenizers[1].prepend_scheme' is of no known kind", "always, first or never",
     "\"sometimes\""},
    {"/pre_tokenizer/pretokenizers/1/type", R"("ByteLevel")",
     "key 'pre_tokenizer.pretokenizers[2].type' comes after ByteLevel", "", "\"ByteLevel\""},
    {"/decoder/type", R"("WordPiece")", "key 'decoder.type' names a decoder that is not supported",
     "ByteFallback", "\"WordPiece\""},
    {"/decoder/decoders/3/content", R"("")", "key 'decoder.decoders[3].content' is not one character",
     "one character", "\"\""},
    {"/decoder/decoders/3/start", "-1", "key 'decoder.decoders[3].start' is negative", "an integer", "-1"},
    {"/decoder/decoders/2/type", R"("ByteLevel")",
     "key 'decoder.decoders[2].type' names a decoder in a place", "", "\"ByteLevel\""},
    {"/post_processor/type", R"("BertProcessing")",
     "key 'post_processor.type' names a post-processor that is not supported", "TemplateProcessing",
     "\"BertProcessing\""},
    {"/post_processor/single", "[]", "key 'post_processor.single' is not a list of objects", "",
     "a list of 0"},
    {"/post_processor/special_tokens", "{}", "key 'post_processor.special_tokens.<s>' is missing", "", ""},
    {"/post_processor/special_tokens/<s>/ids", "[-3]",
     "key 'post_processor.special_tokens.<s>.ids' is not a list of", "", "a list of 1"},
    {"/post_processor/special_tokens/<s>/ids", "[4194304]",
     "key 'post_processor.special_tokens.<s>.ids' is not a list of", "", "a list of 1"},
});

TEST(JsonDamage, EachIsOneClearError) {
  for (const Damage& d : kDamages) {
    SCOPED_TRACE(std::string(d.where) + " = " + (d.value == nullptr ? "nothing" : d.value));
    json document = sound();
    const json::json_pointer at(d.where);
    if (d.value == nullptr) {
      document.at(at.parent_pointer()).erase(at.back());
    } else {
      document.at(at) = json::parse(d.value);
    }
    const auto error = error_in(document.dump());
    ASSERT_TRUE(error);
    expect_clear(*error);
    EXPECT_NE(std::string(error->what()).find(d.message), std::string::npos) << error->what();
    EXPECT_NE(error->expected().find(d.expected), std::string::npos) << error->what();
    EXPECT_NE(error->found().find(d.found), std::string::npos) << error->what();
  }
}

TEST(JsonDamage, WhatIsNotJsonIsRefusedWithTheOffset) {
  const auto broken = error_in(R"({"model": tru})");
  ASSERT_TRUE(broken);
  expect_clear(*broken);
  EXPECT_EQ(broken->message(), "not valid JSON");
  EXPECT_EQ(broken->offset(), 13U);
  EXPECT_FALSE(broken->hint().empty());

  EXPECT_EQ(error_in("").value().offset(), 0U);
  EXPECT_NE(error_in("[]").value().message().find("the file is not a JSON object"), std::string::npos);
  EXPECT_NE(error_in(R"({"model": {}, "model": {}})").value().message().find("'model' appears twice"),
            std::string::npos);
  EXPECT_NE(error_in(std::string(100'000, '[')).value().message().find("nested too deeply"),
            std::string::npos);
  EXPECT_TRUE(error_in("{\"model\": \"\xFF\"}"));
  EXPECT_TRUE(error_in("{\"model\": \"\\ud800\"}"));  // a lone surrogate
  EXPECT_TRUE(error_in("{\"model\": 1e999}"));
}

TEST(JsonDamage, EveryTruncationIsAnError) {
  const std::string text = sound().dump();
  for (std::size_t size = 0; size < text.size(); ++size) {
    const auto error = error_in(text.substr(0, size));
    ASSERT_TRUE(error) << size;
    expect_clear(*error);
  }
}

// A changed byte is an Error or a tokenizer that works.
TEST(JsonDamage, AnyChangedByteIsAnErrorOrATokenizer) {
  const std::string text = sound().dump();
  std::mt19937_64 random(40);
  int errors = 0;
  for (int round = 0; round < 4000; ++round) {
    std::string changed = text;
    const auto flips = 1 + random() % 3;
    for (std::uint64_t i = 0; i < flips; ++i)
      changed[random() % changed.size()] = static_cast<char>(random() & 0xFFU);
    const auto error = error_of([&] {
      const auto t = formats::parse_tokenizer_json(changed, "dir/tokenizer.json");
      const Ids ids = t->encode("ab <s> a\xCC\x81 \xF0\x9F\xA6\x99");
      EXPECT_TRUE(is_utf8(t->decode(ids, false)));
    });
    if (!error) continue;
    ++errors;
    expect_clear(*error);
  }
  EXPECT_GT(errors, 1000);
}

TEST(JsonDamage, AWildPatternIsStoppedAtTheText) {
  json document = sound();
  document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a|a)*[bc]";
  const auto t = formats::parse_tokenizer_json(document.dump(), "dir/tokenizer.json");
  const auto error = error_of([&] { t->encode(std::string(5000, 'a')); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->kind(), ErrorKind::input);
  EXPECT_NE(error->message().find("'(a|a)*[bc]' fails on the text"), std::string::npos);
  EXPECT_FALSE(error->hint().empty());
}

TEST(JsonDamage, ReplacementsCannotGrowATextWithoutBound) {
  json document = sound();
  json steps = json::array();
  for (int i = 0; i < 60; ++i)
    steps.push_back({{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aa"}});
  document["normalizer"] = {{"type", "Sequence"}, {"normalizers", steps}};
  const auto error =
      error_of([&] { formats::parse_tokenizer_json(document.dump(), "dir/tokenizer.json")->encode("a"); });
  ASSERT_TRUE(error);
  EXPECT_NE(error->message().find("make the text too long"), std::string::npos);
  EXPECT_FALSE(error->expected().empty());
  EXPECT_FALSE(error->found().empty());
  EXPECT_FALSE(error->hint().empty());

  document = sound();
  document["decoder"] = {{"type", "Sequence"}, {"decoders", steps}};
  EXPECT_TRUE(error_of(
      [&] { formats::parse_tokenizer_json(document.dump(), "dir/tokenizer.json")->decode(Ids{2}); }));
}

TEST(JsonDamage, AnAddedTokenHasALargestLength) {
  json document = sound();
  document["added_tokens"][1]["content"] = std::string(512, 'x');
  EXPECT_TRUE(error_in(document.dump()));  // the normalizer puts a character before it
  document["added_tokens"][1]["normalized"] = false;
  EXPECT_FALSE(error_in(document.dump()));
  document["added_tokens"][1]["content"] = std::string(513, 'x');
  const auto error = error_in(document.dump());
  ASSERT_TRUE(error);
  expect_clear(*error);
  EXPECT_EQ(error->expected(), "at most 512 bytes");
}

}  // namespace
}  // namespace fireq::test
