// xxHash3-128 over pieces. Internal: include in .cpp files of targets that link xxHash.
#pragma once

#include <xxhash.h>

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "common/error.hpp"
#include "formats/names.hpp"

namespace fireq::formats {

inline std::string hex(XXH128_hash_t hash) {
  return hex128(hash.high64, hash.low64);
}

class Hasher {
 public:
  Hasher() : state_(XXH3_createState()) {
    if (state_ == nullptr) throw Error(ErrorKind::environment, "out of memory");
    XXH3_128bits_reset(state_);
  }
  ~Hasher() { XXH3_freeState(state_); }
  Hasher(const Hasher&) = delete;
  Hasher& operator=(const Hasher&) = delete;

  void add_bytes(std::span<const std::byte> bytes) {
    XXH3_128bits_update(state_, bytes.data(), bytes.size());
  }
  void add(std::uint64_t value) {  // little-endian on any machine
    std::array<std::byte, 8> bytes{};
    for (std::size_t i = 0; i < 8; ++i) bytes[i] = static_cast<std::byte>(value >> (8 * i) & 0xffU);
    add_bytes(bytes);
  }
  void add(std::string_view text) {  // with its length, so that neighbours cannot run into each other
    add(std::uint64_t{text.size()});
    add_bytes(std::as_bytes(std::span(text)));
  }
  std::string digest() const { return hex(XXH3_128bits_digest(state_)); }

 private:
  XXH3_state_t* state_;
};

}  // namespace fireq::formats
