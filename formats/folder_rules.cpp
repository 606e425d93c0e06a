#include "formats/folder_rules.hpp"

#include <algorithm>
#include <filesystem>
#include <system_error>

#include "common/error.hpp"
#include "formats/file_system.hpp"

namespace fireq::formats {

namespace stdfs = std::filesystem;

void check_inside_folder(const std::string& folder, const std::string& name) {
  const std::string path = (stdfs::path(folder) / name).string();
  std::error_code code;
  const stdfs::path real_folder = stdfs::canonical(folder, code);
  if (code) throw system_error("resolve", folder, code.value());
  const stdfs::path real = stdfs::canonical(path, code);
  if (code == std::errc::no_such_file_or_directory) {
    throw Error(ErrorKind::input, "the file is missing").path(path);
  }
  if (code) throw system_error("resolve", path, code.value());
  // A pipe or a device would block or never end.
  if (!stdfs::is_regular_file(real, code)) throw Error(ErrorKind::input, "not a regular file").path(path);
  if (real.string().starts_with((real_folder / "").string())) return;
  const stdfs::path snapshots = real_folder.parent_path();
  if (snapshots.filename() == "snapshots" && real.parent_path() == snapshots.parent_path() / "blobs") return;
  throw Error(ErrorKind::input, "a link leads out of the folder")
      .path(path)
      .expected("a file inside " + real_folder.string())
      .found(real.string())
      .hint("copy the file into the folder if you trust it");
}

std::string read_text_inside_folder(const std::string& folder, const std::string& name,
                                    std::uint64_t largest) {
  const std::string path = (stdfs::path(folder) / name).string();
  if (path_exists(path)) check_inside_folder(folder, name);
  return read_text_file(path, largest);
}

std::vector<std::string> list_names(const std::string& folder) {
  std::vector<std::string> names;
  std::error_code code;
  stdfs::directory_iterator entry(folder, code);
  while (!code && entry != stdfs::directory_iterator()) {
    names.push_back(entry->path().filename().string());
    entry.increment(code);
  }
  if (code) throw system_error("list the folder", folder, code.value());
  std::sort(names.begin(), names.end());
  return names;
}

bool path_exists(const std::string& path) {
  std::error_code code;
  return stdfs::exists(stdfs::symlink_status(path, code));
}

}  // namespace fireq::formats
