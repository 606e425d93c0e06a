// A file's bytes, mapped read-only. The mapping is private and never written.
//
// A file that another program truncates while it is mapped ends the process with SIGBUS when the missing
// pages are read: the size is checked once, at open, and guarding every access is not attempted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace fireq::formats {

class MappedFile {
 public:
  // Error(input) when absent or no regular file, Error(environment) when it cannot be opened or mapped.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const std::string& path() const noexcept { return path_; }
  std::span<const std::byte> bytes() const noexcept { return {data_, size_}; }
  // Drops the resident pages that lie wholly inside [begin, end); a later access reads them again.
  void release(std::uint64_t begin, std::uint64_t end) const noexcept;

 private:
  std::string path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace fireq::formats
