// A checkpoint folder's tokenizer with the settings that lie around it.
#include "formats/tokenizer.hpp"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "common/error.hpp"
#include "formats/file_system.hpp"
#include "formats/tokenizer_parts.hpp"

namespace fireq::formats {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr std::uint64_t kLargestFile = std::uint64_t{1} << 28U;
constexpr std::uint64_t kLargestTemplate = std::uint64_t{1} << 20U;

bool is_there(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

// A JSON file next to the tokenizer; an empty object when there is none.
struct SideFile {
  explicit SideFile(const fs::path& at) : path(at.string()) {
    if (is_there(at)) root = parse_json(read_text_file(path, kLargestFile), path);
  }
  JsonFields fields() const { return {root, path}; }

  std::string path;
  json root = json::object();
};

// "bos_token" and the like: a string, or an added token as an object.
std::string token_text(const JsonFields& fields, const std::string& key) {
  const json* value = fields.find(key);
  if (value == nullptr) return {};
  if (value->is_object()) return fields.object(key).text("content");
  return fields.text(key);
}

std::optional<std::int32_t> config_id(const JsonFields& fields, const std::string& key) {
  const json* value = fields.find(key);
  if (value == nullptr) return {};
  if (value->is_array()) {
    if (value->empty() || !(*value)[0].is_number_unsigned() ||
        (*value)[0].get<std::uint64_t>() > kLargestTokenId) {
      fields.fail(key, "is not a list of token ids");
    }
    return (*value)[0].get<std::int32_t>();
  }
  return static_cast<std::int32_t>(fields.count(key, 0, kLargestTokenId));
}

// added_tokens.json {"content": id} and tokenizer_config.json's added_tokens_decoder {"id": {...}}.
std::vector<AddedToken> read_side_tokens(const JsonFields& settings, const JsonFields& added) {
  std::vector<AddedToken> tokens;
  if (settings.find("added_tokens_decoder") != nullptr) {
    const JsonFields list = settings.object("added_tokens_decoder");
    for (const auto& item : list.value().items()) {
      const std::string& key = item.key();
      const bool digits =
          !key.empty() && key.size() <= 7 && key.find_first_not_of("0123456789") == std::string::npos;
      if (!digits || std::stoul(key) > kLargestTokenId) list.fail(key, "is not a token id");
      tokens.push_back(read_added_token(list.object(key), static_cast<std::int32_t>(std::stoul(key))));
    }
  }
  for (const auto& item : added.value().items()) {
    if (item.key().size() > kLongestAddedToken) added.fail(item.key(), "is too long for an added token");
    const auto id = static_cast<std::int32_t>(added.count(item.key(), 0, kLargestTokenId));
    const bool known =
        std::any_of(tokens.begin(), tokens.end(), [&](const AddedToken& t) { return t.id == id; });
    if (known) continue;
    AddedToken token;
    token.content = item.key();
    token.id = id;
    tokens.push_back(std::move(token));
  }
  std::sort(tokens.begin(), tokens.end(),
            [](const AddedToken& a, const AddedToken& b) { return a.id < b.id; });
  return tokens;
}

std::string read_chat_template(const fs::path& folder, const JsonFields& settings) {
  if (const fs::path file = folder / "chat_template.jinja"; is_there(file)) {
    return read_text_file(file.string(), kLargestTemplate);
  }
  const json* value = settings.find("chat_template");
  if (value == nullptr) return {};
  if (!value->is_array()) return settings.text("chat_template");
  // Several templates by name.
  for (std::size_t i = 0; i < value->size(); ++i) {
    const JsonFields entry((*value)[i], settings.path(), "chat_template[" + std::to_string(i) + "].");
    if (entry.text("name") == "default") return entry.text("template");
  }
  return {};
}

}  // namespace

std::unique_ptr<Tokenizer> open_tokenizer(const std::string& folder) {
  const fs::path at(folder);
  const SideFile settings_file(at / "tokenizer_config.json");
  const SideFile config_file(at / "config.json");
  const JsonFields settings = settings_file.fields();
  const JsonFields config = config_file.fields();

  TokenizerJson opened;
  if (const fs::path file = at / "tokenizer.json"; is_there(file)) {
    opened = read_tokenizer_json(read_text_file(file.string(), kLargestFile), file.string());
  } else if (const fs::path model = at / "tokenizer.model"; is_there(model)) {
    const SideFile added(at / "added_tokens.json");
    opened.tokenizer = read_sentencepiece(read_text_file(model.string(), kLargestFile), model.string(),
                                          read_side_tokens(settings, added.fields()));
  } else {
    throw Error(ErrorKind::usage, "the folder has no tokenizer")
        .path(folder)
        .expected("tokenizer.json or tokenizer.model")
        .hint("copy it from the model's page, or give token ids instead of text");
  }

  Tokenizer& tokenizer = *opened.tokenizer;
  const auto settle = [&](std::optional<std::int32_t>& id, const std::string& name) {
    const std::string text = token_text(settings, name);
    std::optional<std::int32_t> found;
    if (!text.empty()) found = tokenizer.token_id(text);
    if (!found) found = config_id(config, name + "_id");
    if (found) id = found;
  };
  settle(tokenizer.bos_id, "bos_token");
  settle(tokenizer.eos_id, "eos_token");
  if (!tokenizer.bos_id) tokenizer.bos_id = opened.leading_special;

  bool head = false;
  if (settings.find("add_bos_token") != nullptr) {
    head = settings.boolean_or("add_bos_token", false);
  } else if (opened.has_post_processor) {
    head = opened.leading_special.has_value();
  } else {
    head = config.text_or("model_type", "") == "llama";
  }
  if (head && !tokenizer.bos_id) {
    throw Error(ErrorKind::input, "texts are to begin with a BOS token, but no file says which it is")
        .path(folder)
        .hint("set bos_token in tokenizer_config.json or bos_token_id in config.json");
  }
  tokenizer.default_bos = head ? BosMode::head : BosMode::none;
  tokenizer.chat_template = read_chat_template(at, settings);
  return std::move(opened.tokenizer);
}

}  // namespace fireq::formats
