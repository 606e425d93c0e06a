// The stations of a pipeline one by one. Expectations are those of the tokenizers library, version 0.23.
#include <nlohmann/json.hpp>

#include "formats/tokenizer_parts.hpp"
#include "tests/tokenizers/support.hpp"

namespace fireq::test {
namespace {

using formats::JsonFields;
using nlohmann::json;

struct NormalizerCase {
  const char* name;
  const char* json;
  std::string_view text, expected;
};
constexpr auto kNormalizers = std::to_array<NormalizerCase>({
    {"Prepend", R"({"type": "Prepend", "prepend": "_"})", "ab", "_ab"},
    {"PrependToNothing", R"({"type": "Prepend", "prepend": "_"})", "", ""},
    {"ReplaceString", R"({"type": "Replace", "pattern": {"String": "aa"}, "content": "-"})", "aaaab", "--b"},
    {"ReplaceRegex", R"({"type": "Replace", "pattern": {"Regex": "[0-9]+"}, "content": "\\1$0"})", "a12b345",
     "a\\1$0b\\1$0"},
    {"ReplaceRegexEmptyMatches", R"({"type": "Replace", "pattern": {"Regex": "x*"}, "content": "-"})", "axb",
     "-a-b-"},
    {"Lowercase", R"({"type": "Lowercase"})", "A\xC3\x89\xC4\xB0\xE1\xBA\x9E\xCE\xA3",
     "a\xC3\xA9i\xCC\x87\xC3\x9F\xCF\x83"},
    {"StripBoth", R"({"type": "Strip", "strip_left": true, "strip_right": true})",
     "\xE3\x80\x80 \x09 a b \x0A\xC2\xA0", "a b"},
    {"StripLeft", R"({"type": "Strip", "strip_left": true, "strip_right": false})", "  a  ", "a  "},
    {"StripRight", R"({"type": "Strip", "strip_left": false, "strip_right": true})", "  a  ", "  a"},
    {"NFC", R"({"type": "NFC"})", "e\xCC\x81\xEF\xAC\x81", "\xC3\xA9\xEF\xAC\x81"},
    {"NFD", R"({"type": "NFD"})", "\xC3\xA9\xEF\xAC\x81\xED\x95\x9C",
     "e\xCC\x81\xEF\xAC\x81\xE1\x84\x92\xE1\x85\xA1\xE1\x86\xAB"},
    {"NFKC", R"({"type": "NFKC"})", "e\xCC\x81\xEF\xAC\x81\xE2\x91\xA0\xEF\xBC\xA1",
     "\xC3\xA9"
     "fi1A"},
    {"NFKD", R"({"type": "NFKD"})", "\xC3\xA9\xEF\xAC\x81\xE2\x91\xA0",
     "e\xCC\x81"
     "fi1"},
    {"StripAccents", R"({"type": "StripAccents"})", "e\xCC\x81n\xC3\xA7", "en\xC3\xA7"},
    {"Sequence",
     R"({"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}, {"type": "Lowercase"}]})",
     "\xC3\x89\xC3\x87", "ec"},
});

TEST(NormalizerSteps, MeanWhatTheTokenizersLibraryMeans) {
  for (const NormalizerCase& c : kNormalizers) {
    const json document = json::parse(c.json);
    EXPECT_EQ(formats::Normalizer(JsonFields(document, "t")).run(c.text), c.expected) << c.name;
  }
}

