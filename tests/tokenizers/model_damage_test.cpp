// tokenizer.model written field by field: what the format allows, and each way to damage it as one Error with
// the offset. libsentencepiece itself must never meet the damaged tables.
#include <cstring>
#include <limits>

#include "tests/tokenizers/support.hpp"

namespace fireq::test {
namespace {

std::string varint(std::uint64_t value) {
  std::string out;
  for (; value >= 0x80; value >>= 7U) out += static_cast<char>(0x80U | (value & 0x7FU));
  out += static_cast<char>(value);
  return out;
}
std::string number(unsigned field, std::uint64_t value) {
  return varint(field << 3U) + varint(value);
}
std::string bytes(unsigned field, const std::string& content) {
  return varint((field << 3U) | 2U) + varint(content.size()) + content;
}
std::string real(unsigned field, float value) {
  std::string out = varint((field << 3U) | 5U);
  out.resize(out.size() + 4);
  std::memcpy(out.data() + out.size() - 4, &value, 4);
  return out;
}

enum Type : std::uint8_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kByte = 6 };
std::string piece(const std::string& text, float score, Type type = kNormal) {
  return bytes(1, bytes(1, text) + real(2, score) + number(3, type));
}
const std::string kMark = "\xE2\x96\x81";
std::string standard_pieces() {
  return piece("<unk>", 0, kUnknown) + piece("<s>", 0, kControl) + piece("</s>", 0, kControl) +
         piece("ab", -1) + piece(kMark + "a", -2) + piece(kMark, -3) + piece("a", -4) + piece("b", -5);
}
std::string trainer(std::uint64_t model_type) {
  return bytes(2, number(3, model_type));
}
std::string normalizer(const std::string& charsmap = "", bool prefix = true, bool squeeze = false) {
  return bytes(3, bytes(1, "identity") + bytes(2, charsmap) + number(3, prefix ? 1 : 0) +
                      number(4, squeeze ? 1 : 0) + number(5, 1));
}
std::string sound() {
  return standard_pieces() + trainer(2) + normalizer();
}

std::unique_ptr<formats::Tokenizer> open(const std::string& model) {
  return formats::parse_tokenizer_model(model, "dir/tokenizer.model");
}

TEST(SentencePiece, BpeMergesByScore) {
  const auto t = open(sound());
  EXPECT_EQ(t->vocab_size(), 8U);
  EXPECT_EQ(t->encode("ab"), (Ids{5, 3}));  // the mark, then "ab", which scores best
  EXPECT_EQ(t->encode("a b"), (Ids{4, 5, 7}));
  EXPECT_EQ(t->encode("aab"), (Ids{4, 3}));
  EXPECT_EQ(t->decode(Ids{4, 5, 7}), "a b");
  EXPECT_EQ(t->decode(Ids{1, 4, 2}, false), "<s> a</s>");
  EXPECT_EQ(t->decode(Ids{1, 4, 2}, true), "a");
  EXPECT_EQ(t->bos_id, 1);
  EXPECT_EQ(t->eos_id, 2);
  EXPECT_EQ(t->token_id("ab"), 3);
  EXPECT_EQ(t->token_id("abc"), std::nullopt);
}

TEST(SentencePiece, WithoutADummyPrefixNothingIsStripped) {
  const auto t = open(standard_pieces() + trainer(2) + normalizer("", false));
  EXPECT_EQ(t->encode("ab"), (Ids{3}));
  EXPECT_EQ(t->decode(t->encode(" ab")), " ab");
}

TEST(SentencePiece, SpecialTokensAreFoundOnlyWhenAskedFor) {
  const auto t = open(sound());
  const Ids ids = t->encode("ab</s>", true);
  EXPECT_EQ(ids, (Ids{5, 3, 2}));
  for (const std::int32_t id : t->encode("ab</s>", false)) EXPECT_NE(id, 2);
  // A text after a special token begins anew, with its own mark.
  EXPECT_EQ(t->encode("<s>ab<s>ab"), (Ids{1, 5, 3, 1, 5, 3}));
}

TEST(SentencePiece, BytePiecesStandForUnknownCharacters) {
  std::string model = standard_pieces();
  for (unsigned b = 0; b < 256; ++b) {
    constexpr std::string_view kDigits = "0123456789ABCDEF";
    model += piece(std::string("<0x") + kDigits[b >> 4U] + kDigits[b & 15U] + ">", 0, kByte);
  }
  const auto t = open(model + bytes(2, number(3, 2) + number(35, 1)) + normalizer());
  EXPECT_EQ(t->encode("a\xC3\xA9"), (Ids{4, 8 + 0xC3, 8 + 0xA9}));
  EXPECT_EQ(t->decode(t->encode("a \xF0\x9F\xA6\x99 b")), "a \xF0\x9F\xA6\x99 b");
  EXPECT_EQ(t->decode(Ids{4, 8 + 0xC3}), "a\xEF\xBF\xBD");
}

TEST(SentencePiece, UnigramModelsWork) {
  const auto t = open(standard_pieces() + trainer(1) + normalizer());
  EXPECT_EQ(t->decode(t->encode("ab ba")), "ab ba");
  EXPECT_EQ(t->encode("ab"), (Ids{5, 3}));  // -3 - 1 beats -2 - 5
}

std::string word(std::uint32_t value) {
  std::string out(4, '\0');
  for (unsigned i = 0; i < 4; ++i) out[i] = static_cast<char>(value >> (8 * i) & 0xFFU);
  return out;
}

struct Damage {
  const char* name;
  std::string model;
  const char* message;
};

std::vector<Damage> damages() {
  const std::string rest = trainer(2) + normalizer();
  const std::string pieces = standard_pieces();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<Damage> list = {
      {"nothing", "", "holds no pieces"},
      {"no pieces", rest, "holds no pieces"},
      {"text", "this is no protobuf", "SentencePiece model"},
      {"piece twice", pieces + piece("ab", -1) + rest, "holds the piece 'ab' twice"},
      {"empty piece", pieces + piece("", -1) + rest, "holds an empty piece"},
      {"long piece", pieces + piece(std::string(4097, 'x'), -1) + rest, "a piece that is too long"},
      {"piece with NUL", pieces + piece(std::string("x\0y", 3), -1) + rest, "is not UTF-8 text"},
      {"piece not UTF-8", pieces + piece("\xC3(", -1) + rest, "is not UTF-8 text"},
      {"score NaN", pieces + piece("x", nan) + rest, "score that is not a number"},
      {"score infinite", pieces + piece("x", -std::numeric_limits<float>::infinity()) + rest,
       "score that is not a number"},
      {"type 0", pieces + bytes(1, bytes(1, "x") + number(3, 0)) + rest, "a piece of unknown type"},
      {"type 7", pieces + bytes(1, bytes(1, "x") + number(3, 7)) + rest, "a piece of unknown type"},
      {"score as text", pieces + bytes(1, bytes(1, "x") + bytes(2, "-1")) + rest,
       "a field of the wrong kind"},
      {"pieces as number", pieces + number(1, 5) + rest, "a part of the wrong kind"},
      {"no unknown piece", piece("a", -1) + rest, "libsentencepiece refuses the model"},
      {"two unknown pieces", pieces + piece("<unk2>", 0, kUnknown) + rest,
       "libsentencepiece refuses the model"},
      {"byte piece misnamed", pieces + piece("<0xZZ>", 0, kByte) + rest,
       "libsentencepiece refuses the model"},
      {"word model", pieces + trainer(3) + normalizer(), "models of this type are not supported"},
      {"character model", pieces + trainer(4) + normalizer(), "models of this type are not supported"},
      {"suffix", pieces + bytes(2, number(3, 2) + number(24, 1)) + normalizer(), "white space behind words"},
      {"keeps spaces", pieces + trainer(2) + bytes(3, number(5, 0)),
       "models that keep spaces are not supported"},
      {"field 0", pieces + std::string("\0\0", 2), "a field without number"},
      {"group", pieces + varint((9U << 3U) | 3U), "a field of unknown kind"},
      {"length behind the end", pieces + varint((2U << 3U) | 2U) + varint(1000) + "x",
       "reaches behind its end"},
      {"huge length", pieces + varint((2U << 3U) | 2U) + varint(~std::uint64_t{0}), "reaches behind its end"},
      {"endless number", pieces + std::string(11, '\xFF'), "a number that is too long"},
      {"cut number", pieces + std::string("\x88", 1), "ends inside a number"},
      {"cut float", pieces + bytes(1, bytes(1, "x") + varint((2U << 3U) | 5U) + "ab") + rest,
       "ends inside a number"},
      {"table of 3 bytes", pieces + trainer(2) + normalizer("abc"), "normalisation table is cut off"},
      {"table's size", pieces + trainer(2) + normalizer(word(5) + std::string(16, '\0')),
       "has a size that cannot be"},
      {"table's size 4 GiB", pieces + trainer(2) + normalizer(word(0xFFFFFFFCU) + std::string(16, '\0')),
       "has a size that cannot be"},
      {"table without NUL", pieces + trainer(2) + normalizer(word(1024) + std::string(1024, '\0') + "x"),
       "ends without a NUL"},
      {"table points out",
       pieces + trainer(2) + normalizer(word(4) + word(0x3FFU << 10U) + std::string(1, '\0')),
       "points outside of itself"},
      {"table leads out of its texts",
       pieces + trainer(2) +
           normalizer(word(2048) + word((256U << 10U) | 0x100U) + std::string(1020, '\0') +
                      word(0x80000099U) + std::string(1020, '\0') + std::string(4, '\0')),
       "points outside of its texts"},
  };
  return list;
}

TEST(SentencePieceDamage, EachIsOneClearError) {
  for (const Damage& d : damages()) {
    SCOPED_TRACE(d.name);
    const auto error = error_of([&] { open(d.model); });
    ASSERT_TRUE(error);
    EXPECT_EQ(error->kind(), ErrorKind::input);
    EXPECT_EQ(error->path(), "dir/tokenizer.model");
    EXPECT_NE(error->message().find(d.message), std::string::npos) << error->what();
    EXPECT_EQ(std::string(error->what()).find('\n'), std::string::npos) << error->what();
    const bool ours = error->message().find("libsentencepiece") == std::string::npos;
    if (ours) {
      EXPECT_LE(error->offset().value(), d.model.size());
    }
    EXPECT_FALSE(error->hint().empty()) << error->what();
  }
}

// A text that every accepted model must survive.
void use(const formats::Tokenizer& t) {
  for (const std::int32_t id : t.encode("ab ba <s> \xC3\xA9\xF0\x9F\xA6\x99")) {
    ASSERT_GE(id, 0);
    ASSERT_LT(static_cast<std::uint64_t>(id), t.vocab_size());
  }
  ASSERT_TRUE(is_utf8(t.decode(Ids{0, 1, 2, 3, 4, 5, 100, 300}, false)));
}

TEST(SentencePieceDamage, EveryTruncationIsAnErrorOrATokenizer) {
  const std::string real_one = read_bytes(FIREQ_TEST_DATA "/models/stories260K/tokenizer.model");
  for (const std::string& model : {sound(), real_one.substr(0, 900), real_one.substr(0, 2000)}) {
    for (std::size_t size = 0; size < model.size(); ++size) {
      const auto error = error_of([&] { use(*open(model.substr(0, size))); });
      ASSERT_TRUE(!error || error->kind() == ErrorKind::input) << error->what();
    }
  }
}

TEST(SentencePieceDamage, AnyChangedByteIsAnErrorOrATokenizer) {
  const std::string model = read_bytes(FIREQ_TEST_DATA "/models/stories260K/tokenizer.model");
  std::mt19937_64 random(50);
  int errors = 0;
  for (int round = 0; round < 1500; ++round) {
    std::string changed = round % 2 == 0 ? model : sound();
    const auto flips = 1 + random() % 4;
    for (std::uint64_t i = 0; i < flips; ++i)
      changed[random() % changed.size()] = static_cast<char>(random() & 0xFFU);
    const auto error = error_of([&] { use(*open(changed)); });
    if (!error) continue;
    ++errors;
    ASSERT_EQ(error->kind(), ErrorKind::input) << error->what();
  }
  EXPECT_GT(errors, 100);
}

}  // namespace
}  // namespace fireq::test
