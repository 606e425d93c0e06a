#include "formats/mapped_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "formats/file_system.hpp"

namespace fireq::formats {

MappedFile::MappedFile(const std::string& path) : path_(path) {
  int fd = -1;
  do {
    // O_NONBLOCK: opening a FIFO must not hang before fstat can refuse it.
    fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) {
    if (errno == ENOENT || errno == ENOTDIR) throw Error(ErrorKind::input, "file not found").path(path);
    throw system_error("open", path, errno);
  }
  struct stat status {};
  if (::fstat(fd, &status) != 0) {
    const int error_number = errno;
    ::close(fd);
    throw system_error("read", path, error_number);
  }
  if (!S_ISREG(status.st_mode)) {
    ::close(fd);
    throw Error(ErrorKind::input, "not a regular file").path(path);
  }
  size_ = static_cast<std::size_t>(status.st_size);
  if (size_ > 0) {  // an empty mapping is an error of mmap, an empty file is none
    void* const map = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
    const int error_number = errno;
    ::close(fd);
    if (map == MAP_FAILED) throw system_error("map into memory", path, error_number);
    data_ = static_cast<const std::byte*>(map);
    // Tensors are read front to back, each once per pass: large read-ahead pays. Only advice, so unchecked.
    ::madvise(map, size_, MADV_SEQUENTIAL);
  } else {
    ::close(fd);
  }
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

void MappedFile::release(std::uint64_t begin, std::uint64_t end) const noexcept {
  static const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  end = std::min<std::uint64_t>(end, size_);
  // The file's last page belongs to its last tensor alone.
  const std::uint64_t last = end == size_ ? (end + page - 1) / page * page : end / page * page;
  const std::uint64_t first = (begin + page - 1) / page * page;
  if (data_ == nullptr || first >= last) return;
  ::madvise(const_cast<std::byte*>(data_) + first, last - first, MADV_DONTNEED);
}

}  // namespace fireq::formats
