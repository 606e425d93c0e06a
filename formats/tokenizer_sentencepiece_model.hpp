// tokenizer.model (a protobuf) looked through before libsentencepiece gets it. The library believes the
// tables inside: a damaged "precompiled charsmap" sends it outside of its buffers, and scores that are no
// numbers lead its search astray. So everything it would follow blindly is checked here. Internal.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace fireq::formats {

enum class PieceType : std::uint8_t {
  normal = 1,
  unknown = 2,
  control = 3,
  user_defined = 4,
  unused = 5,
  byte = 6
};

struct SentencePieceModel {
  struct Piece {
    std::string text;
    PieceType type = PieceType::normal;
  };
  std::vector<Piece> pieces;
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;
};

// Throws Error(input) with the offset of what is wrong.
SentencePieceModel check_sentencepiece_model(std::string_view bytes, const std::string& path);

}  // namespace fireq::formats
