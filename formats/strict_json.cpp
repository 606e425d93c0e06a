#include "formats/strict_json.hpp"

#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/error.hpp"

namespace fireq::formats {
namespace {

constexpr std::size_t kOrderedKeys = 10000;

// Builds the tree itself, because the library's own builder keeps the last of two equal keys.
template <typename Json>
class TreeBuilder final : public nlohmann::json_sax<Json> {
 public:
  TreeBuilder(const std::string& path, std::size_t depth) : path_(path), depth_(depth) {}

  Json take() { return std::move(root_); }

  bool null() override { return add(Json(nullptr)); }
  bool boolean(bool value) override { return add(Json(value)); }
  bool number_integer(std::int64_t value) override { return add(Json(value)); }
  bool number_unsigned(std::uint64_t value) override { return add(Json(value)); }
  bool number_float(double value, const std::string& /*text*/) override { return add(Json(value)); }
  bool string(std::string& value) override { return add(Json(std::move(value))); }
  bool binary(typename Json::binary_t& /*value*/) override { return false; }
  bool start_object(std::size_t /*size*/) override { return open(Json::object()); }
  bool start_array(std::size_t /*size*/) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(std::string& name) override {
    // The ordered form looks keys up one by one, so a large object would cost the square of its size.
    if (std::is_same_v<Json, nlohmann::ordered_json> && open_.back()->size() >= kOrderedKeys) {
      throw Error(ErrorKind::input, "a JSON object has too many keys")
          .path(path_)
          .expected("at most " + std::to_string(kOrderedKeys));
    }
    if (open_.back()->contains(name)) {
      throw Error(ErrorKind::input, "the key '" + name + "' is there twice").path(path_);
    }
    key_ = std::move(name);
    return true;
  }
  bool parse_error(std::size_t position, const std::string& /*token*/,
                   const nlohmann::detail::exception& error) override {
    throw Error(ErrorKind::input, "not valid JSON: " + json_error_text(error.what()))
        .path(path_)
        .offset(position == 0 ? 0 : position - 1);
  }

 private:
  Json* place(Json&& value) {
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    Json& parent = *open_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    return &(parent[key_] = std::move(value));
  }
  bool add(Json&& value) {
    place(std::move(value));
    return true;
  }
  bool open(Json&& value) {
    if (open_.size() >= depth_) {
      throw Error(ErrorKind::input, "JSON is nested too deep")
          .path(path_)
          .expected("at most " + std::to_string(depth_) + " levels");
    }
    open_.push_back(place(std::move(value)));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  const std::string& path_;
  std::size_t depth_;
  Json root_;
  std::vector<Json*> open_;  // a container never moves while one inside it is open
  std::string key_;
};

template <typename Json>
Json parse(std::string_view text, const std::string& path, std::size_t depth) {
  refuse_nul(text, path);
  TreeBuilder<Json> builder(path, depth);
  Json::sax_parse(text.begin(), text.end(), &builder);
  return builder.take();
}

}  // namespace

std::string json_error_text(const char* what) {
  const std::string text(what);
  const std::size_t at = text.find(": ");
  return at == std::string::npos ? text : text.substr(at + 2);
}

void refuse_nul(std::string_view text, const std::string& path) {
  const std::size_t at = text.find('\0');
  if (at == std::string_view::npos) return;
  throw Error(ErrorKind::input, "not valid JSON: a zero byte").path(path).offset(at);
}

nlohmann::json parse_strict_json(std::string_view text, const std::string& path, std::size_t depth) {
  return parse<nlohmann::json>(text, path, depth);
}
nlohmann::ordered_json parse_strict_ordered_json(std::string_view text, const std::string& path,
                                                 std::size_t depth) {
  return parse<nlohmann::ordered_json>(text, path, depth);
}

}  // namespace fireq::formats
