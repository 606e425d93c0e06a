// Ids against other programs: 46 strings of llama.cpp's vocabulary tests for each family, and the ids of long
// texts from Hugging Face transformers, of which golden.json keeps the digest.
#include <array>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/tokenizers/support.hpp"

namespace fireq::test {
namespace {

std::vector<std::string> golden_texts(const std::string& path) {
  const std::string all = read_bytes(path);
  constexpr std::string_view kEnd = "\n__ggml_vocab_test__\n";
  std::vector<std::string> texts;
  std::size_t at = 0;
  for (std::size_t end = all.find(kEnd); end != std::string::npos; end = all.find(kEnd, at)) {
    texts.push_back(all.substr(at, end - at));
    at = end + kEnd.size();
  }
  return texts;
}

std::vector<Ids> golden_ids(const std::string& path) {
  std::ifstream in(path);
  std::vector<Ids> lists;
  for (std::string line; std::getline(in, line);) {
    std::istringstream numbers(line);
    Ids& ids = lists.emplace_back();
    for (std::int32_t id = 0; numbers >> id;) ids.push_back(id);
  }
  return lists;
}

class Golden : public testing::TestWithParam<Family> {};

TEST_P(Golden, All46StringsGiveTheIdsOfLlamaCpp) {
  const auto tokenizer = GetParam().open();
  const auto texts = golden_texts(GetParam().beside("golden.inp"));
  const auto ids = golden_ids(GetParam().beside("golden.out"));
  ASSERT_EQ(texts.size(), 46U);
  ASSERT_EQ(ids.size(), 46U);
  for (std::size_t i = 0; i < texts.size(); ++i) {
    SCOPED_TRACE("string " + std::to_string(i) + ": " + texts[i]);
    EXPECT_EQ(tokenizer->encode(texts[i]), ids[i]);
    EXPECT_EQ(tokenizer->encode(texts[i], false), ids[i]);  // none holds a special token
    EXPECT_EQ(tokenizer->decode(ids[i]), texts[i]);
  }
}

INSTANTIATE_TEST_SUITE_P(Tokenizers, Golden, testing::ValuesIn(kFamilies), family_name);

// The digest by another program: coreutils.
std::string sha256(const std::string& path) {
  const std::string command = "sha256sum '" + path + "'";
  FILE* pipe = ::popen(command.c_str(), "r");
  if (pipe == nullptr) throw std::runtime_error("cannot run sha256sum");
  std::array<char, 65> digits{};
  const std::size_t got = std::fread(digits.data(), 1, 64, pipe);
  ::pclose(pipe);
  return {digits.data(), got};
}

std::string first_code_points(const std::string& text, std::size_t count) {
  std::size_t at = 0;
  for (; at < text.size(); ++at) {
    const bool starts = (static_cast<unsigned char>(text[at]) & 0xC0U) != 0x80U;
    if (starts && count-- == 0) break;
  }
  return text.substr(0, at);
}

void expect_golden_ids(const formats::Tokenizer& tokenizer, const nlohmann::json& entry) {
  SCOPED_TRACE(entry.at("name").get<std::string>());
  const std::string text =
      first_code_points(read_bytes(FIREQ_TEST_DATA "/text/" + entry.at("text").get<std::string>()),
                        entry.at("chars").get<std::size_t>());
  const bool head = entry.at("bos") == "head";
  EXPECT_EQ(tokenizer.default_bos, head ? formats::BosMode::head : formats::BosMode::none);
  Ids ids = tokenizer.encode(text);
  if (head) ids.insert(ids.begin(), tokenizer.bos_id.value());
  ASSERT_EQ(ids.size(), entry.at("tokens").get<std::size_t>());
  const Ids first = entry.at("first_ids").get<Ids>();
  ASSERT_GE(ids.size(), first.size());
  EXPECT_EQ(Ids(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(first.size())), first);

  const TempFolder folder;
  write_bytes(folder / "ids",
              {reinterpret_cast<const char*>(ids.data()), ids.size() * sizeof(Ids::value_type)});
  EXPECT_EQ(sha256(folder / "ids"), entry.at("ids_sha256").get<std::string>());
}

nlohmann::json golden_json() {
  return nlohmann::json::parse(read_bytes(FIREQ_TEST_DATA "/golden/golden.json"));
}

TEST(GoldenTexts, IdsOfTheTrackedModelsHaveTheKnownDigest) {
  int checked = 0;
  for (const auto& entry : golden_json()) {
    const auto model = entry.at("model").get<std::string>();
    if (!model.starts_with("stories")) continue;
    expect_golden_ids(*formats::open_tokenizer(FIREQ_TEST_DATA "/models/" + model), entry);
    ++checked;
  }
  EXPECT_EQ(checked, 4);
}

// The tracked tokenizer is that of the model, so this needs no checkpoint.
TEST(GoldenTexts, IdsOfWikitextWithSmolLm2HaveTheKnownDigest) {
  int checked = 0;
  for (const auto& entry : golden_json()) {
    if (entry.at("model") != "smollm2-135m-instruct") continue;
    expect_golden_ids(*formats::open_tokenizer(FIREQ_TEST_DATA "/tokenizers/smollm2"), entry);
    ++checked;
  }
  EXPECT_EQ(checked, 1);
}

// Both files of one vocabulary are read by different code: ours and libsentencepiece.
TEST(GoldenTexts, Llama2FromJsonAndFromSentencePieceAgree) {
  const auto json = formats::parse_tokenizer_json(
      read_bytes(FIREQ_TEST_DATA "/tokenizers/llama2/tokenizer.json"), "tokenizer.json");
  const auto model = formats::parse_tokenizer_model(
      read_bytes(FIREQ_TEST_DATA "/tokenizers/llama2/tokenizer.model"), "tokenizer.model");
  EXPECT_EQ(json->vocab_size(), 32000U);
  EXPECT_EQ(model->vocab_size(), 32000U);
  const std::string wiki = first_code_points(read_bytes(FIREQ_TEST_DATA "/text/wiki.test.raw"), 100'000);
  EXPECT_EQ(json->encode(wiki), model->encode(wiki));
  std::mt19937_64 random(20);
  for (int round = 0; round < 300; ++round) {
    const std::string text = random_text(random, random() % 30).raw;
    const Ids ids = json->encode(text);
    ASSERT_EQ(ids, model->encode(text)) << text;
    ASSERT_EQ(json->decode(ids), model->decode(ids)) << text;
  }
}

}  // namespace
}  // namespace fireq::test
