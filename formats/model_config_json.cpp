#include "formats/model_config_json.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <unordered_set>
#include <utility>

#include "common/error.hpp"
#include "common/nearest.hpp"
#include "formats/names.hpp"

namespace fireq::formats {
namespace {

using nlohmann::json;

constexpr int kDeepest = 64;

}  // namespace

json parse_json(std::string_view text, const std::string& path, JsonComments comments) {
  refuse_nul(text, path);
  // Keys seen so far in each open object.
  std::vector<std::unordered_set<std::string>> open;
  const json::parser_callback_t watch = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth > kDeepest) {
      throw Error(ErrorKind::input, "JSON is nested too deeply")
          .path(path)
          .expected("at most " + std::to_string(kDeepest) + " levels");
    }
    if (event == json::parse_event_t::object_start) {
      open.emplace_back();
    } else if (event == json::parse_event_t::object_end) {
      open.pop_back();
    } else if (event == json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!open.back().insert(key).second) {
        throw Error(ErrorKind::input, "key '" + key + "' appears twice in one JSON object").path(path);
      }
    }
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), watch, true, comments == JsonComments::allowed);
  } catch (const json::parse_error& error) {
    const std::uint64_t at = error.byte > 0 ? error.byte - 1 : 0;
    throw Error(ErrorKind::input, "not valid JSON")
        .path(path)
        .offset(std::min<std::uint64_t>(at, text.size()))
        .hint("the file may be damaged or only half downloaded");
  } catch (const json::exception&) {  // a number out of range
    throw Error(ErrorKind::input, "JSON holds a value out of range").path(path);
  }
}

std::string json_excerpt(const json& value) {
  constexpr std::size_t kLongest = 60;
  if (value.is_object()) return "an object";
  if (value.is_array()) return "a list of " + std::to_string(value.size());
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  return text;
}

std::string nearest_name(std::string_view word, const std::vector<std::string>& known) {
  std::string best;
  constexpr std::size_t kLongestWord = 64;
  if (word.empty() || word.size() > kLongestWord) return best;
  std::size_t distance = std::max<std::size_t>(1, word.size() / 3) + 1;  // nearer than this
  for (const std::string& candidate : known) {
    if (candidate.size() > kLongestWord) continue;
    const std::size_t d = edit_distance(word, candidate);
    if (d < distance) {
      distance = d;
      best = candidate;
    }
  }
  return best;
}

JsonFields::JsonFields(const json& value, std::string path, std::string where)
    : object_(value), path_(std::move(path)), where_(std::move(where)) {
  if (!value.is_object()) {
    const std::string name =
        where_.empty() ? "the file" : "key '" + where_.substr(0, where_.size() - 1) + "'";
    throw Error(ErrorKind::input, name + " is not a JSON object")
        .path(path_)
        .expected("an object")
        .found(json_excerpt(value));
  }
}

const json* JsonFields::find(const std::string& key) const {
  const auto at = object_.find(key);
  return at == object_.end() || at->is_null() ? nullptr : &*at;
}

void JsonFields::fail(const std::string& key, const std::string& problem, const std::string& expected,
                      const std::string& hint) const {
  Error error(ErrorKind::input, "key '" + where_ + key + "' " + problem);
  error.path(path_);
  if (!expected.empty()) error.expected(expected);
  const auto at = object_.find(key);
  if (at != object_.end()) error.found(json_excerpt(*at));
  if (!hint.empty()) error.hint(hint);
  throw error;
}

const json& JsonFields::required(const std::string& key) const {
  if (const json* value = find(key)) return *value;
  std::vector<std::string> there;
  for (const auto& item : object_.items()) there.push_back(item.key());
  const std::string near = nearest_name(key, there);
  fail(key, present(key) ? "must not be null" : "is missing", {},
       near.empty() || near == key ? "" : "did you mean its '" + near + "'?");
}

std::uint64_t JsonFields::count(const std::string& key, std::uint64_t lowest, std::uint64_t highest) const {
  const json& value = required(key);
  const std::string expected = "an integer from " + std::to_string(lowest) + " to " + std::to_string(highest);
  if (!value.is_number_integer()) fail(key, "is not an integer", expected);
  if (!value.is_number_unsigned()) fail(key, "is negative", expected);
  const auto number = value.get<std::uint64_t>();
  if (number < lowest || number > highest) fail(key, "is out of range", expected);
  return number;
}

std::uint64_t JsonFields::count_or(const std::string& key, std::uint64_t otherwise, std::uint64_t lowest,
                                   std::uint64_t highest) const {
  return find(key) == nullptr ? otherwise : count(key, lowest, highest);
}

double JsonFields::positive(const std::string& key) const {
  const json& value = required(key);
  if (!value.is_number()) fail(key, "is not a number", "a positive number");
  const double number = value.get<double>();
  if (!std::isfinite(number) || number <= 0) fail(key, "is out of range", "a positive number");
  return number;
}

double JsonFields::positive_or(const std::string& key, double otherwise) const {
  return find(key) == nullptr ? otherwise : positive(key);
}

bool JsonFields::boolean_or(const std::string& key, bool otherwise) const {
  const json* value = find(key);
  if (value == nullptr) return otherwise;
  if (!value->is_boolean()) fail(key, "is not true or false", "true or false");
  return value->get<bool>();
}

std::string JsonFields::text(const std::string& key) const {
  const json& value = required(key);
  if (!value.is_string()) fail(key, "is not a string", "a string");
  return value.get<std::string>();
}

std::string JsonFields::text_or(const std::string& key, const std::string& otherwise) const {
  return find(key) == nullptr ? otherwise : text(key);
}

JsonFields JsonFields::object(const std::string& key) const {
  return {required(key), path_, where_ + key + "."};
}

const json& JsonFields::array(const std::string& key) const {
  const json& value = required(key);
  if (!value.is_array()) fail(key, "is not a list", "a list");
  return value;
}

}  // namespace fireq::formats
