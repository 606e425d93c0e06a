// The one error type of the toolkit. Libraries throw it; the command line prints it as one line and turns its
// kind into the exit code. Never thrown for programming mistakes (those are Kind::internal).
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

namespace fireq {

// The values are the process exit codes (docs/errors.md).
enum class ErrorKind : int {
  tolerance = 1,    // compared, and out of tolerance
  usage = 2,        // the command line or a recipe asks for something impossible
  input = 3,        // a file's content breaks a rule
  environment = 4,  // disk full, permission, missing library or device
  internal = 5,     // a defect of this program
  interrupted = 130
};

// Text that may come from a file, for one line on a terminal: control characters as escapes, and a very long
// text cut.
std::string printable(const std::string& text);

// Build one with the fluent setters: throw Error(ErrorKind::input, "header is too
// long").path(p).expected("..."). what() is the finished line: "path: tensor 'x': offset 8: message (expected
// A, found B); hint".
class Error : public std::exception {
 public:
  Error(ErrorKind kind, std::string message);

  Error& path(std::string value);
  Error& tensor(std::string value);
  Error& offset(std::uint64_t value);  // byte offset in the file
  Error& expected(std::string value);
  Error& found(std::string value);
  Error& hint(std::string value);  // what the user can do

  // Adds the path or tensor only where none is set yet (for callers that know more than the thrower).
  Error& path_if_unset(const std::string& value);
  Error& tensor_if_unset(const std::string& value);

  ErrorKind kind() const noexcept { return kind_; }
  int exit_code() const noexcept { return static_cast<int>(kind_); }
  const std::string& message() const noexcept { return message_; }
  const std::string& path() const noexcept { return path_; }
  const std::string& tensor() const noexcept { return tensor_; }
  std::optional<std::uint64_t> offset() const noexcept { return offset_; }
  const std::string& expected() const noexcept { return expected_; }
  const std::string& found() const noexcept { return found_; }
  const std::string& hint() const noexcept { return hint_; }

  const char* what() const noexcept override { return line_.c_str(); }

 private:
  void compose();

  ErrorKind kind_;
  std::string message_, path_, tensor_, expected_, found_, hint_;
  std::optional<std::uint64_t> offset_;
  std::string line_;
};

}  // namespace fireq
