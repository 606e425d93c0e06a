// The door to the disk for everything that is written: a small interface so that tests can inject faults
// (ENOSPC, EIO, short writes, a crash between two calls). Reading goes through MappedFile. All failures are
// Error(environment) with the path and the system's words.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace fireq::formats {

class OutputFile {
 public:
  OutputFile() = default;
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  virtual ~OutputFile() = default;
  virtual void write(std::span<const std::byte> bytes) = 0;  // all of them or an Error
  virtual void write_at(std::uint64_t offset, std::span<const std::byte> bytes) = 0;
  virtual void sync() = 0;   // fsync
  virtual void close() = 0;  // reports a late error; idempotent
};

class FileSystem {
 public:
  FileSystem() = default;
  FileSystem(const FileSystem&) = delete;
  FileSystem& operator=(const FileSystem&) = delete;
  virtual ~FileSystem() = default;
  virtual std::unique_ptr<OutputFile> create(const std::string& path) = 0;  // truncates
  virtual void rename(const std::string& from, const std::string& to) = 0;
  virtual void remove_all(const std::string& path) = 0;
  virtual void make_directory(const std::string& path) = 0;  // parents must exist; existing is fine
  virtual void sync_directory(const std::string& path) = 0;
  virtual void copy_file(const std::string& from, const std::string& to) = 0;  // written and fsynced
};

FileSystem& real_file_system();

// create + write + fsync + rename over `path` + directory fsync.
void write_file_atomically(FileSystem& fs, const std::string& path, std::span<const std::byte> bytes);
void write_file_atomically(FileSystem& fs, const std::string& path, std::string_view text);

std::string read_text_file(const std::string& path, std::uint64_t largest = std::uint64_t{1} << 30U);

}  // namespace fireq::formats