struct PreTokenizerCase {
  const char* name;
  const char* json;
  std::string text;
  std::vector<std::string> pieces;
};
const std::vector<PreTokenizerCase>& pre_tokenizer_cases() {
  static const std::vector<PreTokenizerCase> cases = {
      {"SplitStringRemoved",
       R"({"type": "Split", "pattern": {"String": "-"}, "behavior": "Removed", "invert": false})",
       "-ab--c-",
       {"ab", "c"}},
      {"SplitStringIsolated",
       R"({"type": "Split", "pattern": {"String": "-"}, "behavior": "Isolated", "invert": false})",
       "-ab--c-",
       {"-", "ab", "-", "-", "c", "-"}},
      {"SplitStringMergedWithPrevious",
       R"({"type": "Split", "pattern": {"String": "-"}, "behavior": "MergedWithPrevious", "invert": false})",
       "-ab--c-",
       {"-", "ab-", "-", "c-"}},
      {"SplitStringMergedWithNext",
       R"({"type": "Split", "pattern": {"String": "-"}, "behavior": "MergedWithNext", "invert": false})",
       "-ab--c-",
       {"-ab", "-", "-c", "-"}},
      {"SplitStringContiguous",
       R"({"type": "Split", "pattern": {"String": "-"}, "behavior": "Contiguous", "invert": false})",
       "-ab--c-",
       {"-", "ab", "--", "c", "-"}},
      {"SplitRegexRemoved",
       R"({"type": "Split", "pattern": {"Regex": "[0-9]+"}, "behavior": "Removed", "invert": false})",
       "12ab34c5",
       {"ab", "c"}},
      {"SplitRegexIsolated",
       R"({"type": "Split", "pattern": {"Regex": "[0-9]+"}, "behavior": "Isolated", "invert": false})",
       "12ab34c5",
       {"12", "ab", "34", "c", "5"}},
      {"SplitRegexMergedWithPrevious",
       R"({"type": "Split", "pattern": {"Regex": "[0-9]+"}, "behavior": "MergedWithPrevious", "invert": false})",
       "12ab34c5",
       {"12", "ab34", "c5"}},
      {"SplitRegexMergedWithNext",
       R"({"type": "Split", "pattern": {"Regex": "[0-9]+"}, "behavior": "MergedWithNext", "invert": false})",
       "12ab34c5",
       {"12ab", "34c", "5"}},
      {"SplitRegexContiguous",
       R"({"type": "Split", "pattern": {"Regex": "[0-9]+"}, "behavior": "Contiguous", "invert": false})",
       "12ab34c5",
       {"12", "ab", "34", "c", "5"}},
      {"SplitInvertedRemoved",
       R"({"type": "Split", "pattern": {"Regex": "[0-9]+"}, "behavior": "Removed", "invert": true})",
       "ab34c5 6",
       {"34", "5", "6"}},
      {"SplitInvertedIsolated",
       R"({"type": "Split", "pattern": {"Regex": "[0-9]+"}, "behavior": "Isolated", "invert": true})",
       "ab34c5 6",
       {"ab", "34", "c", "5", " ", "6"}},
      {"SplitInvertedMergedWithPrevious",
       R"({"type": "Split", "pattern": {"Regex": "[0-9]+"}, "behavior": "MergedWithPrevious", "invert": true})",
       "ab34c5 6",
       {"ab", "34c", "5 ", "6"}},
      {"SplitInvertedMergedWithNext",
       R"({"type": "Split", "pattern": {"Regex": "[0-9]+"}, "behavior": "MergedWithNext", "invert": true})",
       "ab34c5 6",
       {"ab34", "c5", " 6"}},
      {"SplitInvertedContiguous",
       R"({"type": "Split", "pattern": {"Regex": "[0-9]+"}, "behavior": "Contiguous", "invert": true})",
       "ab34c5 6",
       {"ab", "34", "c", "5", " ", "6"}},
      {"Digits",
       R"({"type": "Digits", "individual_digits": false})",
       "a123b\xD9\xA3\xC2\xBD"
       "4",
       {"a", "123", "b",
        "\xD9\xA3\xC2\xBD"
        "4"}},
      {"DigitsOneByOne",
       R"({"type": "Digits", "individual_digits": true})",
       "a123b\xD9\xA3\xC2\xBD"
       "4",
       {"a", "1", "2", "3", "b", "\xD9\xA3", "\xC2\xBD", "4"}},
      {"Punctuation",
       R"({"type": "Punctuation", "behavior": "Isolated"})",
       "hey, $you!? \xC2\xAB"
       "a\xC2\xBB \xC2\xA1_",
       {"hey", ",", " ", "$", "you", "!", "?", " ", "\xC2\xAB", "a", "\xC2\xBB", " ", "\xC2\xA1", "_"}},
      {"PunctuationRemoved",
       R"({"type": "Punctuation", "behavior": "Removed"})",
       "hey,you!?",
       {"hey", "you"}},
      {"PunctuationContiguous",
       R"({"type": "Punctuation", "behavior": "Contiguous"})",
       "hey,you!?a",
       {"hey", ",", "you", "!?", "a"}},
      {"Whitespace",
       R"({"type": "Whitespace"})",
       "hey you!! it's 3.5\xC2\xA0\xC3\xA9\xCC\x81+",
       {"hey", "you", "!!", "it", "'", "s", "3", ".", "5", "\xC3\xA9\xCC\x81", "+"}},
      {"WhitespaceSplit",
       R"({"type": "WhitespaceSplit"})",
       "hey you!!\xE3\x80\x80it's\x0A 3.5",
       {"hey", "you!!", "it's", "3.5"}},
      {"MetaspaceAlways",
       R"({"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": true})",
       "hey  you ",
       {"\xE2\x96\x81hey", "\xE2\x96\x81", "\xE2\x96\x81you", "\xE2\x96\x81"}},
      {"MetaspaceNever",
       R"({"type": "Metaspace", "replacement": "_", "prepend_scheme": "never", "split": true})",
       "hey you",
       {"hey", "_you"}},
      {"MetaspaceUnsplit",
       R"({"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": false})",
       "hey you",
       {"\xE2\x96\x81hey\xE2\x96\x81you"}},
      {"MetaspaceMarked",
       R"({"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": true})",
       " hey",
       {"\xE2\x96\x81hey"}},
      {"ByteLevel",
       R"({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true})",
       "I'll  go, \xC3\xA9\x0D\x0A 12 x",
       {"I", "'ll", "\xC4\xA0", "\xC4\xA0go", ",", "\xC4\xA0\xC3\x83\xC2\xA9", "\xC4\x8D\xC4\x8A",
        "\xC4\xA0"
        "12",
        "\xC4\xA0x"}},
      {"ByteLevelPrefix",
       R"({"type": "ByteLevel", "add_prefix_space": true, "use_regex": true})",
       "a b",
       {"\xC4\xA0"
        "a",
        "\xC4\xA0"
        "b"}},
      {"ByteLevelPrefixThere",
       R"({"type": "ByteLevel", "add_prefix_space": true, "use_regex": true})",
       " a b",
       {"\xC4\xA0"
        "a",
        "\xC4\xA0"
        "b"}},
      {"ByteLevelWhole",
       R"({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false})",
       "a b",
       {"a\xC4\xA0"
        "b"}},
      {"SequenceOfThree",
       R"({"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "Punctuation", "behavior": "Isolated"}, {"type": "Digits", "individual_digits": true}]})",
       "a1, b22",
       {"a", "1", ",", "b", "2", "2"}},
  };
  return cases;
}

