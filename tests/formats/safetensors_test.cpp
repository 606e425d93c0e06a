// Every malformed header as exact bytes, with the parts of its message; sizes at -1, exact and +1; and files
// that were changed at random.
#include "formats/safetensors.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "formats/file_system.hpp"
#include "tests/formats/support.hpp"

namespace fireq::formats {
namespace {

using test::error_of;
using test::safetensors_bytes;
using test::TempFolder;
using test::text_of;

SafetensorsHeader parse(const std::string& bytes) {
  return parse_safetensors_header(std::as_bytes(std::span(bytes)), bytes.size());
}

struct Refusal {
  const char* name;
  std::string bytes;
  std::string message;  // exact, or its beginning when it ends in "..."
  std::string tensor;
  std::optional<std::uint64_t> offset = std::nullopt;
  std::string expected = {};
  std::string found = {};
};

std::string header_of(const std::string& fields) {
  return "{\"a\":{" + fields + "}}";
}
std::string file_of(const std::string& fields, std::size_t data) {
  return safetensors_bytes(header_of(fields), std::string(data, 'x'));
}
const std::string kF32x2 = R"("dtype":"F32","shape":[2],"data_offsets":[0,8])";

std::vector<Refusal> refusals() {
  const std::string number = "a whole number from 0 to 2^53 in plain digits";
  const auto start = [](const std::string& header) { return std::uint64_t{8} + header.size(); };
  const std::string two_a = R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                            R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
  const std::string twin = R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                           R"("\u0061":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
  const std::string hole = R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                           R"("b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})";
  const std::string overlap = R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                              R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})";
  const std::string same_range = R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                                 R"("b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})";
  const std::string starts_late = header_of(R"("dtype":"U8","shape":[1],"data_offsets":[1,2])");
  const std::string good = header_of(kF32x2);
  std::string bom = good;
  bom.insert(0, "\xef\xbb\xbf");
  std::string zero = good;
  zero += std::string("\0}", 2);
  return {
      {"empty file", "", "file is too short for a safetensors header", "", 0, "at least 8 bytes", "0"},
      {"7 bytes", std::string(7, '\0'), "file is too short for a safetensors header", "", 0,
       "at least 8 bytes", "7"},
      {"length 0", test::length_word(0), "the header is no JSON object", "", 8, "'{' as its first byte",
       "an empty header"},
      {"length one over the file", test::length_word(3) + "{}", "safetensors header length is out of range",
       "", 0, "at most 2", "3"},
      {"length 2^64-1", test::length_word(~std::uint64_t{0}) + "{}",
       "safetensors header length is out of range", "", 0, "at most 100000000", "18446744073709551615"},
      {"length 2^63", test::length_word(std::uint64_t{1} << 63U) + "{}",
       "safetensors header length is out of range", "", 0, "at most 100000000", "9223372036854775808"},
      {"not JSON", safetensors_bytes("{\"a\":", ""), "the header is not valid JSON...", "", 13},
      {"text after the object", safetensors_bytes(good + "x", std::string(8, 'x')),
       "the header is not valid JSON...", "", start(good)},
      {"two objects", safetensors_bytes("{}{}", ""), "the header is not valid JSON...", "", 10},
      {"zero byte after the object", safetensors_bytes(zero, std::string(8, 'x')),
       "not valid JSON: a zero byte", "", start(good)},
      {"byte order mark", safetensors_bytes(bom, std::string(8, 'x')), "the header is no JSON object", "", 8,
       "'{' as its first byte"},
      {"leading space", safetensors_bytes(" " + good, std::string(8, 'x')), "the header is no JSON object",
       "", 8, "'{' as its first byte", "' '"},
      {"array", safetensors_bytes("[]", ""), "the header is no JSON object", "", 8, "'{' as its first byte",
       "'['"},
      {"not UTF-8", safetensors_bytes("{\"\xff\":{}}", ""), "the header is not valid JSON...", "", 10},
      {"overlong UTF-8", safetensors_bytes("{\"\xc0\x80\":{}}", ""), "the header is not valid JSON...", "",
       10},
      {"lone surrogate", safetensors_bytes(R"({"\ud800":{}})", ""), "the header is not valid JSON...", "",
       16},
      {"comment", safetensors_bytes("{/**/}", ""), "the header is not valid JSON...", "", 9},
      {"duplicate tensor", safetensors_bytes(two_a, "x"), "two tensors have the same name", "a", 8},
      {"escaped twin", safetensors_bytes(twin, "x"), "two tensors have the same name", "a", 8},
      {"duplicate field", file_of(R"("dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1])", 1),
       "a key is there twice", "a", 8, "", "'shape'"},
      {"duplicate field, escaped",
       file_of(R"("dtype":"U8","shape":[1],"sh\u0061pe":[1],"data_offsets":[0,1])", 1),
       "a key is there twice", "a", 8, "", "'shape'"},
      {"duplicate metadata key", safetensors_bytes(R"({"__metadata__":{"k":"1","\u006b":"2"}})", ""),
       "__metadata__ has a key twice", "", 8, "", "'k'"},
      {"duplicate __metadata__", safetensors_bytes(R"({"__metadata__":{},"__metadata__":{}})", ""),
       "two tensors have the same name", "__metadata__", 8},
      {"metadata is a string", safetensors_bytes(R"({"__metadata__":"x"})", ""), "__metadata__ is no object",
       "", 8, "", "a string"},
      {"metadata is null", safetensors_bytes(R"({"__metadata__":null})", ""), "__metadata__ is no object", "",
       8, "", "null"},
      {"metadata is a list", safetensors_bytes(R"({"__metadata__":[]})", ""), "__metadata__ is no object", "",
       8, "", "an array"},
      {"metadata number", safetensors_bytes(R"({"__metadata__":{"k":1}})", ""),
       "__metadata__ may hold strings only", "", 8, "", "'k': 1"},
      {"metadata object", safetensors_bytes(R"({"__metadata__":{"k":{}}})", ""),
       "__metadata__ may hold strings only", "", 8, "", "'k': an object"},
      {"entry is a number", safetensors_bytes(R"({"a":5})", ""), "a tensor's entry is no object", "a", 8, "",
       "5"},
      {"entry is a list", safetensors_bytes(R"({"a":[[]]})", ""), "a tensor's entry is no object", "a", 8, "",
       "an array"},
      {"no dtype", file_of(R"("shape":[1],"data_offsets":[0,1])", 1), "a key is missing", "a", 8, "dtype"},
      {"no shape", file_of(R"("dtype":"U8","data_offsets":[0,1])", 1), "a key is missing", "a", 8, "shape"},
      {"no offsets", file_of(R"("dtype":"U8","shape":[1])", 1), "a key is missing", "a", 8, "data_offsets"},
      {"extra field", file_of(kF32x2 + R"(,"x":1)", 8), "unknown key", "a", 8,
       "dtype, shape and data_offsets", "'x'"},
      {"unknown dtype", file_of(R"("dtype":"F33","shape":[2],"data_offsets":[0,8])", 8), "unknown dtype", "a",
       8, "", "'F33'"},
      {"dtype in lower case", file_of(R"("dtype":"f32","shape":[2],"data_offsets":[0,8])", 8),
       "unknown dtype", "a", 8, "", "'f32'"},
      {"dtype is a number", file_of(R"("dtype":4,"shape":[2],"data_offsets":[0,8])", 8),
       "bad value for dtype", "a", 8, "a string", "4"},
      {"dtype is an object", file_of(R"("dtype":{},"shape":[2],"data_offsets":[0,8])", 8),
       "bad value for dtype", "a", 8, "a string", "an object"},
      {"shape is a number", file_of(R"("dtype":"F32","shape":2,"data_offsets":[0,8])", 8),
       "bad value for shape", "a", 8, "an array of numbers", "2"},
      {"shape is a string", file_of(R"("dtype":"F32","shape":"2","data_offsets":[0,8])", 8),
       "bad value for shape", "a", 8, "an array of numbers", "a string"},
      {"nested shape", file_of(R"("dtype":"F32","shape":[[2]],"data_offsets":[0,8])", 8),
       "bad value in shape", "a", 8, "whole numbers", "an array"},
      {"null in shape", file_of(R"("dtype":"F32","shape":[null],"data_offsets":[0,8])", 8),
       "bad value in shape", "a", 8, "whole numbers", "null"},
      {"true in offsets", file_of(R"("dtype":"F32","shape":[2],"data_offsets":[true,8])", 8),
       "bad value in data_offsets", "a", 8, "whole numbers", "true"},
      {"negative dimension", file_of(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])", 8),
       "bad number in shape", "a", 8, number, "-2"},
      {"minus zero", file_of(R"("dtype":"F32","shape":[2],"data_offsets":[-0,8])", 8),
       "bad number in data_offsets", "a", 8, number, "-0"},
      {"fraction", file_of(R"("dtype":"F32","shape":[2],"data_offsets":[0,8.0])", 8),
       "bad number in data_offsets", "a", 8, number, "8.0"},
      {"exponent", file_of(R"("dtype":"F32","shape":[2e0],"data_offsets":[0,8])", 8), "bad number in shape",
       "a", 8, number, "2e0"},
      {"2^53+1", file_of(R"("dtype":"F32","shape":[0,9007199254740993],"data_offsets":[0,0])", 0),
       "bad number in shape", "a", 8, number, "9007199254740993"},
      {"2^64", file_of(R"("dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551616])", 8),
       "bad number in data_offsets", "a", 8, number, "18446744073709551616"},
      {"one offset", file_of(R"("dtype":"F32","shape":[2],"data_offsets":[0])", 8),
       "data_offsets has not two numbers", "a", 8, "", "1"},
      {"no offset", file_of(R"("dtype":"F32","shape":[2],"data_offsets":[])", 8),
       "data_offsets has not two numbers", "a", 8, "", "0"},
      {"three offsets", file_of(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])", 8),
       "data_offsets has more than two numbers", "a", 8},
      {"backwards", file_of(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])", 8),
       "data_offsets run backwards", "a", start(header_of(kF32x2)) + 8, "", "8 to 0"},
      {"product overflows",
       file_of(R"("dtype":"F32","shape":[9007199254740992,9007199254740992],"data_offsets":[0,0])", 0),
       "size overflows 64 bits: shape", "a"},
      {"bytes overflow", file_of(R"("dtype":"F64","shape":[2147483648,2147483648],"data_offsets":[0,0])", 0),
       "size overflows 64 bits: bytes of a tensor", "a"},
      {"range one short", file_of(R"("dtype":"F32","shape":[2],"data_offsets":[0,7])", 7),
       "tensor's byte range does not fit its shape", "a", start(header_of(kF32x2)), "8 bytes for F32 [2]",
       "7 bytes"},
      {"range one long", file_of(R"("dtype":"F32","shape":[2],"data_offsets":[0,9])", 9),
       "tensor's byte range does not fit its shape", "a", start(header_of(kF32x2)), "8 bytes for F32 [2]",
       "9 bytes"},
      {"zero-size with bytes", file_of(R"("dtype":"F32","shape":[0],"data_offsets":[0,4])", 4),
       "tensor's byte range does not fit its shape", "a", std::nullopt, "0 bytes for F32 [0]", "4 bytes"},
      {"rank 0 of two", file_of(R"("dtype":"F32","shape":[],"data_offsets":[0,8])", 8),
       "tensor's byte range does not fit its shape", "a", std::nullopt, "4 bytes for F32 []", "8 bytes"},
      {"file one byte short", file_of(kF32x2, 7), "tensor ends after the end of the file", "a", start(good),
       "an end of at most 7", "0 to 8"},
      {"file one byte long", file_of(kF32x2, 9), "bytes after the last tensor", "", start(good) + 8,
       std::string("a file of ").append(std::to_string(start(good) + 8)).append(" bytes"),
       std::to_string(start(good) + 9)},
      {"data without tensors", safetensors_bytes("{}", "x"), "bytes after the last tensor", "", 10,
       "a file of 10 bytes", "11"},
      {"hole", safetensors_bytes(hole, "xyz"), "a hole in the data before this tensor", "b", start(hole) + 2,
       "begin 1", "begin 2"},
      {"overlap", safetensors_bytes(overlap, "xyz"), "tensor overlaps the one before it", "b",
       start(overlap) + 1, "begin 2", "begin 1"},
      {"two on one range", safetensors_bytes(same_range, "xy"), "tensor overlaps the one before it", "b",
       start(same_range), "begin 2", "begin 0"},
      {"begins late", safetensors_bytes(starts_late, "xy"), "a hole in the data before this tensor", "a",
       start(starts_late) + 1, "begin 0", "begin 1"},
      {"deep nesting", safetensors_bytes("{\"a\":{\"shape\":" + std::string(100000, '['), ""),
       "bad value in shape", "a", 8, "whole numbers", "an array"},
  };
}

