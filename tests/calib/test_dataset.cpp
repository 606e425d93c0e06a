#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <numeric>
#include <random>
#include <set>

#include "calib/dataset.hpp"
#include "common/error.hpp"

namespace fireq::calib {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

class Dataset : public testing::Test {
 protected:
  void SetUp() override {
    const auto* info = testing::UnitTest::GetInstance()->current_test_info();
    folder_ = fs::temp_directory_path() /
              ("fireq-dataset-" + std::string(info->name()) + "-" + std::to_string(::getpid()));
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::string write(const std::string& name, const std::string& bytes) const {
    fs::create_directories((folder_ / name).parent_path());
    std::ofstream(folder_ / name, std::ios::binary) << bytes;
    return (folder_ / name).string();
  }
  fs::path folder_;
};

std::string error_of(ErrorKind kind, const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), kind) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

std::vector<std::int32_t> counting(std::size_t n) {
  std::vector<std::int32_t> ids(n);
  std::iota(ids.begin(), ids.end(), 100);
  return ids;
}

TEST_F(Dataset, JoinsFilesAndCutsCodePoints) {
  const std::string a = write("a.txt", "h\xc3\xa9llo");  // 5 code points
  const std::string b = write("b.txt", "w\xf0\x9f\x98\x80rld\r\n");
  EXPECT_EQ(load_text({.files = {a, b}}), "h\xc3\xa9llo\nw\xf0\x9f\x98\x80rld\r\n");
  EXPECT_EQ(load_text({.files = {a, b}, .skip_chars = 1, .max_chars = 7}), "\xc3\xa9llo\nw\xf0\x9f\x98\x80");
  EXPECT_THAT(error_of(ErrorKind::input, [&] { load_text({.files = {a}, .skip_chars = 5}); }),
              HasSubstr("--skip-chars"));
}

TEST_F(Dataset, ReadsDirectoriesInPathOrder) {
  write("d/b.txt", "two");
  write("d/a/x.md", "one");
  write("d/c.jsonl", "{\"text\": \"three\"}\n");
  write("d/ignored.bin", "\xff\xff");
  EXPECT_EQ(load_text({.files = {(folder_ / "d").string()}}), "one\ntwo\nthree");
  fs::create_directories(folder_ / "empty");
  EXPECT_THAT(error_of(ErrorKind::input, [&] { load_text({.files = {(folder_ / "empty").string()}}); }),
              HasSubstr("holds no text"));
}

TEST_F(Dataset, ReadsJsonlAndNamesTheBadLine) {
  const std::string good = write("g.jsonl", "{\"t\": \"one\"}\r\n\n{\"t\": \"tw\\u00f6\", \"u\": 1}");
  EXPECT_EQ(load_text({.files = {good}, .jsonl_field = "t"}), "one\ntw\xc3\xb6");
  const std::string bad = write("b.jsonl", "{\"t\": \"one\"}\n{\"u\": 2}\n");
  const std::string line =
      error_of(ErrorKind::input, [&] { load_text({.files = {bad}, .jsonl_field = "t"}); });
  EXPECT_THAT(line, HasSubstr("b.jsonl"));
  EXPECT_THAT(line, HasSubstr("line 2"));
  EXPECT_THAT(line, HasSubstr("offset 13"));
  const std::string broken = write("c.jsonl", "{\"t\": ");
  EXPECT_THAT(error_of(ErrorKind::input, [&] { load_text({.files = {broken}, .jsonl_field = "t"}); }),
              HasSubstr("line 1"));
  const std::string number = write("n.jsonl", "{\"t\": 3}");
  EXPECT_THAT(error_of(ErrorKind::input, [&] { load_text({.files = {number}, .jsonl_field = "t"}); }),
              HasSubstr("number"));
}

TEST_F(Dataset, RefusesMissingEmptyAndMalformedText) {
  EXPECT_THAT(error_of(ErrorKind::usage, [&] { load_text({.files = {(folder_ / "none.txt").string()}}); }),
              HasSubstr("none.txt"));
  EXPECT_THAT(error_of(ErrorKind::usage, [] { load_text({}); }), HasSubstr("--text"));
  const std::string empty = write("e.txt", "");
  EXPECT_THAT(error_of(ErrorKind::input, [&] { load_text({.files = {empty}}); }), HasSubstr("empty"));
  const std::string latin = write("l.txt", "caf\xe9 noir");
  const std::string line = error_of(ErrorKind::input, [&] { load_text({.files = {latin}}); });
  EXPECT_THAT(line, HasSubstr("l.txt"));
  EXPECT_THAT(line, HasSubstr("offset 3"));
}

TEST_F(Dataset, TokenFilesAreChecked) {
  const std::string good = write("t.u32", std::string("\x01\0\0\0\xff\x01\0\0", 8));
  EXPECT_EQ(load_tokens(good, 512), (std::vector<std::int32_t>{1, 511}));
  EXPECT_THAT(error_of(ErrorKind::input, [&] { load_tokens(good, 511); }), HasSubstr("offset 4"));
  const std::string odd = write("o.u32", "12345");
  EXPECT_THAT(error_of(ErrorKind::input, [&] { load_tokens(odd, 512); }), HasSubstr("5 bytes"));
}

TEST(Windows, CutAtTheEdges) {
  for (const std::size_t n : {15U, 16U, 17U, 31U, 32U}) {
    const auto ids = counting(n);
    if (n >= 16) {
      const Windows w = make_evaluation_windows(ids, 16, Bos::none, {});
      EXPECT_EQ(w.count, n / 16);
      EXPECT_TRUE(std::equal(w.ids.begin(), w.ids.end(), ids.begin()));
    } else {
      EXPECT_THAT(error_of(ErrorKind::input, [&] { make_evaluation_windows(ids, 16, Bos::none, {}); }),
                  HasSubstr("at least 16 tokens"));
    }
    const Windows head = make_evaluation_windows(ids, 16, Bos::head, 1);
    EXPECT_EQ(head.count, (n + 1) / 16);
    EXPECT_EQ(head.ids[0], 1);
    EXPECT_EQ(head.ids[1], 100);
    const Windows each = make_evaluation_windows(ids, 16, Bos::window, 1);
    EXPECT_EQ(each.count, n / 15);
    for (std::uint64_t i = 0; i < each.count; ++i) {
      EXPECT_EQ(each.ids[i * 16], 1);
      EXPECT_EQ(each.ids[i * 16 + 1], 100 + static_cast<std::int32_t>(i * 15));
    }
  }
  EXPECT_THAT(error_of(ErrorKind::usage, [] { make_evaluation_windows(counting(8), 4, Bos::head, {}); }),
              HasSubstr("no BOS"));
  EXPECT_THAT(error_of(ErrorKind::usage, [] { make_evaluation_windows(counting(8), 1, Bos::none, {}); }),
              HasSubstr("at least 2"));
}

TEST(Windows, CalibrationDrawsWithoutRepetitionInTextOrder) {
  Progress silent;
  const auto ids = counting(16 * 50);
  std::set<std::vector<std::int32_t>> drawn;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const Windows w = make_calibration_windows(ids, 16, 10, seed, Bos::none, {}, silent);
    ASSERT_EQ(w.count, 10U);
    ASSERT_EQ(w.ids.size(), 160U);
    for (std::uint64_t i = 0; i < 10; ++i) {
      const std::int32_t first = w.ids[i * 16];
      EXPECT_EQ((first - 100) % 16, 0);
      for (std::int32_t j = 1; j < 16; ++j) EXPECT_EQ(w.ids[i * 16 + static_cast<std::size_t>(j)], first + j);
      if (i > 0) {
        EXPECT_GT(first, w.ids[(i - 1) * 16]);
      }
    }
    drawn.insert(w.ids);
    EXPECT_EQ(w.ids, make_calibration_windows(ids, 16, 10, seed, Bos::none, {}, silent).ids);
  }
  EXPECT_GT(drawn.size(), 15U);
}