std::vector<std::string> pieces_of(const json& document, const std::string& text, bool first = true) {
  const formats::PreTokenizer steps{JsonFields(document, "t")};
  formats::PreTokenizer::Texts texts;
  std::vector<formats::Piece> pieces = {{text, first}};
  steps.run(pieces, texts);
  std::vector<std::string> out;
  for (const formats::Piece& piece : pieces)
    out.push_back(steps.byte_level() ? formats::byte_level_text(piece.text) : std::string(piece.text));
  return out;
}

TEST(PreTokenizerSteps, CutWhereTheTokenizersLibraryCuts) {
  for (const PreTokenizerCase& c : pre_tokenizer_cases())
    EXPECT_EQ(pieces_of(json::parse(c.json), c.text), c.pieces) << c.name;
}

TEST(PreTokenizerSteps, MetaspaceFirstMarksOnlyTheTextsBeginning) {
  const json first = {{"type", "Metaspace"}, {"replacement", "_"}, {"prepend_scheme", "first"}};
  EXPECT_EQ(pieces_of(first, "a b", true), (std::vector<std::string>{"_a", "_b"}));
  EXPECT_EQ(pieces_of(first, "a b", false), (std::vector<std::string>{"a", "_b"}));
}

TEST(ByteAlphabet, IsThatOfGpt2AndGoesBothWays) {
  std::string all(256, '\0');
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<char>(static_cast<unsigned char>(i));
  const std::string text = formats::byte_level_text(all);
  EXPECT_TRUE(is_utf8(text));
  EXPECT_EQ(formats::byte_level_bytes(text), all);
  EXPECT_EQ(formats::byte_level_text(" \n\t\x7F\xA0\xAD"),
            "\xC4\xA0\xC4\x8A\xC4\x89\xC4\xA1\xC5\x82\xC5\x83");
  EXPECT_EQ(formats::byte_level_bytes("a b"), std::nullopt);           // a space is not of the alphabet
  EXPECT_EQ(formats::byte_level_bytes("\xE4\xBD\xA0"), std::nullopt);  // nor is anything above U+0143
  EXPECT_EQ(formats::byte_level_bytes("a\xFF"), std::nullopt);
}

}  // namespace
}  // namespace fireq::test