TEST(SafetensorsHeader, RefusesEveryMalformedFileAndSaysWhere) {
  std::set<std::string> names;
  for (const Refusal& r : refusals()) {
    SCOPED_TRACE(r.name);
    ASSERT_TRUE(names.insert(r.name).second);
    const std::optional<Error> error = error_of([&] { parse(r.bytes); });
    ASSERT_TRUE(error.has_value());
    EXPECT_EQ(error->kind(), ErrorKind::input) << error->what();
    if (r.message.ends_with("...")) {
      EXPECT_TRUE(error->message().starts_with(r.message.substr(0, r.message.size() - 3))) << error->what();
    } else {
      EXPECT_EQ(error->message(), r.message) << error->what();
    }
    EXPECT_EQ(error->tensor(), r.tensor) << error->what();
    if (r.offset) {
      EXPECT_EQ(error->offset(), r.offset) << error->what();
    }
    if (!r.expected.empty()) {
      EXPECT_EQ(error->expected(), r.expected) << error->what();
    }
    if (!r.found.empty()) {
      EXPECT_EQ(error->found(), r.found) << error->what();
    }
    // The same from a file, with the path in front.
    const TempFolder folder;
    const std::string path = folder / "m.safetensors";
    test::write_bytes(path, r.bytes);
    const std::optional<Error> from_file = error_of([&] { const SafetensorsFile file(path); });
    ASSERT_TRUE(from_file.has_value());
    EXPECT_EQ(from_file->path(), path);
    EXPECT_EQ(from_file->message(), error->message());
  }
}

