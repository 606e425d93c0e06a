// The life of an output folder: OUT.fireq-partial/ with its lock and its record of finished units, how an
// interrupted run is found again, and the rename that makes OUT appear. Internal; FireqWriter puts tensors
// into it.
//
// OUT.fireq-partial/
//   fireq.lock           flock(2) is held on it while a run lives, so a killed run's lock is gone with it
//   fireq-resume.jsonl   first line: fingerprints; then a line for each finished unit
//   units/UNIT.safetensors
//   out/                 becomes OUT by the final rename
//   old/                 an OUT that is being replaced, between the two renames of the swap
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "formats/file_system.hpp"
#include "formats/fireq_folder.hpp"

namespace fireq::formats {

// Holds the exclusive lock on a file until destroyed.
class LockFile {
 public:
  LockFile() = default;
  ~LockFile();
  LockFile(const LockFile&) = delete;
  LockFile& operator=(const LockFile&) = delete;
  // Creates FOLDER if needed and the lock file in it. Error(environment) when another process holds it.
  void acquire(FileSystem& fs, const std::string& folder);
  // The same error, without keeping the lock or making anything.
  static void refuse_held(const std::string& folder);

 private:
  int fd_ = -1;
};

class OutputFolder {
 public:
  struct Unit {
    std::uint64_t size = 0;
    std::string hash;  // xxHash3-128 of the staged file
  };

  // FireqWriter's constructor, and its refuse_early; see there.
  OutputFolder(FileSystem& fs, std::string out, const std::string& source_folder, FireqWriter::Mode mode,
               bool force, const std::array<std::string, 3>& fingerprints);
  static void refuse_early(FileSystem& fs, std::string out, const std::string& source_folder,
                           FireqWriter::Mode mode, bool force);

  const std::string& partial() const noexcept { return partial_; }
  const std::string& files() const noexcept { return files_; }  // what becomes OUT
  std::string unit_path(const std::string& unit) const;         // Error(internal) for a bad unit name
  const std::map<std::string, Unit>& done() const noexcept { return done_; }
  void record(const std::string& unit, const Unit& result);
  // files() -> OUT, then nothing of the partial folder is left.
  void swap_in();

 private:
  using Mode = FireqWriter::Mode;
  // Names and what can be refused by them alone; makes nothing.
  OutputFolder(FileSystem& fs, std::string out, const std::string& source_folder, bool force);
  void settle();  // what a killed run left, under the lock
  void refuse_unfinished(Mode mode) const;
  void refuse_overlap(const std::string& source_folder) const;
  void refuse_existing() const;
  void recover();
  bool has_work() const;
  void clear();
  void load(const std::array<std::string, 3>& fingerprints);
  void begin(const std::array<std::string, 3>& fingerprints);
  static std::string line(const std::string& unit, const Unit& result);

  FileSystem& fs_;
  std::string out_, partial_, files_, units_, state_, old_;
  bool force_;
  LockFile lock_;
  std::map<std::string, Unit> done_;
  std::unique_ptr<OutputFile> record_;
};

}  // namespace fireq::formats
