// The reader. A file is: header length N as a little-endian 64-bit word, N bytes of JSON, data. What a header
// must obey is written once, here, and reading a tensor is possible only through what this returned.
#include "formats/safetensors.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <tuple>
#include <unordered_set>
#include <utility>

#include "common/checked.hpp"
#include "formats/mapped_file.hpp"
#include "formats/names.hpp"

namespace fireq::formats {
namespace {

// Readers that hold JSON numbers as doubles lose integers above this.
constexpr std::uint64_t kLargestNumber = std::uint64_t{1} << 53U;
constexpr std::uint64_t kLengthWord = 8;

// The parser's sentence without its name and the position before it.
std::string syntax_error_text(const std::string& what) {
  const std::size_t at = what.find(": ");
  return at == std::string::npos ? what : what.substr(at + 2);
}

// Takes the events of the JSON parser, so that a key that comes twice is seen, and builds no tree. Every
// value that a header has no place for ends the parse, which bounds the nesting at 3.
class HeaderHandler final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeaderHandler(SafetensorsHeader& header) : header_(header) {}

  bool null() override { return misplaced("null"); }
  bool boolean(bool value) override { return misplaced(value ? "true" : "false"); }
  bool binary(binary_t& /*value*/) override { return misplaced("binary data"); }
  bool number_float(double /*value*/, const std::string& text) override {
    return wants_number() ? bad_number(text) : misplaced(text);
  }
  bool number_integer(std::int64_t value) override {
    // The parser calls this for literals with a minus sign only.
    const std::string text = value == 0 ? "-0" : std::to_string(value);
    return wants_number() ? bad_number(text) : misplaced(text);
  }
  bool number_unsigned(std::uint64_t value) override {
    if (!wants_number()) return misplaced(std::to_string(value));
    if (value > kLargestNumber) return bad_number(std::to_string(value));
    if (state_ == State::shape) {
      tensor_.shape.push_back(value);
      return true;
    }
    if (offsets_ == 2) throw tensor_error("data_offsets has more than two numbers");
    (offsets_ == 0 ? tensor_.begin : tensor_.end) = value;
    ++offsets_;
    return true;
  }

  bool string(std::string& value) override {
    if (state_ == State::metadata) {
      header_.metadata[key_] = std::move(value);
      return true;
    }
    if (state_ == State::tensor && key_ == "dtype") {
      const std::optional<Dtype> dtype = parse_dtype(value);
      if (!dtype) throw tensor_error("unknown dtype").found(in_quotes(value));
      tensor_.dtype = *dtype;
      return true;
    }
    return misplaced("a string");
  }

  bool start_object(std::size_t /*size*/) override {
    switch (state_) {
      case State::start:
        state_ = State::top;
        return true;
      case State::top:
        keys_.clear();
        state_ = key_ == "__metadata__" ? State::metadata : State::tensor;
        if (state_ == State::tensor) {
          tensor_ = TensorInfo{};
          tensor_.name = std::exchange(key_, {});
          offsets_ = 0;
        }
        return true;
      default:
        return misplaced("an object");
    }
  }
  bool key(std::string& name) override {
    std::unordered_set<std::string>& seen = state_ == State::top ? names_ : keys_;
    if (!seen.insert(name).second) {
      switch (state_) {
        case State::top:
          throw header_error("two tensors have the same name").tensor(name);
        case State::metadata:
          throw header_error("__metadata__ has a key twice").found(in_quotes(name));
        default:
          throw tensor_error("a key is there twice").found(in_quotes(name));
      }
    }
    if (state_ == State::tensor && name != "dtype" && name != "shape" && name != "data_offsets") {
      throw tensor_error("unknown key").expected("dtype, shape and data_offsets").found(in_quotes(name));
    }
    key_ = std::move(name);
    return true;
  }
  bool end_object() override {
    if (state_ == State::tensor) {
      for (const char* const needed : {"dtype", "shape", "data_offsets"}) {
        if (!keys_.contains(needed)) throw tensor_error("a key is missing").expected(needed);
      }
      header_.tensors.push_back(std::move(tensor_));
    }
    state_ = state_ == State::top ? State::done : State::top;
    return true;
  }
  bool start_array(std::size_t /*size*/) override {
    if (state_ == State::tensor && key_ == "shape") {
      state_ = State::shape;
    } else if (state_ == State::tensor && key_ == "data_offsets") {
      state_ = State::offsets;
    } else {
      return misplaced("an array");
    }
    return true;
  }
  bool end_array() override {
    if (state_ == State::offsets && offsets_ != 2) {
      throw tensor_error("data_offsets has not two numbers").found(std::to_string(offsets_));
    }
    state_ = State::tensor;
    return true;
  }
  bool parse_error(std::size_t position, const std::string& /*token*/,
                   const nlohmann::detail::exception& error) override {
    throw Error(ErrorKind::input, "the header is not valid JSON: " + syntax_error_text(error.what()))
        .offset(kLengthWord + (position == 0 ? 0 : position - 1));
  }