TEST(SafetensorsHeader, AcceptsTheEdges) {
  EXPECT_TRUE(parse(safetensors_bytes("{}", "")).tensors.empty());
  EXPECT_TRUE(parse(safetensors_bytes("{}      \n\t ", "")).tensors.empty());
  const SafetensorsHeader scalar = parse(file_of(R"("dtype":"F32","shape":[],"data_offsets":[0,4])", 4));
  EXPECT_TRUE(scalar.tensors.at(0).shape.empty());
  const SafetensorsHeader largest =
      parse(file_of(R"("dtype":"F32","shape":[0,9007199254740992],"data_offsets":[0,0])", 0));
  EXPECT_EQ(largest.tensors.at(0).shape.at(1), std::uint64_t{1} << 53U);
  // Zero-size tensors at the front, between and behind; entries in any order; names of any UTF-8.
  const SafetensorsHeader mixed = parse(safetensors_bytes(
      R"({"z":{"data_offsets":[4,4],"shape":[0,7],"dtype":"F64"},"\u00e9\"\\":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]},)"
      R"("__metadata__":{"format":"pt","":""},"":{"dtype":"BOOL","shape":[0],"data_offsets":[0,0]},)"
      R"("k":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[4,7]},"e":{"dtype":"I64","shape":[0],"data_offsets":[7,7]}})",
      "0123456"));
  ASSERT_EQ(mixed.tensors.size(), 5U);
  std::vector<std::string> order;
  for (const TensorInfo& t : mixed.tensors) order.push_back(t.name);
  EXPECT_EQ(order, (std::vector<std::string>{"", "\xc3\xa9\"\\", "z", "k", "e"}));
  EXPECT_EQ(mixed.metadata, (std::map<std::string, std::string>{{"format", "pt"}, {"", ""}}));
}

