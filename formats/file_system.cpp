#include "formats/file_system.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <system_error>
#include <vector>

namespace fireq::formats {
namespace {

// Linux moves at most 0x7ffff000 bytes in one call; a smaller piece keeps a signal's wait short.
constexpr std::size_t kLargestWrite = std::size_t{1} << 28U;
constexpr std::size_t kCopyBuffer = std::size_t{1} << 20U;

std::string hint_for(int error_number) {
  switch (error_number) {
    case ENOSPC:
    case EDQUOT:
      return "free some space on this disk, or write to another one, and run again";
    case EACCES:
    case EPERM:
      return "check the permissions of the file and its folder";
    case EROFS:
      return "the disk is mounted read-only; write to another one";
    case EIO:
      return "the disk reports a fault; check it and the system log, then run again";
    case EMFILE:
    case ENFILE:
      return "too many files are open; raise the limit (ulimit -n)";
    case ENOENT:
      return "the folder does not exist; create it first";
    default:
      return {};
  }
}

int open_retrying(const std::string& path, int flags, mode_t mode = 0) {
  int fd = -1;
  do {
    fd = ::open(path.c_str(), flags | O_CLOEXEC, mode);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

void sync_retrying(int fd, const std::string& path) {
  while (::fsync(fd) != 0) {
    // A folder on some file systems cannot be fsynced; there is nothing more to be done for it.
    if (errno == EINTR) continue;
    if (errno == EINVAL || errno == ENOTSUP) return;
    throw system_error("flush to disk", path, errno);
  }
}

class PosixOutputFile final : public OutputFile {
 public:
  explicit PosixOutputFile(std::string path)
      : path_(std::move(path)), fd_(open_retrying(path_, O_WRONLY | O_CREAT | O_TRUNC, 0666)) {
    if (fd_ < 0) throw system_error("create", path_, errno);
  }
  ~PosixOutputFile() override {
    if (fd_ >= 0) ::close(fd_);
  }

  void write(std::span<const std::byte> bytes) override {
    while (!bytes.empty()) {
      const ssize_t n = ::write(fd_, bytes.data(), std::min(bytes.size(), kLargestWrite));
      bytes = advance(bytes, n);
    }
  }
  void write_at(std::uint64_t offset, std::span<const std::byte> bytes) override {
    while (!bytes.empty()) {
      const std::size_t before = bytes.size();
      const ssize_t n =
          ::pwrite(fd_, bytes.data(), std::min(before, kLargestWrite), static_cast<off_t>(offset));
      bytes = advance(bytes, n);
      offset += before - bytes.size();
    }
  }
  void sync() override { sync_retrying(fd_, path_); }
  void close() override {
    if (fd_ < 0) return;
    const int fd = fd_;
    fd_ = -1;
    // After EINTR Linux has closed the descriptor already; closing again could hit another file.
    if (::close(fd) != 0 && errno != EINTR) throw system_error("close", path_, errno);
  }

 private:
  std::span<const std::byte> advance(std::span<const std::byte> bytes, ssize_t written) const {
    if (written < 0) {
      if (errno == EINTR) return bytes;
      throw system_error("write", path_, errno);
    }
    if (written == 0) throw system_error("write", path_, EIO);  // a disk that takes nothing, for ever
    return bytes.subspan(static_cast<std::size_t>(written));
  }

  std::string path_;
  int fd_;
};

class PosixFileSystem final : public FileSystem {
 public:
  std::unique_ptr<OutputFile> create(const std::string& path) override {
    return std::make_unique<PosixOutputFile>(path);
  }
  void rename(const std::string& from, const std::string& to) override {
    if (::rename(from.c_str(), to.c_str()) != 0) {
      throw system_error("rename '" + from + "' to this name", to, errno);
    }
  }
  void remove_all(const std::string& path) override {
    std::error_code code;
    std::filesystem::remove_all(path, code);
    if (code) throw system_error("remove", path, code.value());
  }
  void make_directory(const std::string& path) override {
    if (::mkdir(path.c_str(), 0777) == 0) return;
    const int error_number = errno;
    std::error_code code;
    if (error_number == EEXIST && std::filesystem::is_directory(path, code)) return;
    throw system_error("create the folder", path, error_number);
  }
  void sync_directory(const std::string& path) override {
    const int fd = open_retrying(path, O_RDONLY | O_DIRECTORY);
    if (fd < 0) throw system_error("open the folder", path, errno);
    try {
      sync_retrying(fd, path);
    } catch (...) {
      ::close(fd);
      throw;
    }
    ::close(fd);
  }
  void copy_file(const std::string& from, const std::string& to) override {
    const int fd = open_retrying(from, O_RDONLY);
    if (fd < 0) throw system_error("open", from, errno);
    try {
      const std::unique_ptr<OutputFile> out = create(to);
      std::vector<std::byte> buffer(kCopyBuffer);
      while (true) {
        const ssize_t n = ::read(fd, buffer.data(), buffer.size());
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw system_error("read", from, errno);
        if (n == 0) break;
        out->write(std::span(buffer).first(static_cast<std::size_t>(n)));
      }
      out->sync();
      out->close();
    } catch (...) {
      ::close(fd);
      throw;
    }
    ::close(fd);
  }
};

}  // namespace

FileSystem& real_file_system() {
  static PosixFileSystem fs;
  return fs;
}

Error system_error(std::string_view action, const std::string& path, int error_number) {
  Error error(ErrorKind::environment,
              "cannot " + std::string(action) + ": " + std::generic_category().message(error_number));
  error.path(path);
  const std::string hint = hint_for(error_number);
  if (!hint.empty()) error.hint(hint);
  return error;
}

std::string parent_folder(const std::string& path) {
  std::size_t end = path.find_last_not_of('/');
  if (end == std::string::npos) return path.empty() ? "." : "/";
  end = path.find_last_of('/', end);
  if (end == std::string::npos) return ".";
  end = path.find_last_not_of('/', end);
  return end == std::string::npos ? "/" : path.substr(0, end + 1);
}

void write_file_atomically(FileSystem& fs, const std::string& path, std::span<const std::byte> bytes) {
  const std::string temporary = path + ".tmp";
  try {
    const std::unique_ptr<OutputFile> out = fs.create(temporary);
    out->write(bytes);
    out->sync();
    out->close();
    fs.rename(temporary, path);
  } catch (...) {
    try {
      fs.remove_all(temporary);
    } catch (...) {
      // The first failure is the one to report.
    }
    throw;
  }
  fs.sync_directory(parent_folder(path));
}

void write_file_atomically(FileSystem& fs, const std::string& path, std::string_view text) {
  write_file_atomically(fs, path, std::as_bytes(std::span(text.data(), text.size())));
}

std::string read_text_file(const std::string& path, std::uint64_t largest) {
  const int fd = open_retrying(path, O_RDONLY);
  if (fd < 0) {
    if (errno == ENOENT || errno == ENOTDIR) {
      throw Error(ErrorKind::input, "file not found").path(path);
    }
    throw system_error("open", path, errno);
  }
  struct Closer {
    int fd;
    ~Closer() { ::close(fd); }
  } const closer{fd};
  struct stat status {};
  if (::fstat(fd, &status) != 0) throw system_error("read", path, errno);
  if (S_ISDIR(status.st_mode)) throw Error(ErrorKind::input, "a folder, not a file").path(path);
  const auto too_long = [&](std::uint64_t size) {
    return Error(ErrorKind::input, "file is too long")
        .path(path)
        .expected("at most " + std::to_string(largest) + " bytes")
        .found(std::to_string(size) + " or more");
  };
  std::string text;
  if (S_ISREG(status.st_mode)) {
    const auto size = static_cast<std::uint64_t>(status.st_size);
    if (size > largest) throw too_long(size);
    text.reserve(size + 1);
  }
  // The size is a hint only: pipes have none, and a file may grow while it is read.
  std::size_t used = 0;
  while (true) {
    const std::size_t room = std::max<std::size_t>(text.capacity() - used, std::size_t{1} << 16U);
    text.resize(used + room);
    const ssize_t n = ::read(fd, text.data() + used, room);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw system_error("read", path, errno);
    if (n == 0) break;
    used += static_cast<std::size_t>(n);
    if (used > largest) throw too_long(used);
  }
  text.resize(used);
  return text;
}

}  // namespace fireq::formats
