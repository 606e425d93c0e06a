// A FileSystem for tests that behaves like the real one until its k-th operation, and then fails: the disk is
// full, the disk is broken, or the process is gone. Operations are the calls of FileSystem and OutputFile, in
// order, counted from 0.
#pragma once

#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "formats/file_system.hpp"
#include "formats/mapped_file.hpp"

namespace fireq::formats {

// The end of the process: not an Error, so that nothing that handles errors handles it.
struct SimulatedCrash {};

class FaultInjectingFileSystem final : public FileSystem {
 public:
  enum class Fault : std::uint8_t {
    none,
    no_space,  // ENOSPC, after half of the bytes of a write
    io_error,  // EIO, the same
    crash      // SimulatedCrash in the middle of the operation; every later one throws it again
  };
  static constexpr std::uint64_t kNever = std::numeric_limits<std::uint64_t>::max();

  explicit FaultInjectingFileSystem(Fault fault = Fault::none, std::uint64_t at = kNever)
      : fault_(fault), at_(at) {}

  std::uint64_t operations() const noexcept { return count_; }
  std::uint64_t syncs() const noexcept { return syncs_; }
  bool triggered() const noexcept { return count_ > at_; }
  // What the operation that failed was, for a test's message.
  const std::string& failed_operation() const noexcept { return failed_; }

  std::unique_ptr<OutputFile> create(const std::string& path) override {
    step("create", path);
    return std::make_unique<File>(*this, path);
  }
  void rename(const std::string& from, const std::string& to) override {
    step("rename", to);
    real_file_system().rename(from, to);
  }
  void remove_all(const std::string& path) override {
    step("remove", path, [&] {  // half of a folder's entries are gone when the process ends
      if (!std::filesystem::is_directory(path)) return;
      std::vector<std::string> entries;
      for (const auto& e : std::filesystem::directory_iterator(path)) entries.push_back(e.path().string());
      for (std::size_t i = 0; i < entries.size() / 2; ++i) std::filesystem::remove_all(entries[i]);
    });
    real_file_system().remove_all(path);
  }
  void make_directory(const std::string& path) override {
    step("mkdir", path);
    real_file_system().make_directory(path);
  }
  void sync_directory(const std::string& path) override {
    step("sync folder", path);
    ++syncs_;  // as for files, below
  }
  void copy_file(const std::string& from, const std::string& to) override {
    const MappedFile source(from);
    const std::unique_ptr<OutputFile> out = create(to);
    out->write(source.bytes());
    out->sync();
    out->close();
  }

 private:
  class File final : public OutputFile {
   public:
    File(FaultInjectingFileSystem& fs, std::string path)
        : fs_(fs), path_(std::move(path)), file_(real_file_system().create(path_)) {}
    void write(std::span<const std::byte> bytes) override {
      fs_.step("write", path_, [&] { file_->write(bytes.first(bytes.size() / 2)); });
      file_->write(bytes);
    }
    void write_at(std::uint64_t offset, std::span<const std::byte> bytes) override {
      fs_.step("write", path_, [&] { file_->write_at(offset, bytes.first(bytes.size() / 2)); });
      file_->write_at(offset, bytes);
    }
    void sync() override {  // counted, not done: a simulated crash does not lose what is in the page cache
      fs_.step("sync", path_);
      ++fs_.syncs_;
    }
    void close() override {
      fs_.step("close", path_);
      file_->close();
    }

   private:
    FaultInjectingFileSystem& fs_;
    std::string path_;
    std::unique_ptr<OutputFile> file_;
  };

  template <typename Partly>
  void step(const char* what, const std::string& path, Partly&& partly) {
    if (crashed_) throw SimulatedCrash{};
    if (count_++ != at_ || fault_ == Fault::none) return;
    failed_.assign(what).append(" ").append(path);
    partly();
    if (fault_ == Fault::crash) {
      crashed_ = true;
      throw SimulatedCrash{};
    }
    throw system_error(what, path, fault_ == Fault::no_space ? ENOSPC : EIO);
  }
  void step(const char* what, const std::string& path) {
    step(what, path, [] {});
  }

  Fault fault_;
  std::uint64_t at_;
  std::uint64_t count_ = 0;
  std::uint64_t syncs_ = 0;
  bool crashed_ = false;
  std::string failed_;
};

}  // namespace fireq::formats