TEST(Windows, FewerThanAskedForGivesAllAndWarns) {
  struct Counting : Progress {
    void warning(std::string_view line) override { lines.emplace_back(line); }
    std::vector<std::string> lines;
  } progress;
  const Windows w = make_calibration_windows(counting(50), 16, 10, 3, Bos::none, {}, progress);
  EXPECT_EQ(w.count, 3U);
  ASSERT_EQ(progress.lines.size(), 1U);
  EXPECT_THAT(progress.lines[0], HasSubstr("3 windows"));
}

std::vector<std::vector<std::int32_t>> cut_up(const Windows& windows) {
  std::vector<std::vector<std::int32_t>> out;
  for (std::uint64_t w = 0; w < windows.count; ++w) {
    const auto begin = windows.ids.begin() + static_cast<std::ptrdiff_t>(w * windows.length);
    out.emplace_back(begin, begin + static_cast<std::ptrdiff_t>(windows.length));
  }
  return out;
}

// count windows of the text, samples asked for -> windows calibrated on, held back.
TEST(Windows, SomeAreHeldBackFromCalibration) {
  struct Case {
    std::uint64_t count, samples, length, calibrated, held_back, held_length;
  };
  const std::vector<Case> cases{
      {50, 10, 16, 10, 1, 16},     {50, 40, 16, 40, 2, 16},   {50, 49, 16, 49, 1, 16},
      {50, 50, 16, 47, 3, 16},     {50, 90, 16, 47, 3, 16},   {8, 8, 16, 7, 1, 16},
      {7, 8, 16, 7, 0, 16},        {8, 7, 16, 7, 1, 16},      {600, 300, 256, 300, 16, 256},
      {70, 64, 3000, 64, 1, 3000}, {12, 9, 5000, 9, 1, 4096}, {9, 9, 5000, 8, 1, 4096}};
  Progress silent;
  for (const Case& c : cases) {
    SCOPED_TRACE(std::to_string(c.count) + " windows, " + std::to_string(c.samples) + " samples of " +
                 std::to_string(c.length));
    const auto ids = counting(c.count * c.length + c.length / 2);
    for (const std::uint64_t seed : {0U, 7U}) {
      const SplitWindows split =
          split_calibration_windows(ids, c.length, c.samples, seed, Bos::none, {}, silent);
      EXPECT_EQ(split.calibration.count, c.calibrated);
      EXPECT_EQ(split.held_back.count, c.held_back);
      EXPECT_EQ(split.held_back.length, c.held_length);
      std::set<std::int32_t> seen;
      for (const auto& window : cut_up(split.calibration)) seen.insert(window.front());
      const auto drawn =
          cut_up(make_calibration_windows(ids, c.length, c.samples, seed, Bos::none, {}, silent));
      if (c.samples < c.count) {
        EXPECT_EQ(cut_up(split.calibration), drawn);
      }
      // The last windows that calibration does not see, in order.
      std::vector<std::int32_t> rest;
      for (std::uint64_t w = 0; w < c.count; ++w) {
        const std::int32_t first = ids[w * c.length];
        if (!seen.contains(first)) rest.push_back(first);
      }
      ASSERT_GE(rest.size(), c.held_back);
      rest.erase(rest.begin(), rest.end() - static_cast<std::ptrdiff_t>(c.held_back));
      std::vector<std::int32_t> held;
      for (const auto& window : cut_up(split.held_back)) {
        held.push_back(window.front());
        EXPECT_EQ(window.back(), window.front() + static_cast<std::int32_t>(c.held_length) - 1);
      }
      EXPECT_EQ(held, rest);
    }
  }
}

TEST(Windows, FingerprintSeesOrderLengthAndIds) {
  Windows a{counting(32), 2, 16};
  Windows b{counting(32), 4, 8};
  Windows c{counting(32), 2, 16};
  c.ids[31] += 1;
  EXPECT_NE(fingerprint_of_windows(a), fingerprint_of_windows(b));
  EXPECT_NE(fingerprint_of_windows(a), fingerprint_of_windows(c));
  EXPECT_EQ(fingerprint_of_windows(a).size(), 32U);
}

}  // namespace
}  // namespace fireq::calib
