#include "formats/tokenizer_sentencepiece_model.hpp"

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <unordered_set>

#include "common/error.hpp"
#include "formats/unicode.hpp"

namespace fireq::formats {
namespace {

// Field numbers of sentencepiece_model.proto.
constexpr std::uint64_t kModelPieces = 1, kModelTrainer = 2, kModelNormalizer = 3, kModelDenormalizer = 5;
constexpr std::uint64_t kPieceText = 1, kPieceScore = 2, kPieceType = 3;
constexpr std::uint64_t kTrainerModelType = 3, kTrainerSuffix = 24;
constexpr std::uint64_t kNormalizerCharsmap = 2, kNormalizerPrefix = 3, kNormalizerSpaces = 4,
                        kNormalizerEscape = 5;
constexpr std::uint64_t kUnigram = 1, kBpe = 2;

constexpr const char* kDamaged = "the file may be damaged or only half downloaded";
constexpr const char* kUnsupported = "a tokenizer.json of the same model may work";

constexpr std::size_t kLongestPiece = 4096;
constexpr std::size_t kMostPieces = std::size_t{1} << 22U;

class Wire {
 public:
  Wire(std::string_view bytes, std::size_t offset, const std::string& path)
      : bytes_(bytes), offset_(offset), path_(path) {}

  [[noreturn]] void fail(const std::string& problem, const std::string& expected = {},
                         const std::string& found = {}, const char* hint = kDamaged) const {
    Error error(ErrorKind::input, problem);
    error.path(path_).offset(offset_ + at_).hint(hint);
    if (!expected.empty()) error.expected(expected);
    if (!found.empty()) error.found(found);
    throw error;
  }

  struct Field {
    std::uint64_t number = 0;
    std::uint64_t scalar = 0;  // varint, or the bits of a fixed-width value
    enum class Kind : std::uint8_t { varint, fixed64, bytes, fixed32 } kind = Kind::varint;
    std::string_view bytes;
    std::size_t offset = 0;  // of the bytes in the file
  };

  bool next(Field& field) {
    if (at_ >= bytes_.size()) return false;
    const std::uint64_t tag = varint();
    field = {};
    field.number = tag >> 3U;
    if (field.number == 0) fail("SentencePiece model holds a field without number");
    switch (tag & 7U) {
      case 0:
        field.scalar = varint();
        break;
      case 1:
        field.kind = Field::Kind::fixed64;
        field.scalar = fixed(8);
        break;
      case 2: {
        field.kind = Field::Kind::bytes;
        const std::uint64_t length = varint();
        if (length > bytes_.size() - at_)
          fail("SentencePiece model holds a field that reaches behind its end");
        field.bytes = bytes_.substr(at_, static_cast<std::size_t>(length));
        field.offset = offset_ + at_;
        at_ += static_cast<std::size_t>(length);
        break;
      }
      case 5:
        field.kind = Field::Kind::fixed32;
        field.scalar = fixed(4);
        break;
      default:
        fail("SentencePiece model holds a field of unknown kind");
    }
    return true;
  }

 private:
  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      if (at_ >= bytes_.size()) fail("SentencePiece model ends inside a number");
      const auto byte = static_cast<unsigned char>(bytes_[at_++]);
      value |= static_cast<std::uint64_t>(byte & 0x7FU) << shift;
      if (byte < 0x80) return value;
    }
    fail("SentencePiece model holds a number that is too long");
  }

  std::uint64_t fixed(std::size_t size) {
    if (size > bytes_.size() - at_) fail("SentencePiece model ends inside a number");
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < size; ++i) {
      value |= static_cast<std::uint64_t>(static_cast<unsigned char>(bytes_[at_ + i])) << (8 * i);
    }
    at_ += size;
    return value;
  }

  std::string_view bytes_;
  std::size_t at_ = 0;
  std::size_t offset_;
  const std::string& path_;
};

std::uint32_t little_endian(std::string_view bytes, std::size_t at) {
  std::uint32_t value = 0;
  for (unsigned i = 0; i < 4; ++i) {
    value |= static_cast<std::uint32_t>(static_cast<unsigned char>(bytes[at + i])) << (8U * i);
  }
  return value;
}

// The normalisation table: a word with the trie's size, the trie (a double array of 32-bit units), and the
// replacement texts, each ended by a NUL, that the trie's values point into. From unit i, the next unit for
// byte c is i ^ offset ^ c; all 256 must exist.
void check_charsmap(const Wire::Field& field, const std::string& path) {
  const auto fail = [&](const std::string& problem) {
    throw Error(ErrorKind::input, "SentencePiece normalisation table " + problem)
        .path(path)
        .offset(field.offset)
        .hint(kDamaged);
  };
  const std::string_view map = field.bytes;
  if (map.empty()) return;
  if (map.size() < 5) fail("is cut off");
  const std::uint32_t trie_size = little_endian(map, 0);
  if (trie_size % 4 != 0 || trie_size == 0 || trie_size >= map.size() - 4) fail("has a size that cannot be");
  const std::string_view trie = map.substr(4, trie_size);
  const std::string_view texts = map.substr(4 + std::size_t{trie_size});
  if (texts.back() != '\0') fail("ends without a NUL");
  const std::size_t units = trie.size() / 4;
  constexpr std::uint32_t kLeaf = 0x8000'0000U;
  for (std::size_t i = 0; i < units; ++i) {
    const std::uint32_t unit = little_endian(trie, 4 * i);
    if (i != 0 && (unit & kLeaf) != 0) continue;  // holds a value; nothing leads on from here
    const std::size_t offset = static_cast<std::size_t>(unit >> 10U) << ((unit & 0x200U) >> 6U);
    const std::size_t next = i ^ offset;
    if ((next | 0xFFU) >= units) fail("points outside of itself");
    if ((unit & 0x100U) != 0 && (little_endian(trie, 4 * next) & ~kLeaf) >= texts.size()) {
      fail("points outside of its texts");
    }
  }
}

