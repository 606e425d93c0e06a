#include "common/error.hpp"

#include <utility>

namespace fireq {

std::string printable(const std::string& text) {
  constexpr std::size_t kLongest = 400;
  static const char* hex = "0123456789abcdef";
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) {
      out += "\\x";
      out += hex[byte >> 4U];
      out += hex[byte & 15U];
    } else {
      out += c;
    }
    if (out.size() > kLongest) return out + "...";
  }
  return out;
}

Error::Error(ErrorKind kind, std::string message) : kind_(kind), message_(std::move(message)) {
  compose();
}

Error& Error::path(std::string value) {
  path_ = std::move(value);
  compose();
  return *this;
}
Error& Error::tensor(std::string value) {
  tensor_ = std::move(value);
  compose();
  return *this;
}
Error& Error::offset(std::uint64_t value) {
  offset_ = value;
  compose();
  return *this;
}
Error& Error::expected(std::string value) {
  expected_ = std::move(value);
  compose();
  return *this;
}
Error& Error::found(std::string value) {
  found_ = std::move(value);
  compose();
  return *this;
}
Error& Error::hint(std::string value) {
  hint_ = std::move(value);
  compose();
  return *this;
}
Error& Error::path_if_unset(const std::string& value) {
  return path_.empty() ? path(value) : *this;
}
Error& Error::tensor_if_unset(const std::string& value) {
  return tensor_.empty() ? tensor(value) : *this;
}

void Error::compose() {
  line_.clear();
  if (!path_.empty()) line_ += printable(path_) + ": ";
  if (!tensor_.empty()) line_ += "tensor '" + printable(tensor_) + "': ";
  if (offset_) line_ += "offset " + std::to_string(*offset_) + ": ";
  line_ += printable(message_);
  if (!expected_.empty() || !found_.empty()) {
    line_ += " (";
    if (!expected_.empty()) line_ += "expected " + printable(expected_);
    if (!expected_.empty() && !found_.empty()) line_ += ", ";
    if (!found_.empty()) line_ += "found " + printable(found_);
    line_ += ")";
  }
  if (!hint_.empty()) line_ += "; " + printable(hint_);
}

}  // namespace fireq
