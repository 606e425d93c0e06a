// Writing when the disk does not play along: short writes, signals, a full and a broken disk, at every call
// that a writer makes.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>

#include <chrono>
#include <csignal>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "formats/fault_injection.hpp"
#include "formats/file_system.hpp"
#include "formats/safetensors.hpp"
#include "tests/formats/support.hpp"

namespace fireq::formats {
namespace {

namespace stdfs = std::filesystem;
using test::error_of;
using test::expect_parts;
using test::TempFolder;
using Fault = FaultInjectingFileSystem::Fault;

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

constexpr const char* kFullHint = "free some space on this disk, or write to another one, and run again";
constexpr const char* kBrokenHint = "the disk reports a fault; check it and the system log, then run again";

TEST(FileSystem, WritesAndReplaces) {
  const TempFolder folder;
  FileSystem& fs = real_file_system();
  const std::string path = folder / "a";
  {
    const auto file = fs.create(path);
    file->write(bytes_of("hello world"));
    file->write_at(0, bytes_of("J"));
    file->write({});
    file->sync();
    file->close();
    file->close();  // once more is fine
  }
  EXPECT_EQ(test::read_bytes(path), "Jello world");
  fs.create(path)->close();
  EXPECT_EQ(test::read_bytes(path), "");
  write_file_atomically(fs, path, std::string_view("one"));
  write_file_atomically(fs, path, std::string_view("two"));
  EXPECT_EQ(test::read_bytes(path), "two");
  fs.copy_file(path, folder / "b");
  EXPECT_EQ(test::read_bytes(folder / "b"), "two");
  fs.rename(folder / "b", folder / "c");
  fs.make_directory(folder / "d");
  fs.make_directory(folder / "d");
  fs.sync_directory(folder / "d");
  fs.remove_all(folder / "d");
  fs.remove_all(folder / "d");
  EXPECT_EQ(test::read_tree(folder.path()), (std::map<std::string, std::string>{{"a", "two"}, {"c", "two"}}));
}

TEST(FileSystem, RefusalsOfTheSystemNameThePathAndTheWay) {
  const TempFolder folder;
  FileSystem& fs = real_file_system();
  const ErrorKind kind = ErrorKind::environment;
  const std::string missing = "the folder does not exist; create it first";
  expect_parts(error_of([&] { fs.create(folder / "no/a"); }),
               {.kind = kind,
                .message = "cannot create: No such file or directory",
                .path = folder / "no/a",
                .hint = missing});
  expect_parts(error_of([&] { fs.make_directory(folder / "no/a"); }),
               {.kind = kind,
                .message = "cannot create the folder: No such file or directory",
                .path = folder / "no/a",
                .hint = missing});
  test::write_bytes(folder / "file", "");
  expect_parts(error_of([&] { fs.make_directory(folder / "file"); }),
               {.kind = kind, .message = "cannot create the folder: File exists", .path = folder / "file"});
  expect_parts(error_of([&] { fs.rename(folder / "x", folder / "y"); }),
               {.kind = kind,
                .message = "cannot rename '" + folder / "x" + "' to this name: No such file or directory",
                .path = folder / "y",
                .hint = missing});
  // A device that is always full.
  const auto full = fs.create("/dev/full");
  expect_parts(error_of([&] { full->write(bytes_of("x")); }),
               {.kind = kind,
                .message = "cannot write: No space left on device",
                .path = "/dev/full",
                .hint = kFullHint});
}

// The kernel takes a part of a write only (here: up to the limit of a file's size), then refuses the rest.
TEST(FileSystem, ShortWrites) {
  const TempFolder folder;
  const std::string path = folder / "a";
  std::mt19937_64 random(1);
  const std::string data = test::random_bytes(random, 10'000);
  struct rlimit before {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  struct rlimit small = before;
  small.rlim_cur = 6'000;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const auto file = real_file_system().create(path);
  const auto error = error_of([&] { file->write(bytes_of(data)); });
  const auto at_error = error_of([&] { file->write_at(5'999, bytes_of("xy")); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, old_handler);
  expect_parts(error,
               {.kind = ErrorKind::environment, .message = "cannot write: File too large", .path = path});
  expect_parts(at_error,
               {.kind = ErrorKind::environment, .message = "cannot write: File too large", .path = path});
  EXPECT_EQ(test::read_bytes(path), data.substr(0, 5'999) + "x");
}

void ignore_signal(int /*number*/) {}

// Signals arrive all the time while a slow reader takes the bytes out of a pipe: writes are cut short or end
// with EINTR before the first byte, and every byte arrives once and in order.
TEST(FileSystem, InterruptedWrites) {
  const TempFolder folder;
  const std::string path = folder / "pipe";
  ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
  std::mt19937_64 random(2);
  const std::string data = test::random_bytes(random, 3'000'000);
  std::string received;
  struct sigaction action {};
  struct sigaction before {};
  action.sa_handler = ignore_signal;  // without SA_RESTART
  ASSERT_EQ(::sigaction(SIGALRM, &action, &before), 0);
  sigset_t alarm_only;
  sigemptyset(&alarm_only);
  sigaddset(&alarm_only, SIGALRM);
  ::pthread_sigmask(SIG_BLOCK, &alarm_only, nullptr);  // the reader inherits this: it is not to be disturbed
  std::thread reader([&] {
    std::ifstream in(path, std::ios::binary);
    std::string piece(50'000, '\0');
    while (in.read(piece.data(), static_cast<std::streamsize>(piece.size())) || in.gcount() > 0) {
      received.append(piece, 0, static_cast<std::size_t>(in.gcount()));
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  ::pthread_sigmask(SIG_UNBLOCK, &alarm_only, nullptr);
  const itimerval often{{0, 300}, {0, 300}};
  const itimerval never{};
  ::setitimer(ITIMER_REAL, &often, nullptr);
  {
    const auto file = real_file_system().create(path);
    file->write(bytes_of(data));
    file->sync();  // pipes cannot be fsynced (EINVAL), which is no error
    file->close();
  }
  reader.join();
  ::setitimer(ITIMER_REAL, &never, nullptr);
  ::sigaction(SIGALRM, &before, nullptr);
  EXPECT_TRUE(received == data) << received.size();
}

TEST(FileSystem, AtomicWriteIsAllOrNothing) {
  FaultInjectingFileSystem counting;
  const TempFolder first;
  write_file_atomically(counting, first / "f", std::string_view("new content"));
  ASSERT_GE(counting.operations(), 6U);  // create, write, sync, close, rename, sync of the folder
  EXPECT_EQ(counting.syncs(), 2U);
  for (const Fault fault : {Fault::no_space, Fault::io_error, Fault::crash}) {
    for (std::uint64_t at = 0; at < counting.operations(); ++at) {
      for (const bool existed : {false, true}) {
        const TempFolder folder;
        const std::string path = folder / "f";
        if (existed) test::write_bytes(path, "old content");
        FaultInjectingFileSystem fs(fault, at);
        std::optional<Error> error;
        bool crashed = false;
        try {
          error = error_of([&] { write_file_atomically(fs, path, std::string_view("new content")); });
        } catch (const SimulatedCrash&) {
          crashed = true;
        }
        SCOPED_TRACE(fs.failed_operation());
        EXPECT_EQ(crashed, fault == Fault::crash);
        ASSERT_EQ(error.has_value(), fault != Fault::crash);
        const bool renamed = fs.failed_operation().starts_with("sync folder");
        if (renamed) {
          EXPECT_EQ(test::read_bytes(path), "new content");
        } else if (existed) {
          EXPECT_EQ(test::read_bytes(path), "old content");
        } else {
          EXPECT_FALSE(stdfs::exists(path));
        }
        if (!error) continue;
        EXPECT_FALSE(stdfs::exists(path + ".tmp"));
        EXPECT_EQ(error->kind(), ErrorKind::environment);
        EXPECT_TRUE(error->path().starts_with(folder.str()));
        EXPECT_EQ(error->hint(), fault == Fault::no_space ? kFullHint : kBrokenHint);
      }
    }
  }
}

// A safetensors file that was not written to its end never loads.
TEST(SafetensorsWriter, FaultsLeaveNothingThatLoads) {
  std::mt19937_64 random(3);
  const std::string data = test::random_bytes(random, 64);
  const auto write = [&](FileSystem& fs, const std::string& path) {
    SafetensorsWriter writer(fs, path, {{"a", Dtype::f32, {4}}, {"b", Dtype::u8, {48}}}, {{"k", "v"}});
    for (std::size_t at = 0; at < data.size(); at += 16) {
      writer.append(std::as_bytes(std::span(data)).subspan(at, 16));
    }
    writer.finish();
  };
  const TempFolder whole;
  FaultInjectingFileSystem counting;
  write(counting, whole / "m");
  ASSERT_EQ(counting.operations(), 8U);  // create, head, 4 pieces, sync, close
  EXPECT_EQ(counting.syncs(), 1U);
  for (const Fault fault : {Fault::no_space, Fault::io_error, Fault::crash}) {
    for (std::uint64_t at = 0; at < counting.operations(); ++at) {
      const TempFolder folder;
      const std::string path = folder / "m";
      FaultInjectingFileSystem fs(fault, at);
      bool failed = false;
      try {
        const auto error = error_of([&] { write(fs, path); });
        failed = error.has_value();
        if (error) {
          EXPECT_EQ(error->kind(), ErrorKind::environment);
          EXPECT_EQ(error->path(), path);
          EXPECT_EQ(error->hint(), fault == Fault::no_space ? kFullHint : kBrokenHint);
        }
      } catch (const SimulatedCrash&) {
        failed = true;
      }
      SCOPED_TRACE(fs.failed_operation());
      EXPECT_TRUE(failed);
      if (at < 6) {
        const auto error = error_of([&] { const SafetensorsFile file(path); });
        ASSERT_TRUE(error) << at;
        EXPECT_EQ(error->kind(), ErrorKind::input);
      } else {  // every byte had been written
        EXPECT_EQ(test::read_bytes(path), test::read_bytes(whole / "m"));
      }
    }
  }
}

TEST(FileSystem, ReadTextFile) {
  const TempFolder folder;
  const std::string path = folder / "t";
  for (const std::size_t size : {0UL, 1UL, 65'535UL, 65'536UL, 65'537UL, 200'000UL}) {
    const std::string text(size, 'x');
    test::write_bytes(path, text);
    EXPECT_EQ(read_text_file(path), text);
    EXPECT_EQ(read_text_file(path, size), text);
    if (size == 0) continue;
    expect_parts(error_of([&] { read_text_file(path, size - 1); }),
                 {.message = "file is too long",
                  .path = path,
                  .expected = "at most " + std::to_string(size - 1) + " bytes",
                  .found = std::to_string(size) + " or more"});
  }
  expect_parts(error_of([&] { read_text_file(folder / "none"); }),
               {.message = "file not found", .path = folder / "none"});
  expect_parts(error_of([&] { read_text_file(folder.path()); }),
               {.message = "a folder, not a file", .path = folder.path()});
  // A pipe has no size in advance; the limit holds there too.
  const std::string pipe = folder / "p";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  for (const std::uint64_t limit : {300'000U, 299'999U}) {
    std::thread writer([&] {
      std::ofstream out(pipe, std::ios::binary);
      out << std::string(300'000, 'y');
    });
    const auto old_handler = std::signal(SIGPIPE, SIG_IGN);
    const auto error = error_of([&] { EXPECT_EQ(read_text_file(pipe, limit), std::string(300'000, 'y')); });
    writer.join();
    std::signal(SIGPIPE, old_handler);
    EXPECT_EQ(error.has_value(), limit < 300'000U);
  }
}

TEST(FileSystem, ParentFolder) {
  for (const auto& [path, parent] : std::vector<std::pair<std::string, std::string>>{{"a/b/c", "a/b"},
                                                                                     {"c", "."},
                                                                                     {"a/b/", "a"},
                                                                                     {"a//b//", "a"},
                                                                                     {"/a", "/"},
                                                                                     {"/", "/"},
                                                                                     {"", "."},
                                                                                     {"//a", "/"},
                                                                                     {"./a", "."}}) {
    EXPECT_EQ(parent_folder(path), parent) << path;
  }
}

}  // namespace
}  // namespace fireq::formats
