// A megabyte of anything takes seconds. An encoder that is quadratic in the length of a piece would take many
// minutes, so the limit in processor time can be generous.
#include <ctime>
#include <nlohmann/json.hpp>

#include "formats/unicode.hpp"
#include "tests/tokenizers/support.hpp"

namespace fireq::test {
namespace {

constexpr std::size_t kMegabyte = 1'000'000;
constexpr double kMostSeconds = 30;

std::string repeated(std::string_view unit, std::size_t size) {
  std::string text;
  while (text.size() < size) text += unit;
  return text;
}

template <typename Call>
double seconds(Call&& call) {
  const std::clock_t begin = std::clock();
  call();
  return static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
}

void expect_quick(const formats::Tokenizer& tokenizer, const std::string& text, const std::string& what) {
  Ids ids;
  EXPECT_LT(seconds([&] { ids = tokenizer.encode(text, false); }), kMostSeconds) << what;
  std::string back;
  EXPECT_LT(seconds([&] { back = tokenizer.decode(ids, false); }), kMostSeconds) << what;
  EXPECT_TRUE(back == text) << what;
}

// Llama 3 cuts up a text as Qwen 2.5 does.
constexpr std::array<Family, 5> kKinds = {kFamilies[0], kFamilies[2], kFamilies[3], kFamilies[4],
                                          kFamilies[5]};

class LongText : public testing::TestWithParam<Family> {};

TEST_P(LongText, OneCharacterAMillionTimes) {
  const auto tokenizer = GetParam().open();
  for (const std::string_view unit : {"a", " ", "\n"}) {
    expect_quick(*tokenizer, repeated(unit, kMegabyte), testing::PrintToString(unit));
  }
  for (const std::string_view unit : {"7", "!", "'", "\r\n", "\xE4\xBD\xA0", "\xF0\x9F\x98\x80", " \n"}) {
    expect_quick(*tokenizer, repeated(unit, kMegabyte / 5), testing::PrintToString(unit));
  }
}

TEST_P(LongText, AMegabyteWithoutSpaces) {
  const auto tokenizer = GetParam().open();
  std::mt19937_64 random(60);
  std::string letters(kMegabyte, '\0');
  for (char& c : letters) c = static_cast<char>('a' + random() % 26);
  expect_quick(*tokenizer, letters, "letters");
  for (char& c : letters) c = static_cast<char>('!' + random() % 94);
  expect_quick(*tokenizer, letters, "printable characters");
}

INSTANTIATE_TEST_SUITE_P(Tokenizers, LongText, testing::ValuesIn(kKinds), family_name);

// Marks of two classes in the wrong order: half of them have to pass the other half.
TEST(LongMarks, AreOrderedQuickly) {
  const std::size_t count = kMegabyte / 4;
  const std::string acute = repeated("\xCC\x81", 2 * count);  // class 230
  const std::string below = repeated("\xCC\xA3", 2 * count);  // class 220
  for (const auto form : {formats::NormalForm::nfc, formats::NormalForm::nfd}) {
    std::string out;
    EXPECT_LT(seconds([&] { out = formats::normal_form("q" + acute + below, form); }), kMostSeconds);
    EXPECT_TRUE(out == "q" + below + acute);
  }
  const auto qwen = kFamilies[2].open();
  ASSERT_EQ(std::string(kFamilies[2].name), "qwen2_5");
  EXPECT_LT(seconds([&] { qwen->encode(acute + below); }), kMostSeconds);
}

// Added tokens of the largest length that nearly match everywhere.
TEST(LongText, NearlyMatchingAddedTokens) {
  const nlohmann::json document = {{"model", {{"vocab", {{"a", 0}}}, {"merges", nlohmann::json::array()}}},
                                   {"added_tokens", {{{"id", 1}, {"content", std::string(511, 'a') + "b"}}}}};
  const auto tokenizer = formats::parse_tokenizer_json(document.dump(), "tokenizer.json");
  const std::string text(kMegabyte / 10, 'a');
  Ids ids;
  EXPECT_LT(seconds([&] { ids = tokenizer->encode(text); }), kMostSeconds);
  EXPECT_EQ(ids.size(), text.size());
}

// A merge for every power of two: each character is merged many times.
TEST(LongText, DeepMerges) {
  nlohmann::json vocab = {{"a", 0}};
  nlohmann::json merges = nlohmann::json::array();
  std::string token = "a";
  for (int i = 1; i < 16; ++i) {
    merges.push_back(token + " " + token);
    token += token;
    vocab[token] = i;
  }
  const nlohmann::json document = {{"model", {{"vocab", vocab}, {"merges", merges}}}};
  const auto tokenizer = formats::parse_tokenizer_json(document.dump(), "tokenizer.json");
  Ids ids;
  EXPECT_LT(seconds([&] { ids = tokenizer->encode(std::string(std::size_t{1} << 20U, 'a')); }), kMostSeconds);
  EXPECT_EQ(ids, Ids(32, 15));
}

}  // namespace
}  // namespace fireq::test
