#include "formats/fireq_output.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <system_error>
#include <utility>

#include "common/error.hpp"
#include "formats/checkpoint.hpp"
#include "formats/export_folder.hpp"
#include "formats/folder_rules.hpp"
#include "formats/hash.hpp"
#include "formats/mapped_file.hpp"
#include "formats/model_config_json.hpp"

namespace fireq::formats {
namespace {

namespace stdfs = std::filesystem;

constexpr std::uint64_t kResumeVersion = 2;
constexpr std::array<const char*, 3> kFingerprints{"model", "text", "recipe"};
constexpr std::uint64_t kHashStep = std::uint64_t{8} << 20U;

stdfs::path canonical(const std::string& path) {
  std::error_code code;
  stdfs::path real = stdfs::canonical(path, code);
  if (code) throw system_error("resolve", path, code.value());
  return real;
}

// `inner` is `outer` or lies in it; both canonical.
bool contains(const stdfs::path& outer, const stdfs::path& inner) {
  return inner == outer || inner.string().starts_with((outer / "").string());
}

bool is_unit_name(const std::string& name) {
  return !name.empty() && name.size() < 200 && name.front() != '.' &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
                  c == '_' || c == '.';
         });
}

std::string hash_file(const MappedFile& file) {
  Hasher hasher;
  const std::span<const std::byte> bytes = file.bytes();
  for (std::uint64_t at = 0; at < bytes.size(); at += kHashStep) {
    hasher.add_bytes(bytes.subspan(at, std::min<std::uint64_t>(kHashStep, bytes.size() - at)));
    file.release(at, at + kHashStep);
  }
  return hasher.digest();
}

Error held_elsewhere(const std::string& folder) {
  Error error(ErrorKind::environment, "another run is writing this output");
  return error.path(folder).hint("wait until it has ended, or choose another output");
}

}  // namespace

