// safetensors: a memory-mapped reader that checks everything before a byte of data is touched, and a
// streaming writer.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/tensor.hpp"
#include "formats/file_system.hpp"

namespace fireq::formats {

struct TensorInfo {
  std::string name;
  Dtype dtype = Dtype::f32;
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0;  // relative to the data section
  std::uint64_t end = 0;
};

struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;  // in order of their offsets
  std::map<std::string, std::string> metadata;
  std::uint64_t data_start = 0;  // 8 + header length
};

inline constexpr std::uint64_t kLargestSafetensorsHeader = 100'000'000;

// The one validation of a file's header, and the only door to a tensor's bytes (rules:
// docs/checkpoint-format.md, "safetensors files"). `head` holds at least the length word and the header;
// `file_size` is the whole file's size. Throws Error(input).
SafetensorsHeader parse_safetensors_header(std::span<const std::byte> head, std::uint64_t file_size);

class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(SafetensorsFile&&) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&&) noexcept;

  const std::string& path() const noexcept;
  const SafetensorsHeader& header() const noexcept;
  TensorView tensor(const TensorInfo& info) const;
  // Tells the kernel that the pages of this tensor are not needed again soon (keeps resident memory small).
  void release(const TensorInfo& info) const noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Streaming writer. Declare every tensor first (the header is written from them), then append data in that
// order. The header is padded with spaces so that the data starts at a multiple of 8; tensors in descending
// order of element size are then all aligned. Equal arguments give equal bytes.
struct TensorPlan {
  std::string name;
  Dtype dtype = Dtype::f32;
  std::vector<std::uint64_t> shape;

  std::uint64_t bytes() const;  // of its data; Error(input) when it overflows
};

// Length word and header as the writer makes them.
std::string make_safetensors_head(std::span<const TensorPlan> plan,
                                  const std::map<std::string, std::string>& metadata);

class SafetensorsWriter {
 public:
  SafetensorsWriter(FileSystem& fs, const std::string& path, const std::vector<TensorPlan>& plan,
                    const std::map<std::string, std::string>& metadata);
  // The same into a file that is open already; `path` is for messages.
  SafetensorsWriter(std::unique_ptr<OutputFile> file, const std::string& path,
                    const std::vector<TensorPlan>& plan, const std::map<std::string, std::string>& metadata);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;
  void append(std::span<const std::byte> bytes);  // any cut; tensors follow one another
  void finish();                                  // checks that all bytes came, fsync, close
  std::uint64_t file_size() const noexcept;       // of the finished file
 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fireq::formats