TEST(SafetensorsHeader, LongestHeader) {
  // 100,000,000 bytes pass, one more does not; the text is padding, so only the length word decides.
  for (const int over : {-1, 0, 1}) {
    const auto length = static_cast<std::uint64_t>(100'000'000 + over);
    std::string bytes = test::length_word(length) + "{}";
    bytes.resize(8 + length, ' ');
    const std::optional<Error> error = error_of([&] { parse(bytes); });
    EXPECT_EQ(error.has_value(), over > 0) << over;
    if (error) {
      EXPECT_EQ(error->found(), "100000001");
    }
  }
}

TEST(SafetensorsFile, MissingFolderAndPipe) {
  const TempFolder folder;
  const auto missing = error_of([&] { const SafetensorsFile file(folder / "none.safetensors"); });
  ASSERT_TRUE(missing);
  EXPECT_EQ(missing->kind(), ErrorKind::input);
  EXPECT_EQ(missing->message(), "file not found");
  EXPECT_EQ(missing->path(), folder / "none.safetensors");
  const auto is_folder = error_of([&] { const SafetensorsFile file(folder.path()); });
  ASSERT_TRUE(is_folder);
  EXPECT_EQ(is_folder->message(), "not a regular file");
}

TEST(SafetensorsFile, LfsPointerIsNamed) {
  const TempFolder folder;
  test::write_bytes(folder / "m.safetensors",
                    "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n");
  const auto error = error_of([&] { const SafetensorsFile file(folder / "m.safetensors"); });
  ASSERT_TRUE(error);
  EXPECT_NE(error->hint().find("git lfs pull"), std::string::npos);
}