 private:
  enum class State : std::uint8_t { start, top, metadata, tensor, shape, offsets, done };

  bool wants_number() const { return state_ == State::shape || state_ == State::offsets; }

  static Error header_error(std::string message) {
    return Error(ErrorKind::input, std::move(message)).offset(kLengthWord);
  }
  Error tensor_error(std::string message) const {
    return header_error(std::move(message)).tensor(tensor_.name);
  }
  bool bad_number(const std::string& text) const {
    throw tensor_error(state_ == State::shape ? "bad number in shape" : "bad number in data_offsets")
        .expected("a whole number from 0 to 2^53 in plain digits")
        .found(text);
  }
  bool misplaced(const std::string& what) const {
    switch (state_) {
      case State::start:
        throw header_error("the header is no JSON object").found(what);
      case State::metadata:
        throw header_error("__metadata__ may hold strings only").found(in_quotes(key_) + ": " + what);
      case State::top:
        if (key_ == "__metadata__") {
          throw header_error("__metadata__ is no object").found(what);
        }
        throw header_error("a tensor's entry is no object").tensor(key_).found(what);
      case State::tensor:
        throw tensor_error("bad value for " + key_)
            .expected(key_ == "dtype" ? "a string" : "an array of numbers")
            .found(what);
      default:
        throw tensor_error(state_ == State::shape ? "bad value in shape" : "bad value in data_offsets")
            .expected("whole numbers")
            .found(what);
    }
  }

  SafetensorsHeader& header_;
  State state_ = State::start;
  TensorInfo tensor_;
  std::string key_;
  std::size_t offsets_ = 0;
  std::unordered_set<std::string> names_;
  std::unordered_set<std::string> keys_;
};

std::uint64_t header_length(std::span<const std::byte> head, std::uint64_t file_size) {
  if (file_size < kLengthWord) {
    throw Error(ErrorKind::input, "file is too short for a safetensors header")
        .offset(0)
        .expected("at least 8 bytes")
        .found(std::to_string(file_size));
  }
  if (head.size() < kLengthWord) throw Error(ErrorKind::internal, "safetensors head without length word");
  std::uint64_t length = 0;
  for (std::size_t i = 0; i < kLengthWord; ++i) {
    length |= std::to_integer<std::uint64_t>(head[i]) << (8 * i);
  }
  const auto wrong_length = [&](std::uint64_t most) {
    Error error(ErrorKind::input, "safetensors header length is out of range");
    error.offset(0).expected("at most " + std::to_string(most)).found(std::to_string(length));
    const std::string_view start(reinterpret_cast<const char*>(head.data()), kLengthWord);
    if (start == "version ") {
      error.hint("this looks like a Git LFS pointer; fetch the file itself with 'git lfs pull'");
    } else {
      error.hint("the file is damaged, cut off, or no safetensors file");
    }
    return error;
  };
  if (length > kLargestSafetensorsHeader) throw wrong_length(kLargestSafetensorsHeader);
  if (length > file_size - kLengthWord) throw wrong_length(file_size - kLengthWord);
  if (length > head.size() - kLengthWord) throw Error(ErrorKind::internal, "safetensors head is cut off");
  return length;
}

// Sizes agree with the byte ranges, and the ranges tile the data section exactly.
void check_ranges(SafetensorsHeader& header, std::uint64_t data_size) {
  for (const TensorInfo& t : header.tensors) {
    const std::uint64_t at = header.data_start + t.begin;  // both at most 2^53
    const auto range = [&] { return std::to_string(t.begin) + " to " + std::to_string(t.end); };
    if (t.begin > t.end) {
      throw Error(ErrorKind::input, "data_offsets run backwards").tensor(t.name).offset(at).found(range());
    }
    if (t.end > data_size) {
      throw Error(ErrorKind::input, "tensor ends after the end of the file")
          .tensor(t.name)
          .offset(at)
          .expected("an end of at most " + std::to_string(data_size))
          .found(range())
          .hint("the file is cut off or its header is wrong; fetch it again");
    }
    std::uint64_t bytes = 0;
    try {
      bytes = checked_mul(checked_elements(t.shape, "shape"), dtype_size(t.dtype), "bytes of a tensor");
    } catch (Error& error) {
      throw error.tensor(t.name).offset(at).found(shape_text(t.shape));
    }
    if (bytes != t.end - t.begin) {
      throw Error(ErrorKind::input, "tensor's byte range does not fit its shape")
          .tensor(t.name)
          .offset(at)
          .expected(std::to_string(bytes) + " bytes for " + std::string(dtype_name(t.dtype)) + " " +
                    shape_text(t.shape))
          .found(std::to_string(t.end - t.begin) + " bytes");
    }
  }
  // A zero-size tensor shares its begin with its neighbour, and comes first.
  std::stable_sort(header.tensors.begin(), header.tensors.end(), [](const auto& a, const auto& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  });
  std::uint64_t cursor = 0;
  for (const TensorInfo& t : header.tensors) {
    if (t.begin != cursor) {
      throw Error(ErrorKind::input, t.begin > cursor ? "a hole in the data before this tensor"
                                                     : "tensor overlaps the one before it")
          .tensor(t.name)
          .offset(header.data_start + t.begin)
          .expected("begin " + std::to_string(cursor))
          .found("begin " + std::to_string(t.begin));
    }
    cursor = t.end;
  }
  if (cursor != data_size) {
    throw Error(ErrorKind::input, "bytes after the last tensor")
        .offset(header.data_start + cursor)
        .expected("a file of " + std::to_string(header.data_start + cursor) + " bytes")
        .found(std::to_string(header.data_start + data_size));
  }
}

}  // namespace

