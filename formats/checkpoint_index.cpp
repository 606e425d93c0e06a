// model.safetensors.index.json.
#include <nlohmann/json.hpp>
#include <utility>

#include "common/error.hpp"
#include "formats/checkpoint.hpp"
#include "formats/model_config_json.hpp"
#include "formats/names.hpp"

namespace fireq::formats {
namespace {

// A shard's name becomes part of a path that is opened, so it must be one plain component.
void check_shard_name(const std::string& name, const std::string& tensor, const std::string& path) {
  const auto refuse = [&](const char* why) {
    throw Error(ErrorKind::input, std::string("shard name ") + why)
        .path(path)
        .tensor(tensor)
        .found(in_quotes(name));
  };
  if (name.empty()) refuse("is empty");
  if (name.front() == '/') refuse("is an absolute path");
  if (name.find("..") != std::string::npos) refuse("contains '..'");
  if (name.find_first_of("/\\") != std::string::npos) refuse("contains a folder");
  if (name.find('\0') != std::string::npos) refuse("contains a zero byte");
  if (!name.ends_with(".safetensors")) refuse("does not end in .safetensors");
}

}  // namespace

std::map<std::string, std::string> parse_safetensors_index(std::string_view json_text,
                                                           const std::string& path_for_errors) {
  const nlohmann::json index = parse_json(json_text, path_for_errors);
  const JsonFields weight_map = JsonFields(index, path_for_errors).object("weight_map");
  std::map<std::string, std::string> shard_of;
  std::map<std::string, std::string> spelling;  // lower case -> as written
  for (const auto& [tensor, shard] : weight_map.value().items()) {
    std::string name = weight_map.text(tensor);
    check_shard_name(name, tensor, path_for_errors);
    const auto [known, fresh] = spelling.emplace(ascii_lower(name), name);
    if (!fresh && known->second != name) {
      throw Error(ErrorKind::input, "two shard names differ only in case")
          .path(path_for_errors)
          .tensor(tensor)
          .expected(in_quotes(known->second))
          .found(in_quotes(name));
    }
    shard_of.emplace(tensor, std::move(name));
  }
  return shard_of;
}

}  // namespace fireq::formats
