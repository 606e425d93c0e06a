// What a tokenizer that was accepted must then do, whatever its file says.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "formats/tokenizer.hpp"
#include "tests/fuzz/fuzz.hpp"

namespace fireq::fuzz {

inline void require_utf8(std::string_view text) {
  require(accepted([&] { formats::check_utf8(text, ""); }), "decoded text is not UTF-8");
}

inline void use(const formats::Tokenizer& tokenizer, std::string_view given) {
  const auto texts = std::to_array<std::string_view>(
      {"", " ", "ab <s>x</s> \xE2\x96\x81 'll 123 a\xCC\x81\xCC\xA3\r\n \xF0\x9F\xA6\x99!? <0x41>", given});
  for (const std::string_view text : texts) {
    for (const bool special : {false, true}) {
      std::vector<std::int32_t> ids;
      if (!accepted([&] { ids = tokenizer.encode(text, special); }))
        continue;  // not UTF-8, or a wild pattern
      for (const std::int32_t id : ids) {
        require(id >= 0 && static_cast<std::uint64_t>(id) < tokenizer.vocab_size(), "an id out of range");
      }
      if (ids.size() > 300) ids.resize(300);
      ids.push_back(-1);
      ids.push_back(0);
      accepted([&] {
        require_utf8(tokenizer.decode(ids, special));
        formats::StreamingDecoder decoder(tokenizer, {}, special);
        for (const std::int32_t id : ids) require_utf8(decoder.push(id));
        require_utf8(decoder.finish());
      });
    }
  }
}

}  // namespace fireq::fuzz