SafetensorsHeader parse_safetensors_header(std::span<const std::byte> head, std::uint64_t file_size) {
  const std::uint64_t length = header_length(head, file_size);
  const std::string_view text(reinterpret_cast<const char*>(head.data()) + kLengthWord,
                              static_cast<std::size_t>(length));
  SafetensorsHeader header;
  header.data_start = kLengthWord + length;
  if (text.empty() || text.front() != '{') {  // also keeps out a byte order mark
    throw Error(ErrorKind::input, "the header is no JSON object")
        .offset(kLengthWord)
        .expected("'{' as its first byte")
        .found(text.empty() ? "an empty header" : in_quotes(text.substr(0, 1)));
  }
  try {
    refuse_nul(text, {});
  } catch (Error& error) {
    throw error.offset(kLengthWord + error.offset().value_or(0));
  }
  HeaderHandler handler(header);
  nlohmann::json::sax_parse(text.begin(), text.end(), &handler);
  check_ranges(header, file_size - header.data_start);
  return header;
}

struct SafetensorsFile::Impl {
  explicit Impl(const std::string& path) : file(path) {
    try {
      header = parse_safetensors_header(file.bytes(), file.bytes().size());
    } catch (Error& error) {
      throw error.path_if_unset(path);
    }
  }
  MappedFile file;
  SafetensorsHeader header;
};

SafetensorsFile::SafetensorsFile(const std::string& path) : impl_(std::make_unique<Impl>(path)) {}
SafetensorsFile::~SafetensorsFile() = default;
SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;
SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&&) noexcept = default;

const std::string& SafetensorsFile::path() const noexcept {
  return impl_->file.path();
}
const SafetensorsHeader& SafetensorsFile::header() const noexcept {
  return impl_->header;
}
TensorView SafetensorsFile::tensor(const TensorInfo& info) const {
  return {info.name, info.dtype, info.shape,
          impl_->file.bytes().subspan(impl_->header.data_start + info.begin, info.end - info.begin)};
}
void SafetensorsFile::release(const TensorInfo& info) const noexcept {
  impl_->file.release(impl_->header.data_start + info.begin, impl_->header.data_start + info.end);
}

}  // namespace fireq::formats
