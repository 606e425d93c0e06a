// The statistics file. An input is taken as a whole file, which its checksum refuses, and then as the HDF5
// data under a checksum that fits, which is what somebody would make who wants to do harm.
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "formats/statistics.hpp"
#include "formats/statistics_file.hpp"
#include "tests/fuzz/fuzz.hpp"

// The HDF5 library loses memory of files that it cannot open; that is not what is looked for here.
extern "C" const char* __asan_default_options() {
  return "detect_leaks=0";
}

namespace {

void read(std::string_view bytes) {
  static const int fd = ::memfd_create("statistics", MFD_CLOEXEC);
  static const std::string path = "/proc/self/fd/" + std::to_string(fd);
  fireq::fuzz::require(fd >= 0 && ::ftruncate(fd, 0) == 0, "a file in memory");
  fireq::fuzz::require(::pwrite(fd, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()),
                       "a write");
  fireq::formats::CalibrationStatistics statistics;
  if (!fireq::fuzz::accepted([&] { statistics = fireq::formats::read_statistics(path); })) return;
  // What is accepted obeys the rules, and can be merged.
  fireq::formats::check_statistics(statistics, "read");
  fireq::fuzz::accepted([&] { statistics.merge(fireq::formats::CalibrationStatistics(statistics)); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  read(bytes);
  // A quarter of values, then the table.
  const std::uint64_t table = fireq::formats::kHeadBlock + size / 4;
  std::string forged = fireq::formats::statistics_head_block(std::as_bytes(std::span(bytes)), table);
  forged.append(bytes);
  read(forged);
  return 0;
}
