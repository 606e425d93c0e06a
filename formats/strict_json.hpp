// JSON from strangers' files as a tree: one parser with the rules every reader here wants. UTF-8 only, no
// duplicate keys (escaped twins included: "a" and "\u0061"), nesting at most `depth` deep, nothing after the
// value. Include only in .cpp files: nlohmann/json.hpp is heavy.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace fireq::formats {

inline constexpr std::size_t kJsonDepth = 64;

// Throws Error(input) with the path, the byte offset for syntax errors, and the key for duplicates.
// The ordered form keeps keys in the order of the text.
nlohmann::json parse_strict_json(std::string_view text, const std::string& path,
                                 std::size_t depth = kJsonDepth);
nlohmann::ordered_json parse_strict_ordered_json(std::string_view text, const std::string& path,
                                                 std::size_t depth = kJsonDepth);

// What the parser says in brackets and numbers before the sentence is cut off.
std::string json_error_text(const char* what);

// Refuses a NUL byte, which the JSON library would take for the end of the text.
void refuse_nul(std::string_view text, const std::string& path);

}  // namespace fireq::formats
