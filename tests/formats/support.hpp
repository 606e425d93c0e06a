// What the tests of formats/ share: folders that vanish, files from exact bytes, and the error a call ends
// with.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/error.hpp"
#include "tests/support/temp_folder.hpp"

namespace fireq::test {

inline void write_bytes(const std::string& path, std::string_view bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  out.close();
  if (!out) throw std::runtime_error("cannot write " + path);
}

inline std::string read_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(in), {}};
}

// Every file under `folder`: relative path -> bytes.
inline std::map<std::string, std::string> read_tree(const std::string& folder) {
  std::map<std::string, std::string> tree;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file()) continue;
    tree[std::filesystem::relative(entry.path(), folder).string()] = read_bytes(entry.path().string());
  }
  return tree;
}

inline std::string length_word(std::uint64_t n) {
  std::string word(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) word[i] = static_cast<char>(n >> (8 * i) & 0xffU);
  return word;
}

// The bytes of a safetensors file with this header text, whatever it says.
inline std::string safetensors_bytes(const std::string& header, std::string_view data) {
  std::string bytes = length_word(header.size());
  bytes.append(header).append(data);
  return bytes;
}

// One tensor of a file that a test makes; `shape` as JSON text.
struct RawTensor {
  std::string name;
  std::string dtype;
  std::string shape;
  std::string data;
};

// A well-formed safetensors file of these tensors in this order.
inline std::string safetensors_of(const std::vector<RawTensor>& tensors) {
  std::string header("{"), data;
  for (const RawTensor& t : tensors) {
    const std::size_t begin = data.size();
    data += t.data;
    header.append(begin == 0 && header.size() == 1 ? "" : ",").append("\"").append(t.name);
    header.append("\":{\"dtype\":\"").append(t.dtype).append("\",\"shape\":").append(t.shape);
    header.append(",\"data_offsets\":[").append(std::to_string(begin)).append(",");
    header.append(std::to_string(data.size())).append("]}");
  }
  return safetensors_bytes(header + "}", data);
}

inline std::string random_bytes(std::mt19937_64& random, std::size_t n) {
  std::string bytes(n, '\0');
  for (char& c : bytes) c = static_cast<char>(random() & 0xffU);
  return bytes;
}

// The Error that `call` ends with; nullopt when it returns.
template <typename Call>
std::optional<Error> error_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error;
  }
  return std::nullopt;
}

// What an Error must say, part by part; an empty part must be absent. A message or hint that ends in "..." is
// compared up to there.
struct Parts {
  ErrorKind kind = ErrorKind::input;
  std::string message = {};
  std::string path = {};
  std::string tensor = {};
  std::string expected = {};
  std::string found = {};
  std::string hint = {};
};

inline void expect_parts(const std::optional<Error>& error, const Parts& parts) {
  ASSERT_TRUE(error.has_value()) << "no error, but wanted: " << parts.message;
  const auto same = [&](const std::string& found, const std::string& wanted) {
    if (!wanted.ends_with("...")) return found == wanted;
    return found.starts_with(wanted.substr(0, wanted.size() - 3));
  };
  EXPECT_EQ(error->kind(), parts.kind) << error->what();
  EXPECT_EQ(error->exit_code(), static_cast<int>(parts.kind));
  EXPECT_TRUE(same(error->message(), parts.message)) << error->what() << "\nwanted: " << parts.message;
  EXPECT_EQ(error->path(), parts.path) << error->what();
  EXPECT_EQ(error->tensor(), parts.tensor) << error->what();
  EXPECT_TRUE(same(error->expected(), parts.expected)) << error->what() << "\nwanted: " << parts.expected;
  EXPECT_TRUE(same(error->found(), parts.found)) << error->what() << "\nwanted: " << parts.found;
  EXPECT_TRUE(same(error->hint(), parts.hint)) << error->what() << "\nwanted: " << parts.hint;
}

inline std::string_view text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace fireq::test
