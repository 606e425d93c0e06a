// Decoding inverts encoding up to what the pipeline's normalizer changes; text that is not UTF-8 is refused
// with its offset; many threads may share one tokenizer.
#include <thread>

#include "tests/tokenizers/support.hpp"

namespace fireq::test {
namespace {

struct Broken {
  std::string_view bytes;
  std::size_t at;  // of the first ill-formed sequence
};
constexpr auto kBroken = std::to_array<Broken>({
    {"\x80", 0},                      // a continuation byte alone
    {"\xC3(", 0},                     // a lead byte without continuation
    {"\xC0\xAF", 0},                  // overlong slash
    {"\xE0\x80\xAF", 0},              // the same in three bytes
    {"\xF0\x80\x80\xAF", 0},          // and in four
    {"\xED\xA0\x80", 0},              // a high surrogate
    {"\xED\xBF\xBF", 0},              // a low surrogate
    {"\xED\xA0\xBD\xED\xB8\x80", 0},  // an emoji as two surrogates (CESU-8)
    {"\xF4\x90\x80\x80", 0},          // above U+10FFFF
    {"\xF8\x88\x80\x80\x80", 0},      // five bytes
    {"\xFE", 0},
    {"\xFF", 0},
    {"ok\xE2\x82", 2},  // cut off
    {"ok\xF0\x9F\x98", 2},
    {"\xC3\xA9\xE2\x28\xA1", 2},
    {"<|im_start|>\xF0\x9F", 12},
});

// Bytes of UTF-8 that SmolLM2's vocabulary has no token for.
constexpr std::string_view kNotInSmolLm2 = "\x04\x06\x13\x14\x16\x1D\xF1\xF2";

class RoundTrip : public testing::TestWithParam<Family> {};
class AnyInput : public testing::TestWithParam<Family> {};

TEST_P(RoundTrip, DecodingInvertsRandomUnicode) {
  const auto tokenizer = GetParam().open();
  std::mt19937_64 random(1);
  for (int round = 0; round < 400; ++round) {
    const RandomText text = random_text(random, random() % 40);
    SCOPED_TRACE(text.raw);
    const Ids ids = tokenizer->encode(text.raw, false);
    for (const std::int32_t id : ids) ASSERT_LT(static_cast<std::uint64_t>(id), tokenizer->vocab_size());
    ASSERT_EQ(tokenizer->decode(ids, false), expected_decode(GetParam(), text));
    // Stretches hold no special token, so looking for them changes nothing, nor does dropping them.
    ASSERT_EQ(tokenizer->encode(text.raw, true), ids);
    ASSERT_EQ(tokenizer->decode(ids, true), expected_decode(GetParam(), text));
  }
  EXPECT_TRUE(tokenizer->encode("").empty());
  EXPECT_EQ(tokenizer->decode({}), "");
}

// Any code point, one by one: nothing is lost and nothing becomes U+FFFD.
TEST_P(RoundTrip, DecodingInvertsEveryKindOfCodePoint) {
  const auto tokenizer = GetParam().open();
  std::mt19937_64 random(2);
  for (int round = 0; round < 3000; ++round) {
    char32_t c = 0;
    do {
      c = static_cast<char32_t>(random() % (random() % 2 == 0 ? 0x110000U : 0x3000U));
    } while (c >= 0xD800 && c <= 0xDFFF);
    std::string text(1, 'x');
    // Composed by hand, so that this owes nothing to append_utf8().
    const auto tail = [&](unsigned shift) { text += static_cast<char>(0x80U | ((c >> shift) & 0x3FU)); };
    if (c < 0x80) {
      text += static_cast<char>(c);
    } else if (c < 0x800) {
      text += static_cast<char>(0xC0U | (c >> 6U));
      tail(0);
    } else if (c < 0x10000) {
      text += static_cast<char>(0xE0U | (c >> 12U));
      tail(6);
      tail(0);
    } else {
      text += static_cast<char>(0xF0U | (c >> 18U));
      tail(12);
      tail(6);
      tail(0);
    }
    ASSERT_TRUE(is_utf8(text));
    const bool is_smollm2 = std::string_view(GetParam().name) == "smollm2";
    if (is_smollm2 && text.find_first_of(kNotInSmolLm2) != std::string::npos) continue;
    const std::string back = tokenizer->decode(tokenizer->encode(text, false), false);
    if (GetParam().changes == Family::Changes::composes) {
      ASSERT_TRUE(is_utf8(back));  // which one it becomes is for the Unicode tests
      ASSERT_TRUE(c == 0xFFFD || back.find("\xEF\xBF\xBD") == std::string::npos) << text;
    } else if (GetParam().changes == Family::Changes::marks_spaces) {
      ASSERT_EQ(back, replaced(text, "\xE2\x96\x81", " "));
    } else {
      ASSERT_EQ(back, text);
    }
  }
}

TEST_P(AnyInput, TextThatIsNotUtf8IsRefusedWithItsOffset) {
  const auto tokenizer = GetParam().open();
  std::mt19937_64 random(3);
  for (const Broken& broken : kBroken) {
    const std::string before = random_text(random, random() % 5).raw;
    const std::string text = before + std::string(broken.bytes);
    ASSERT_FALSE(is_utf8(text));
    const auto error = error_of([&] { tokenizer->encode(text); });
    ASSERT_TRUE(error) << testing::PrintToString(text);
    EXPECT_EQ(error->kind(), ErrorKind::input);
    EXPECT_EQ(error->offset(), before.size() + broken.at);
    EXPECT_EQ(error->message(), "text is not valid UTF-8");
    EXPECT_FALSE(error->hint().empty());
  }
}

// Ids in any order make bytes in any order; the text is well-formed all the same.
TEST_P(AnyInput, AnyIdsDecodeToUtf8) {
  const auto tokenizer = GetParam().open();
  std::mt19937_64 random(4);
  const std::uint64_t ids_there = tokenizer->vocab_size() + 20;  // some are unknown
  for (int round = 0; round < 500; ++round) {
    Ids ids(random() % 20);
    for (std::int32_t& id : ids) {
      id = static_cast<std::int32_t>(random() % (random() % 2 == 0 ? 300 : ids_there)) - 3;
    }
    ASSERT_TRUE(is_utf8(tokenizer->decode(ids, random() % 2 == 0)));
  }
  const Ids unknown = {-1, std::numeric_limits<std::int32_t>::min(), std::numeric_limits<std::int32_t>::max(),
                       static_cast<std::int32_t>(tokenizer->vocab_size())};
  EXPECT_EQ(tokenizer->decode(unknown, false), "");
}

TEST_P(AnyInput, ThreadsShareOneTokenizer) {
  const auto tokenizer = GetParam().open();
  std::mt19937_64 random(5);
  std::vector<std::string> texts;
  std::vector<Ids> expected;
  for (int i = 0; i < 40; ++i) {
    texts.push_back(random_text(random, 60).raw);
    expected.push_back(tokenizer->encode(texts.back()));
  }
  constexpr std::size_t kThreads = 6;
  std::array<int, kThreads> wrong{};
  wrong.fill(-1);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      int bad = 0;
      for (std::size_t i = 0; i < 2 * texts.size(); ++i) {
        const std::size_t k = (i * (2 * t + 1) + t) % texts.size();
        bad += tokenizer->encode(texts[k]) == expected[k] ? 0 : 1;
        bad += is_utf8(tokenizer->decode(expected[k])) ? 0 : 1;
      }
      wrong[t] = bad;
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int bad : wrong) EXPECT_EQ(bad, 0);
}

// There is no unknown token either, so these bytes vanish, as they do in the tokenizers library.
TEST(RoundTripSmolLm2, BytesWithoutATokenVanish) {
  const auto tokenizer = kFamilies[3].open();
  ASSERT_EQ(std::string(kFamilies[3].name), "smollm2");
  for (const char byte : std::string_view("\x04\x06\x13\x14\x16\x1D")) {
    EXPECT_EQ(tokenizer->decode(tokenizer->encode(std::string("a") + byte + "b")), "ab");
  }
  EXPECT_EQ(tokenizer->encode("\xF1\x80\x80\x81"), tokenizer->encode("\xF2\x80\x80\x81"));
}

INSTANTIATE_TEST_SUITE_P(Tokenizers, AnyInput, testing::ValuesIn(kSmallFamilies), family_name);
INSTANTIATE_TEST_SUITE_P(Tokenizers, RoundTrip, testing::ValuesIn(kFamilies), family_name);

}  // namespace
}  // namespace fireq::test
