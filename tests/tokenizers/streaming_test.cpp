// StreamingDecoder: its pieces are the whole text, wherever the prompt ends, and each is UTF-8 by itself.
#include <utility>

#include "tests/tokenizers/support.hpp"

namespace fireq::test {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

// What a decoder that saw `prompt` prints for the rest, in pieces.
std::vector<std::string> pieces_of(const formats::Tokenizer& tokenizer, const Ids& ids, std::size_t prompt,
                                   bool skip_special = true) {
  const std::span<const std::int32_t> all(ids);
  formats::StreamingDecoder decoder(tokenizer, all.first(prompt), skip_special);
  std::vector<std::string> pieces;
  for (const std::int32_t id : all.subspan(prompt)) pieces.push_back(decoder.push(id));
  pieces.push_back(decoder.finish());
  pieces.push_back(decoder.finish());  // once finished there is no more
  return pieces;
}

std::string joined(const std::vector<std::string>& pieces) {
  std::string all;
  for (const std::string& piece : pieces) {
    EXPECT_TRUE(is_utf8(piece)) << testing::PrintToString(piece);
    all += piece;
  }
  EXPECT_EQ(pieces.back(), "");
  return all;
}

class Streaming : public testing::TestWithParam<Family> {};

TEST_P(Streaming, PiecesAreTheWholeTextForEveryPrompt) {
  const auto tokenizer = GetParam().open();
  std::mt19937_64 random(10);
  for (int round = 0; round < 60; ++round) {
    const Ids ids = tokenizer->encode(random_text(random, 1 + random() % 12).raw, false);
    const std::string whole = tokenizer->decode(ids);
    ASSERT_EQ(joined(pieces_of(*tokenizer, ids, 0)), whole);
    for (std::size_t prompt = 1; prompt <= ids.size(); ++prompt) {
      const std::string rest = joined(pieces_of(*tokenizer, ids, prompt));
      ASSERT_TRUE(whole.ends_with(rest));
      // What a decoder prints that stops where the prompt does is the part before.
      formats::StreamingDecoder stops(*tokenizer);
      std::string before;
      for (const std::int32_t id : std::span(ids).first(prompt)) before += stops.push(id);
      ASSERT_EQ(before + rest, whole) << "prompt of " << prompt;
    }
  }
}

// Where ids make broken UTF-8, byte-level decoders still agree to the byte. Byte fallback decodes a run of
// bytes all or nothing, which a stream cannot know in advance: only what is not U+FFFD must appear, in order.
TEST_P(Streaming, RandomIdsGiveUtf8Pieces) {
  const auto tokenizer = GetParam().open();
  const bool byte_level = GetParam().changes != Family::Changes::marks_spaces;
  std::mt19937_64 random(11);
  for (int round = 0; round < 400; ++round) {
    Ids ids(1 + random() % 24);
    for (std::int32_t& id : ids) {
      const std::uint64_t below = random() % 2 == 0 ? 300 : tokenizer->vocab_size() + 5;
      id = static_cast<std::int32_t>(random() % below);
    }
    const bool skip = random() % 2 == 0;
    const std::string whole = tokenizer->decode(ids, skip);
    const std::string streamed = joined(pieces_of(*tokenizer, ids, 0, skip));
    if (byte_level || whole.find(kReplacement) == std::string::npos) {
      ASSERT_EQ(streamed, whole);
      continue;
    }
    std::string left = streamed;
    std::size_t at = 0;
    std::size_t begin = 0;
    for (std::size_t end = 0; end != std::string::npos; begin = end + kReplacement.size()) {
      end = whole.find(kReplacement, begin);
      const std::string part = whole.substr(begin, end == std::string::npos ? end : end - begin);
      at = left.find(part, at);
      ASSERT_NE(at, std::string::npos) << whole << " streamed as " << streamed;
      at += part.size();
    }
  }
}

TEST_P(Streaming, ACharacterIsHeldBackUntilItIsComplete) {
  const auto tokenizer = GetParam().open();
  // A code point of a script that none of the vocabularies has whole: several tokens, bytes of one character.
  const std::string rare = "\xF0\x93\x80\x80";
  const Ids ids = tokenizer->encode("a" + rare + "b", false);
  const std::vector<std::string> pieces = pieces_of(*tokenizer, ids, 0);
  ASSERT_EQ(joined(pieces), "a" + rare + "b");
  int empty = 0;
  for (std::size_t i = 0; i + 2 < pieces.size(); ++i) empty += pieces[i].empty() ? 1 : 0;
  EXPECT_GE(empty, 1);

  // Cut off inside, finish() says so; the rest of a text never appears twice.
  const Ids cut(ids.begin(), ids.end() - 2);  // without the b and the character's last byte
  EXPECT_EQ(joined(pieces_of(*tokenizer, cut, 0)), "a" + std::string(kReplacement));
}

INSTANTIATE_TEST_SUITE_P(Tokenizers, Streaming, testing::ValuesIn(kSmallFamilies), family_name);

// Characters taken off at the text's end, which no known model does but the format allows.
constexpr std::string_view kStrips =
    R"({"model": {"type": "BPE", "vocab": {"x": 0, "a": 1, "xx": 2, "xax": 3},
  "merges": []}, "decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"},
  {"type": "Strip", "content": "x", "start": 2, "stop": 3}]}})";

TEST(StreamingStrip, BothEndsAreStrippedAsInTheWholeText) {
  const auto tokenizer = formats::parse_tokenizer_json(kStrips, "tokenizer.json");
  EXPECT_EQ(tokenizer->decode(Ids{2, 1, 2}), "a");
  EXPECT_EQ(tokenizer->decode(Ids{2, 2, 1, 2, 2}), "xxax");
  std::mt19937_64 random(12);
  for (int round = 0; round < 2000; ++round) {
    Ids ids(random() % 8);
    for (std::int32_t& id : ids) id = static_cast<std::int32_t>(random() % 5);  // 4 is unknown
    ASSERT_EQ(joined(pieces_of(*tokenizer, ids, 0)), tokenizer->decode(ids)) << testing::PrintToString(ids);
  }
}

}  // namespace
}  // namespace fireq::test
