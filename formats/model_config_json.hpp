// JSON that strangers wrote, read with every type and range checked and the key named. Shared by config.json,
// tokenizer.json and tokenizer_config.json; included by .cpp files only (it brings in nlohmann/json).
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace fireq::formats {

// Parses UTF-8 JSON. Error(input) with the byte offset for malformed text and a zero byte, for nesting deeper
// than 64 levels and for a key that appears twice in one object (readers disagree about which one counts).
enum class JsonComments : std::uint8_t { refused, allowed };
nlohmann::json parse_json(std::string_view text, const std::string& path,
                          JsonComments comments = JsonComments::refused);

// A short rendering of a value for "found ..." in messages.
std::string json_excerpt(const nlohmann::json& value);

// The entry of `known` nearest to `word` by edit distance, or empty when nothing is near (hints).
std::string nearest_name(std::string_view word, const std::vector<std::string>& known);

// One object with its place in the file. A null value counts as absent, as transformers treats it.
class JsonFields {
 public:
  // `where` is the key path of this object with a trailing dot, empty at the root. Error(input) unless
  // `value` is an object. The value must outlive this view.
  JsonFields(const nlohmann::json& value, std::string path, std::string where = {});

  const nlohmann::json* find(const std::string& key) const;  // nullptr when absent or null
  bool present(const std::string& key) const { return object_.contains(key); }

  std::uint64_t count(const std::string& key, std::uint64_t lowest, std::uint64_t highest) const;
  std::uint64_t count_or(const std::string& key, std::uint64_t otherwise, std::uint64_t lowest,
                         std::uint64_t highest) const;
  double positive(const std::string& key) const;  // finite and > 0; integers are fine
  double positive_or(const std::string& key, double otherwise) const;
  bool boolean_or(const std::string& key, bool otherwise) const;
  std::string text(const std::string& key) const;
  std::string text_or(const std::string& key, const std::string& otherwise) const;
  JsonFields object(const std::string& key) const;
  const nlohmann::json& array(const std::string& key) const;

  // Throws Error(input) about this key: "key 'rope_scaling.factor' ...".
  [[noreturn]] void fail(const std::string& key, const std::string& problem, const std::string& expected = {},
                         const std::string& hint = {}) const;

  const nlohmann::json& value() const noexcept { return object_; }
  const std::string& path() const noexcept { return path_; }
  const std::string& where() const noexcept { return where_; }

 private:
  const nlohmann::json& required(const std::string& key) const;

  const nlohmann::json& object_;
  std::string path_, where_;
};

}  // namespace fireq::formats
