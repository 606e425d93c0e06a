// The door to the disk for everything that is written: a small interface so that tests can inject faults
// (ENOSPC, EIO, short writes, a crash between two calls; see fault_injection.hpp). Reading goes through
// MappedFile. All failures are Error(environment) with the path and the system's words.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "common/error.hpp"

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
  virtual void rename(const std::string& from, const std::string& to) = 0;  // replaces a file at `to`
  virtual void remove_all(const std::string& path) = 0;                     // absent is fine
  virtual void make_directory(const std::string& path) = 0;  // parents must exist; existing is fine
  virtual void sync_directory(const std::string& path) = 0;
  virtual void copy_file(const std::string& from, const std::string& to) = 0;  // written and fsynced
};

FileSystem& real_file_system();

// "cannot <action>: <strerror>" with the path and, for the usual causes (full disk, permission, read-only), a
// hint.
Error system_error(std::string_view action, const std::string& path, int error_number);

// create + write + fsync + rename over `path` + directory fsync. The temporary file is `path` + ".tmp"; it is
// removed when a step fails.
void write_file_atomically(FileSystem& fs, const std::string& path, std::span<const std::byte> bytes);
void write_file_atomically(FileSystem& fs, const std::string& path, std::string_view text);

// The whole file. Error(input) when it is absent, a directory or longer than `largest` bytes;
// Error(environment) when it cannot be read.
std::string read_text_file(const std::string& path, std::uint64_t largest = std::uint64_t{1} << 30U);

// "a/b/c" -> "a/b"; "c" -> "."; trailing slashes are no component.
std::string parent_folder(const std::string& path);

}  // namespace fireq::formats