void LockFile::refuse_held(const std::string& folder) {
  const int fd = ::open((stdfs::path(folder) / kLockFile).c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
  if (fd < 0) return;
  const bool held = ::flock(fd, LOCK_SH | LOCK_NB) != 0 && errno == EWOULDBLOCK;
  ::close(fd);
  if (held) throw held_elsewhere(folder);
}

LockFile::~LockFile() {
  if (fd_ >= 0) ::close(fd_);
}

void LockFile::acquire(FileSystem& fs, const std::string& folder) {
  const std::string path = (stdfs::path(folder) / kLockFile).string();
  // A run that ends removes the folder with the lock in it; then the lock just taken is on a file that is no
  // longer there, and the next round makes a new one.
  for (int attempt = 0; attempt < 100; ++attempt) {
    fs.make_directory(folder);
    const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (fd < 0) {
      if (errno == ENOENT || errno == EINTR) continue;
      throw system_error("create", path, errno);
    }
    while (::flock(fd, LOCK_EX | LOCK_NB) != 0) {
      const int error_number = errno;
      if (error_number == EINTR) continue;
      ::close(fd);
      if (error_number != EWOULDBLOCK) throw system_error("lock", path, error_number);
      throw held_elsewhere(folder);
    }
    struct stat mine {};
    struct stat there {};
    if (::fstat(fd, &mine) == 0 && ::stat(path.c_str(), &there) == 0 && mine.st_ino == there.st_ino &&
        mine.st_dev == there.st_dev) {
      fd_ = fd;
      return;
    }
    ::close(fd);
  }
  throw Error(ErrorKind::environment, "cannot take the lock: the folder vanishes again and again")
      .path(folder);
}

OutputFolder::OutputFolder(FileSystem& fs, std::string out, const std::string& source_folder, bool force)
    : fs_(fs), out_(std::move(out)), force_(force) {
  while (out_.size() > 1 && out_.ends_with('/')) out_.pop_back();
  const std::string name = stdfs::path(out_).filename().string();
  if (name.empty() || name == "." || name == "..") {
    throw Error(ErrorKind::usage, "not a name for an output folder").path(out_);
  }
  std::error_code code;
  if (!stdfs::is_directory(parent_folder(out_), code)) {
    throw Error(ErrorKind::usage, "the folder to write into does not exist").path(parent_folder(out_));
  }
  partial_ = std::string(out_).append(kPartialSuffix);
  files_ = partial_ + "/out";
  units_ = partial_ + "/units";
  state_ = (stdfs::path(partial_) / kResumeFile).string();
  old_ = partial_ + "/old";
  refuse_overlap(source_folder);
  if (!path_exists(partial_)) refuse_existing();
}

void OutputFolder::refuse_early(FileSystem& fs, std::string out, const std::string& source_folder, Mode mode,
                                bool force) {
  OutputFolder folder(fs, std::move(out), source_folder, force);
  if (!path_exists(folder.partial_)) return;
  if (path_exists(folder.out_)) {
    folder.lock_.acquire(fs, folder.partial_);
    folder.settle();
  } else {
    LockFile::refuse_held(folder.partial_);
  }
  if (path_exists(folder.files_)) folder.refuse_unfinished(mode);
}

OutputFolder::OutputFolder(FileSystem& fs, std::string out, const std::string& source_folder, Mode mode,
                           bool force, const std::array<std::string, 3>& fingerprints)
    : OutputFolder(fs, std::move(out), source_folder, force) {
  lock_.acquire(fs_, partial_);
  settle();
  refuse_unfinished(mode);
  if (mode == Mode::resume && has_work()) {
    load(fingerprints);
  } else {
    clear();
  }
  begin(fingerprints);
}

void OutputFolder::settle() {
  recover();
  // Killed after the output was complete: nothing is left here but the lock.
  if (!force_ && path_exists(out_) && !has_work()) fs_.remove_all(partial_);
  refuse_existing();
}

void OutputFolder::refuse_unfinished(Mode mode) const {
  if (mode != Mode::fresh || !has_work()) return;
  throw Error(ErrorKind::usage, "an unfinished output is there")
      .path(partial_)
      .hint("add --resume to finish it, or --restart to throw it away");
}

void OutputFolder::refuse_overlap(const std::string& source_folder) const {
  const stdfs::path source = canonical(source_folder);
  const stdfs::path parent = canonical(parent_folder(out_));
  const std::string name = stdfs::path(out_).filename().string();
  std::vector<stdfs::path> outputs{parent / name, parent / std::string(name).append(kPartialSuffix)};
  std::error_code code;
  if (const stdfs::path real = stdfs::canonical(out_, code); !code) outputs.push_back(real);
  for (const stdfs::path& output : outputs) {
    const bool inside = contains(source, output);
    if (!inside && !contains(output, source)) continue;
    throw Error(ErrorKind::usage, output == source ? "the output is the input"
                                  : inside         ? "the output lies inside the input"
                                                   : "the input lies inside the output")
        .path(out_)
        .found(source.string())
        .hint("choose an output folder elsewhere");
  }
}

void OutputFolder::refuse_existing() const {
  if (!path_exists(out_)) return;
  if (!force_) {
    throw Error(ErrorKind::usage, "the output exists")
        .path(out_)
        .hint("choose another name, or add --force to replace it");
  }
  // A slip of the keyboard must not replace a home folder.
  bool ours = false;
  std::error_code code;
  if (stdfs::is_directory(out_, code)) {
    try {
      ours = list_names(out_).empty() || is_export_folder(out_) || is_fireq_folder(out_);
    } catch (const Error&) {
      ours = false;
    }
  }
  if (ours) return;
  throw Error(ErrorKind::usage, "the output exists and is no FireQ folder; --force does not replace it")
      .path(out_)
      .hint("choose another name, or remove it yourself");
}

void OutputFolder::recover() {
  // Killed between the two renames of a swap: the old output goes back to its place.
  if (path_exists(old_) && !path_exists(out_)) fs_.rename(old_, out_);
  // Killed after them: the output is complete, and what is left here is rubbish. (out/ is made before the
  // record and leaves by the rename only.)
  if (path_exists(state_) && !path_exists(files_)) clear();
}

bool OutputFolder::has_work() const {
  if (!path_exists(state_)) return false;
  std::error_code code;
  if (!stdfs::is_empty(files_, code) || code) return true;
  return !stdfs::is_empty(units_, code) || code;
}

void OutputFolder::clear() {
  fs_.remove_all(state_);  // first: without it nothing else counts
  for (const std::string& name : list_names(partial_)) {
    if (name != kLockFile) fs_.remove_all(partial_ + "/" + name);
  }
}

void OutputFolder::load(const std::array<std::string, 3>& fingerprints) {
  const auto damaged = [&] {
    return Error(ErrorKind::input, "the record of the unfinished output is damaged")
        .path(state_)
        .hint("add --restart to throw it away");
  };
  const std::string text = read_text_file(state_);
  std::size_t begin = 0;
  const auto next = [&]() -> std::optional<nlohmann::json> {
    const std::size_t end = text.find('\n', begin);
    if (end == std::string::npos)
      return std::nullopt;  // a line that was not written to its end does not count
    const std::string_view line = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    try {
      nlohmann::json value = parse_json(line, state_);
      if (value.is_object()) return value;
    } catch (const Error&) {
      // The caller says what this means for its line.
    }
    return std::nullopt;
  };
  const std::optional<nlohmann::json> head = next();
  if (!head) throw damaged();
  const JsonFields fields(*head, state_);
  if (fields.count("fireq_resume", 0, std::uint64_t{1} << 53U) != kResumeVersion) throw damaged();
  for (std::size_t i = 0; i < fingerprints.size(); ++i) {
    const std::string recorded = fields.text_or(kFingerprints[i], "");
    if (recorded == fingerprints[i]) continue;
    throw Error(ErrorKind::input, std::string("the unfinished output belongs to another ") + kFingerprints[i])
        .path(partial_)
        .expected(recorded)
        .found(fingerprints[i])
        .hint(std::string("give the same ")
                  .append(kFingerprints[i])
                  .append(", or add --restart to throw it away"));
  }
  while (const std::optional<nlohmann::json> entry = next()) {
    std::string unit;
    Unit result;
    try {
      const JsonFields f(*entry, state_);
      unit = f.text("unit");
      result.size = f.count("size", 0, std::uint64_t{1} << 53U);
      result.hash = f.text("xxh3");
    } catch (const Error&) {
      break;
    }
    if (!is_unit_name(unit) || !path_exists(unit_path(unit))) continue;
    // After a power failure a file may be shorter or older than its record: such a unit is simply done again.
    const MappedFile file(unit_path(unit));
    if (file.bytes().size() == result.size && hash_file(file) == result.hash) done_[unit] = result;
  }
}

void OutputFolder::begin(const std::array<std::string, 3>& fingerprints) {
  fs_.make_directory(units_);
  fs_.make_directory(files_);
  nlohmann::json head{{"fireq_resume", kResumeVersion}};
  for (std::size_t i = 0; i < fingerprints.size(); ++i) head[kFingerprints[i]] = fingerprints[i];
  std::string text = head.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  for (const auto& [unit, result] : done_) text += line(unit, result);
  // The file stays open under its final name: each finished unit is then one short write at its end.
  const std::string temporary = state_ + ".tmp";
  record_ = fs_.create(temporary);
  record_->write(std::as_bytes(std::span(text)));
  record_->sync();
  fs_.rename(temporary, state_);
  fs_.sync_directory(partial_);
}

std::string OutputFolder::line(const std::string& unit, const Unit& result) {
  return nlohmann::json{{"unit", unit}, {"size", result.size}, {"xxh3", result.hash}}.dump() + "\n";
}

std::string OutputFolder::unit_path(const std::string& unit) const {
  if (!is_unit_name(unit)) throw Error(ErrorKind::internal, "bad unit name").found(in_quotes(unit));
  return units_ + "/" + unit + ".safetensors";
}

void OutputFolder::record(const std::string& unit, const Unit& result) {
  const std::string text = line(unit, result);
  // Not fsynced: if a power failure takes this line, the unit is done again, nothing worse.
  record_->write(std::as_bytes(std::span(text)));
  done_[unit] = result;
}

void OutputFolder::swap_in() {
  record_->close();
  fs_.sync_directory(files_);
  refuse_existing();  // it may have appeared while this run worked
  const bool replace = path_exists(out_);
  if (replace) fs_.rename(out_, old_);
  fs_.rename(files_, out_);
  fs_.sync_directory(parent_folder(out_));
  // Under this name a half-removed old output is never put back.
  if (replace) fs_.rename(old_, partial_ + "/trash");
  fs_.remove_all(partial_);
}

}  // namespace fireq::formats