void check_normalizer(const Wire::Field& spec, const std::string& path, SentencePieceModel* model) {
  Wire wire(spec.bytes, spec.offset, path);
  for (Wire::Field field; wire.next(field);) {
    const bool on = field.scalar != 0;
    if (field.number == kNormalizerCharsmap && field.kind == Wire::Field::Kind::bytes)
      check_charsmap(field, path);
    if (model == nullptr || field.kind != Wire::Field::Kind::varint) continue;
    if (field.number == kNormalizerPrefix) model->add_dummy_prefix = on;
    if (field.number == kNormalizerSpaces) model->remove_extra_whitespaces = on;
    if (field.number == kNormalizerEscape && !on)
      wire.fail("SentencePiece models that keep spaces are not supported", "escape_whitespaces true", "false",
                kUnsupported);
  }
}

void check_trainer(const Wire::Field& spec, const std::string& path) {
  Wire wire(spec.bytes, spec.offset, path);
  for (Wire::Field field; wire.next(field);) {
    if (field.kind != Wire::Field::Kind::varint) continue;
    if (field.number == kTrainerModelType && field.scalar != kUnigram && field.scalar != kBpe) {
      wire.fail("SentencePiece models of this type are not supported", "1 (unigram) or 2 (BPE)",
                std::to_string(field.scalar), kUnsupported);
    }
    if (field.number == kTrainerSuffix && field.scalar != 0) {
      wire.fail("SentencePiece models with white space behind words are not supported",
                "treat_whitespace_as_suffix false", "true", kUnsupported);
    }
  }
}

SentencePieceModel::Piece read_piece(const Wire::Field& message, const std::string& path) {
  SentencePieceModel::Piece piece;
  Wire wire(message.bytes, message.offset, path);
  for (Wire::Field field; wire.next(field);) {
    if (field.number == kPieceText && field.kind == Wire::Field::Kind::bytes) {
      piece.text = field.bytes;
    } else if (field.number == kPieceScore && field.kind == Wire::Field::Kind::fixed32) {
      if (!std::isfinite(std::bit_cast<float>(static_cast<std::uint32_t>(field.scalar)))) {
        wire.fail("SentencePiece model holds a score that is not a number");
      }
    } else if (field.number == kPieceType && field.kind == Wire::Field::Kind::varint) {
      if (field.scalar < 1 || field.scalar > 6)
        wire.fail("SentencePiece model holds a piece of unknown type", "1 to 6",
                  std::to_string(field.scalar));
      piece.type = static_cast<PieceType>(field.scalar);
    } else if (field.number <= kPieceType) {
      wire.fail("SentencePiece model holds a piece with a field of the wrong kind");
    }
  }
  if (piece.text.empty()) wire.fail("SentencePiece model holds an empty piece");
  if (piece.text.size() > kLongestPiece)
    wire.fail("SentencePiece model holds a piece that is too long",
              "at most " + std::to_string(kLongestPiece) + " bytes", std::to_string(piece.text.size()));
  for (std::size_t at = 0; at < piece.text.size();) {
    const Utf8Step step = utf8_step(piece.text, at);
    if (!step.valid || step.code_point == 0)
      wire.fail("SentencePiece model holds a piece that is not UTF-8 text");
    at += step.length;
  }
  return piece;
}

}  // namespace

SentencePieceModel check_sentencepiece_model(std::string_view bytes, const std::string& path) {
  SentencePieceModel model;
  std::unordered_set<std::string> seen;
  Wire wire(bytes, 0, path);
  for (Wire::Field field; wire.next(field);) {
    if (field.number == 0 || field.number > kModelDenormalizer) continue;
    if (field.kind != Wire::Field::Kind::bytes)
      wire.fail("SentencePiece model holds a part of the wrong kind");
    if (field.number == kModelPieces) {
      if (model.pieces.size() >= kMostPieces) wire.fail("SentencePiece model holds too many pieces");
      model.pieces.push_back(read_piece(field, path));
      if (!seen.insert(model.pieces.back().text).second) {
        wire.fail("SentencePiece model holds the piece '" + model.pieces.back().text + "' twice");
      }
    } else if (field.number == kModelTrainer) {
      check_trainer(field, path);
    } else if (field.number == kModelNormalizer) {
      check_normalizer(field, path, &model);
    } else if (field.number == kModelDenormalizer) {
      check_normalizer(field, path, nullptr);
    }
  }
  if (model.pieces.empty()) wire.fail("SentencePiece model holds no pieces");
  return model;
}

}  // namespace fireq::formats