// Random tensors of every dtype: what the writer wrote is what the reader gives, for any cut of the appends.
TEST(SafetensorsWriter, RoundTripOfRandomTensors) {
  std::mt19937_64 random(20260101);
  const TempFolder folder;
  for (int round = 0; round < 30; ++round) {
    std::vector<TensorPlan> plan;
    std::string data;
    const std::size_t count = random() % 12;
    for (std::size_t i = 0; i < count; ++i) {
      TensorPlan t;
      t.name.append("t").append(std::to_string(i)).append("\"\\\n\xc3\xa9");
      t.dtype = static_cast<Dtype>(random() % 15);
      for (std::size_t r = random() % 4; r > 0; --r) t.shape.push_back(random() % 9);
      std::size_t bytes = dtype_size(t.dtype);
      for (const std::uint64_t d : t.shape) bytes *= d;
      data += test::random_bytes(random, bytes);
      plan.push_back(std::move(t));
    }
    const std::map<std::string, std::string> metadata{{"a", "1"}, {"z\"", "\xe2\x82\xac"}};
    const std::string path = folder / std::to_string(round);
    const auto write = [&](std::size_t largest_piece) {
      SafetensorsWriter writer(real_file_system(), path, plan, metadata);
      for (std::size_t at = 0; at < data.size();) {
        const std::size_t n = std::min<std::size_t>(1 + random() % largest_piece, data.size() - at);
        writer.append(std::as_bytes(std::span(data).subspan(at, n)));
        at += n;
      }
      writer.finish();
      EXPECT_EQ(writer.file_size(), std::filesystem::file_size(path));
      return test::read_bytes(path);
    };
    const std::string first = write(7);
    EXPECT_EQ(first, write(1000));
    const SafetensorsFile file(path);
    EXPECT_EQ(file.header().metadata, metadata);
    EXPECT_EQ(file.header().data_start % 8, 0U);
    ASSERT_EQ(file.header().tensors.size(), plan.size());
    std::map<std::string, TensorInfo> by_name;
    for (const TensorInfo& t : file.header().tensors) by_name[t.name] = t;
    std::size_t at = 0;
    for (const TensorPlan& t : plan) {
      const TensorView view = file.tensor(by_name.at(t.name));
      EXPECT_EQ(view.dtype, t.dtype);
      EXPECT_EQ(view.shape, t.shape);
      EXPECT_EQ(text_of(view.data), std::string_view(data).substr(at, view.data.size()));
      at += view.data.size();
      file.release(by_name.at(t.name));
      EXPECT_EQ(text_of(file.tensor(by_name.at(t.name)).data), text_of(view.data));
    }
    EXPECT_EQ(at, data.size());
  }
}

