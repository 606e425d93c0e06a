// tokenizer.json: added tokens, byte fallback, unknown characters, merges and decoders on small vocabularies
// whose ids can be worked out by hand.
#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "tests/tokenizers/support.hpp"

namespace fireq::test {
namespace {

using nlohmann::json;

std::unique_ptr<formats::Tokenizer> open(const json& document) {
  return formats::parse_tokenizer_json(document.dump(), "tokenizer.json");
}

json vocabulary(const std::vector<std::string>& tokens) {
  json vocab = json::object();
  for (std::size_t i = 0; i < tokens.size(); ++i) vocab[tokens[i]] = i;
  return vocab;
}

json model(const std::vector<std::string>& tokens, const json& merges = json::array()) {
  return {{"model", {{"type", "BPE"}, {"vocab", vocabulary(tokens)}, {"merges", merges}}}};
}

TEST(Bpe, LowestRankMergesFirstAndTheLeftmostOfEquals) {
  const json merges = {"b c", "a b", "ab c", json::array({"c", "c"})};
  const auto t = open(model({"a", "b", "c", "ab", "bc", "abc", "cc"}, merges));
  EXPECT_EQ(t->encode("abc"), (Ids{0, 4}));  // b c has the lower rank
  EXPECT_EQ(t->encode("ab"), (Ids{3}));
  EXPECT_EQ(t->encode("ccc"), (Ids{6, 2}));  // the leftmost pair
  EXPECT_EQ(t->encode("cccc"), (Ids{6, 6}));
  EXPECT_EQ(t->encode("abcc"), (Ids{0, 4, 2}));
  EXPECT_EQ(t->encode("aab"), (Ids{0, 3}));
  EXPECT_EQ(t->token_id("abc"), 5);
  EXPECT_EQ(t->token_id("abcd"), std::nullopt);
  EXPECT_EQ(t->vocab_size(), 7U);
}

// Merges by a loop that looks for the lowest rank each time: the textbook's definition.
Ids merge_by_the_book(const std::string& text, const std::vector<std::pair<std::string, std::string>>& merges,
                      const json& vocab) {
  std::vector<std::string> parts;
  for (const char c : text) parts.emplace_back(1, c);
  for (;;) {
    std::size_t best = merges.size();
    std::size_t where = 0;
    for (std::size_t i = 0; i + 1 < parts.size(); ++i) {
      for (std::size_t rank = 0; rank < best; ++rank) {
        if (merges[rank].first == parts[i] && merges[rank].second == parts[i + 1]) {
          best = rank;
          where = i;
        }
      }
    }
    if (best == merges.size()) break;
    parts[where] += parts[where + 1];
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(where) + 1);
  }
  Ids ids;
  for (const std::string& part : parts) ids.push_back(vocab.at(part).get<std::int32_t>());
  return ids;
}

TEST(Bpe, RandomMergesAreThoseOfTheBook) {
  std::mt19937_64 random(30);
  for (int round = 0; round < 60; ++round) {
    std::vector<std::string> tokens = {"a", "b", "c"};
    std::vector<std::pair<std::string, std::string>> pairs;
    json merges = json::array();
    while (pairs.size() < 1 + random() % 25) {
      const std::string left = tokens[random() % tokens.size()];
      const std::string right = tokens[random() % tokens.size()];
      // One way to make each token, so that ties cannot arise.
      if (std::find(tokens.begin(), tokens.end(), left + right) != tokens.end()) continue;
      tokens.push_back(left + right);
      pairs.emplace_back(left, right);
      merges.push_back(random() % 2 == 0 ? json(left + " " + right) : json::array({left, right}));
    }
    const json document = model(tokens, merges);
    const auto t = open(document);
    for (int i = 0; i < 40; ++i) {
      std::string text(random() % 30, ' ');
      for (char& c : text) c = static_cast<char>('a' + random() % 3);
      ASSERT_EQ(t->encode(text), merge_by_the_book(text, pairs, document["model"]["vocab"])) << text;
    }
  }
}

TEST(Bpe, IgnoreMergesTakesAPieceThatIsATokenWhole) {
  json document = model({"a", "b", "ab", "ba"}, {"a b"});
  EXPECT_EQ(open(document)->encode("ba"), (Ids{1, 0}));
  document["model"]["ignore_merges"] = true;
  EXPECT_EQ(open(document)->encode("ba"), (Ids{3}));
  EXPECT_EQ(open(document)->encode("bab"), (Ids{1, 2}));
}

TEST(Bpe, UnknownCharactersAreDroppedOrBecomeTheUnknownToken) {
  json document = model({"a", "<unk>"});
  EXPECT_EQ(open(document)->encode("axxa"), (Ids{0, 0}));
  document["model"]["unk_token"] = "<unk>";
  EXPECT_EQ(open(document)->encode("axxa"), (Ids{0, 1, 1, 0}));
  document["model"]["fuse_unk"] = true;
  EXPECT_EQ(open(document)->encode("axxa\xC3\xA9"), (Ids{0, 1, 0, 1}));
}

TEST(Bpe, ByteFallbackNeedsATokenForEachByteOfTheCharacter) {
  json document = model({"a", "<unk>", "<0xC3>", "<0xA9>", "<0xE4>"});
  document["model"]["byte_fallback"] = true;
  document["model"]["unk_token"] = "<unk>";
  document["decoder"] = {{"type", "Sequence"},
                         {"decoders", {{{"type", "ByteFallback"}}, {{"type", "Fuse"}}}}};
  const auto t = open(document);
  EXPECT_EQ(t->encode("a\xC3\xA9"), (Ids{0, 2, 3}));
  EXPECT_EQ(t->encode("\xE4\xBD\xA0"), (Ids{1}));  // 0xBD has no token
  EXPECT_EQ(t->decode(Ids{0, 2, 3, 0}),
            "a\xC3\xA9"
            "a");
  EXPECT_EQ(t->decode(Ids{2, 0}),
            "\xEF\xBF\xBD"
            "a");
  // A run of bytes that is not UTF-8 is that many U+FFFD.
  EXPECT_EQ(t->decode(Ids{4, 2, 3}), "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD");
}

json with_added(const json& added, json document = model({"h", "e", "y", " ", "<", "s", ">"})) {
  document["added_tokens"] = added;
  return document;
}

TEST(AddedTokens, SpecialOnesAreFoundOnlyWhenAskedFor) {
  const auto t = open(with_added({{{"id", 9}, {"content", "<s>"}, {"special", true}}}));
  EXPECT_EQ(t->encode("hey<s>hey", true), (Ids{0, 1, 2, 9, 0, 1, 2}));
  EXPECT_EQ(t->encode("<s>", false), (Ids{4, 5, 6}));
  EXPECT_EQ(t->vocab_size(), 10U);
  EXPECT_EQ(t->token_id("<s>"), 9);
  EXPECT_EQ(t->decode(Ids{9, 0}, true), "h");
  EXPECT_EQ(t->decode(Ids{9, 0}, false), "<s> h");  // without a decoder, tokens with a space between
  EXPECT_EQ(t->decode(Ids{7, 8, 0}, false), "h");   // ids that name nothing
}

TEST(AddedTokens, OrdinaryOnesAreFoundAndShownAlways) {
  const auto t = open(with_added({{{"id", 9}, {"content", "<s>"}, {"special", false}}}));
  EXPECT_EQ(t->encode("<s>h", false), (Ids{9, 0}));
  EXPECT_EQ(t->decode(Ids{9}, true), "<s>");
}

TEST(AddedTokens, TheLongestAtTheLeftmostPlaceWins) {
  const auto t = open(with_added({{{"id", 9}, {"content", "he"}},
                                  {{"id", 10}, {"content", "hey"}},
                                  {{"id", 11}, {"content", "ey "}},
                                  {{"id", 2}, {"content", "y"}}}));
  EXPECT_EQ(t->encode("hey "), (Ids{10, 3}));
  EXPECT_EQ(t->encode("he"), (Ids{9}));
  EXPECT_EQ(t->encode("eey h"), (Ids{1, 11, 0}));
  EXPECT_EQ(t->encode("yhy"), (Ids{2, 0, 2}));
}

TEST(AddedTokens, StripTakesTheWhiteSpaceAlong) {
  const json plain = {{"id", 9}, {"content", "<s>"}};
  const auto encode = [&](bool left, bool right, const std::string& text) {
    json token = plain;
    token["lstrip"] = left;
    token["rstrip"] = right;
    return open(with_added(json::array({token})))->encode(text);
  };
  EXPECT_EQ(encode(false, false, "h <s> e"), (Ids{0, 3, 9, 3, 1}));
  EXPECT_EQ(encode(true, false, "h \n\xE3\x80\x80<s> e"), (Ids{0, 9, 3, 1}));
  EXPECT_EQ(encode(false, true,
                   "h <s> \n\xE3\x80\x80"
                   "e"),
            (Ids{0, 3, 9, 1}));
  EXPECT_EQ(encode(true, true, " <s> <s> "), (Ids{9, 9}));
}

TEST(AddedTokens, SingleWordsStandBetweenOtherCharacters) {
  const auto t = open(with_added({{{"id", 9}, {"content", "hey"}, {"single_word", true}}}));
  EXPECT_EQ(t->encode("hey"), (Ids{9}));
  EXPECT_EQ(t->encode("heyhey"), (Ids{0, 1, 2, 0, 1, 2}));
  EXPECT_EQ(t->encode("hey hey<"), (Ids{9, 3, 9, 4}));
  EXPECT_EQ(t->encode("hey\xCC\x81"), (Ids{0, 1, 2}));  // a mark belongs to the word
}

TEST(AddedTokens, NormalizedOnesAreLookedForInNormalisedText) {
  json document = with_added({{{"id", 9}, {"content", "HEY"}, {"normalized", true}},
                              {{"id", 10}, {"content", "YES"}, {"normalized", false}}});
  document["normalizer"] = {{"type", "Lowercase"}};
  const auto t = open(document);
  EXPECT_EQ(t->encode("Hey"), (Ids{9}));
  EXPECT_EQ(t->encode("hey"), (Ids{9}));
  EXPECT_EQ(t->encode("YES"), (Ids{10}));
  EXPECT_EQ(t->encode("Yes"), (Ids{2, 1, 5}));  // lower case letters, one by one
}

TEST(Decoders, DoWhatTheirNamesSay) {
  const auto decode = [](const json& decoder, const std::vector<std::string>& tokens) {
    json document = model(tokens);
    document["decoder"] = decoder;
    Ids ids(tokens.size());
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int32_t>(i);
    return open(document)->decode(ids);
  };
  const std::string mark = "\xE2\x96\x81";
  EXPECT_EQ(decode(nullptr, {"a", "b"}), "a b");
  EXPECT_EQ(decode({{"type", "Fuse"}}, {"a", "b"}), "ab");
  EXPECT_EQ(decode({{"type", "Replace"}, {"pattern", {{"Regex", "[0-9]"}}}, {"content", "#"}}, {"a1", "22"}),
            "a###");
  EXPECT_EQ(decode({{"type", "Strip"}, {"content", "_"}, {"start", 1}, {"stop", 2}}, {"__a___", "_"}), "_a_");
  EXPECT_EQ(decode({{"type", "Metaspace"}, {"replacement", mark}, {"prepend_scheme", "always"}},
                   {mark + "a", mark + "b"}),
            "a b");
  EXPECT_EQ(decode({{"type", "Metaspace"}, {"replacement", mark}, {"prepend_scheme", "never"}}, {mark + "a"}),
            " a");
  EXPECT_EQ(decode({{"type", "ByteLevel"}}, {"\xC4\xA0"
                                             "a",
                                             "\xC3\x83", "\xC2\xA9", "\xE4\xBD\xA0"}),
            " a\xC3\xA9\xE4\xBD\xA0");  // a token outside of the alphabet stays what it is
}

TEST(Regexes, OnigurumasMeaningIsKept) {
  const auto pieces = [](const std::string& pattern, const std::string& text) {
    // Matches become "<unk>" one by one: the pieces' count is the number of ids.
    json document = model({"<unk>"});
    document["model"]["unk_token"] = "<unk>";
    document["model"]["fuse_unk"] = true;
    document["pre_tokenizer"] = {
        {"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Removed"}, {"invert", true}};
    return open(document)->encode(text).size();
  };
  EXPECT_EQ(pieces("^a", "a\na"), 2U);        // ^ is after every line break
  EXPECT_EQ(pieces(".", "a\n\xC3\xA9"), 2U);  // . is any character but the line break
  EXPECT_EQ(pieces("\\w", "_\xC2\xB2\xE0\xA4\xBE-"), 3U);
  EXPECT_EQ(pieces("\\s", "\xE1\xA0\x8E\xC2\xA0"), 1U);  // not U+180E, which left that property long ago
  EXPECT_EQ(pieces("(?i:k)", "Kk\xE2\x84\xAA"), 3U);     // the Kelvin sign
  EXPECT_EQ(pieces("\\p{^L}", "a1 "), 2U);
  EXPECT_EQ(pieces("a{,2}b", "aab"), 1U);
  EXPECT_EQ(pieces("\\x{41}|\\u0042", "ABC"), 2U);
}

}  // namespace
}  // namespace fireq::test