TEST(SafetensorsWriter, ExactBytes) {
  const TempFolder folder;
  SafetensorsWriter writer(real_file_system(), folder / "m", {{"b", Dtype::f32, {1}}, {"a", Dtype::u8, {}}},
                           {{"format", "pt"}});
  writer.append(std::as_bytes(std::span("\1\2\3\4\5", 5)));
  writer.finish();
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
      R"("a":{"dtype":"U8","shape":[],"data_offsets":[4,5]}})";
  const std::size_t padding = (8 - header.size() % 8) % 8;
  EXPECT_EQ(test::read_bytes(folder / "m"),
            safetensors_bytes(header + std::string(padding, ' '), "\1\2\3\4\5"));
}

TEST(SafetensorsWriter, CountsItsBytes) {
  const TempFolder folder;
  const std::vector<std::byte> bytes(9);
  {
    SafetensorsWriter writer(real_file_system(), folder / "m", {{"a", Dtype::f32, {2}}}, {});
    writer.append(std::span(bytes).first(7));
    const auto few = error_of([&] { writer.finish(); });
    ASSERT_TRUE(few);
    EXPECT_EQ(few->kind(), ErrorKind::internal);
    EXPECT_EQ(few->found(), "7");
    EXPECT_TRUE(error_of([&] { writer.append(std::span(bytes).first(2)); }));
    writer.append(std::span(bytes).first(1));
    EXPECT_FALSE(error_of([&] { writer.finish(); }));
  }
  const auto twice = error_of([&] {
    const SafetensorsWriter writer(real_file_system(), folder / "n",
                                   {{"a", Dtype::f32, {2}}, {"a", Dtype::f32, {2}}}, {});
  });
  ASSERT_TRUE(twice);
  EXPECT_EQ(twice->tensor(), "a");
  EXPECT_FALSE(std::filesystem::exists(folder / "n"));
}

// Whatever is changed in a valid file, the parser either refuses with Error(input) or returns ranges that lie
// inside the file and tile it.
TEST(SafetensorsHeader, RandomDamageNeverEscapesTheChecks) {
  std::mt19937_64 random(77);
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"model.a":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},)"
      R"("model.b":{"dtype":"U8","shape":[5],"data_offsets":[12,17]},"c":{"dtype":"I64","shape":[],"data_offsets":[17,25]}})";
  const std::string whole = safetensors_bytes(header, std::string(25, 'd'));
  const std::vector<std::string> pieces{"9007199254740992",
                                        "-1",
                                        "1e3",
                                        "[",
                                        "]",
                                        "{",
                                        "}",
                                        "\"",
                                        ",",
                                        "0",
                                        "\\u0000",
                                        "4294967296",
                                        "null",
                                        "\"a\":",
                                        "18446744073709551615",
                                        "\xff"};
  std::size_t accepted = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string bytes = whole;
    for (std::size_t edits = 1 + random() % 3; edits > 0 && !bytes.empty(); --edits) {
      const std::size_t at = random() % bytes.size();
      switch (random() % 5) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes.erase(at, 1 + random() % 4);
          break;
        case 2:
          bytes.insert(at, pieces[random() % pieces.size()]);
          break;
        case 3:
          bytes.resize(at + 1);
          break;
        default:
          bytes[at] = static_cast<char>('0' + random() % 10);
      }
    }
    // Half of the time with a length word that fits, so that the damage reaches the JSON parser.
    if (random() % 2 == 0 && bytes.size() > 34) bytes.replace(0, 8, test::length_word(bytes.size() - 33));
    SafetensorsHeader parsed;
    const std::optional<Error> error = error_of([&] { parsed = parse(bytes); });
    if (error) {
      ASSERT_EQ(error->kind(), ErrorKind::input) << error->what();
      continue;
    }
    ++accepted;
    std::uint64_t cursor = 0;
    for (const TensorInfo& t : parsed.tensors) {
      ASSERT_EQ(t.begin, cursor);
      ASSERT_LE(t.begin, t.end);
      cursor = t.end;
    }
    ASSERT_EQ(parsed.data_start + cursor, bytes.size());
  }
  EXPECT_GT(accepted, 100U);  // the damage is not so heavy that nothing is tested
}

}  // namespace
}  // namespace fireq::formats
