// Checkpoint folders: index and shards that disagree, names that leave the folder, downloads that are not
// whole; every refusal with the parts of its message.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "formats/checkpoint.hpp"
#include "formats/file_system.hpp"
#include "tests/formats/support.hpp"

namespace fireq::formats {
namespace {

namespace stdfs = std::filesystem;
using test::error_of;
using test::expect_parts;
using test::Parts;
using test::RawTensor;
using test::safetensors_of;
using test::TempFolder;
using test::write_bytes;

constexpr const char* kIndex = "model.safetensors.index.json";
constexpr const char* kFirst = "model-00001-of-00002.safetensors";
constexpr const char* kSecond = "model-00002-of-00002.safetensors";
const RawTensor kA{"a", "F32", "[2]", "12345678"};
const RawTensor kB{"b", "BF16", "[1,3]", "abcdef"};
const RawTensor kC{"c", "F16", "[]", "xy"};

std::string index_of(const std::vector<std::pair<std::string, std::string>>& map) {
  nlohmann::json index{{"metadata", {{"total_size", 1}}}, {"weight_map", nlohmann::json::object()}};
  for (const auto& [tensor, shard] : map) index["weight_map"][tensor] = shard;
  return index.dump();
}

// A complete checkpoint in two shards: a and c in the first, b in the second.
class Checkpoint {
 public:
  Checkpoint() {
    put(kFirst, safetensors_of({kA, kC}));
    put(kSecond, safetensors_of({kB}));
    put(kIndex, index_of({{"a", kFirst}, {"b", kSecond}, {"c", kFirst}}));
  }
  void put(const std::string& name, std::string_view bytes) const { write_bytes(at(name), bytes); }
  void remove(const std::string& name) const { stdfs::remove(at(name)); }
  std::string at(const std::string& name) const { return path() + "/" + name; }
  std::string path() const { return folder_ / "m"; }
  std::string beside(const std::string& name) const { return folder_ / name; }
  std::optional<Error> open() const {
    return error_of([&] { const CheckpointReader reader(path()); });
  }

 private:
  struct Made {
    explicit Made(const std::string& path) { stdfs::create_directory(path); }
  };
  TempFolder folder_;
  Made made_{folder_ / "m"};
};

TEST(Checkpoint, ReadsShardsThroughTheIndex) {
  const Checkpoint c;
  const CheckpointReader reader(c.path() + "//");  // trailing slashes are no part of the name
  EXPECT_EQ(reader.folder(), c.path());
  EXPECT_EQ(reader.names(), (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_TRUE(reader.contains("b"));
  EXPECT_FALSE(reader.contains("d"));
  EXPECT_EQ(test::text_of(reader.tensor("a").data), kA.data);
  EXPECT_EQ(test::text_of(reader.tensor("b").data), kB.data);
  EXPECT_EQ(test::text_of(reader.tensor("c").data), kC.data);
  EXPECT_EQ(reader.tensor("b").dtype, Dtype::bf16);
  EXPECT_EQ(reader.tensor("b").shape, (std::vector<std::uint64_t>{1, 3}));
  EXPECT_EQ(reader.file_of("b"), c.at(kSecond));
  EXPECT_EQ(reader.total_bytes(), 16U);
  reader.release("a");
  EXPECT_EQ(test::text_of(reader.tensor("a").data), kA.data);  // read again
  expect_parts(error_of([&] { reader.tensor("d"); }),
               {.message = "the tensor is missing", .path = c.path(), .tensor = "d"});
}

TEST(Checkpoint, OneFileNeedsNoIndex) {
  for (const char* name : {"model.safetensors", "other.safetensors", "model-00001-of-00001.safetensors",
                           "model-1-of-1.safetensors"}) {
    const TempFolder folder;
    write_bytes(folder / name, safetensors_of({kA, kB}));
    const CheckpointReader reader(folder.path());
    EXPECT_EQ(reader.names(), (std::vector<std::string>{"a", "b"}));
    EXPECT_EQ(reader.file_of("b"), folder / name);
  }
}

TEST(Checkpoint, OtherFilesBesideTheShardsAreNotRead) {
  const Checkpoint c;
  c.put("consolidated.safetensors", "garbage that must not be opened");
  c.put("pytorch_model.bin", "x");
  c.put("model.safetensors.bak", "x");
  EXPECT_FALSE(c.open());
}

struct Case {
  const char* name;
  std::function<void(const Checkpoint&)> damage;
  // Path and found are relative to the folder where they begin with "/".
  Parts parts;
};

Parts absolute(Parts parts, const Checkpoint& c) {
  parts.path = c.path() + parts.path;
  return parts;
}

TEST(Checkpoint, IndexAndShardsThatDisagree) {
  const std::vector<Case> cases{
      {"missing shard",
       [](const Checkpoint& c) { c.remove(kSecond); },
       {.message = "a shard is missing",
        .path = std::string("/") + kSecond,
        .tensor = "b",
        .hint = "the index names it; download it again"}},
      {"extra tensor",
       [](const Checkpoint& c) {
         c.put(kSecond, safetensors_of({kB, {"d", "U8", "[1]", "z"}}));
       },
       {.message = "tensor is not in the index", .path = std::string("/") + kSecond, .tensor = "d"}},
      {"tensor in the other shard",
       [](const Checkpoint& c) {
         c.put(kIndex, index_of({{"a", kFirst}, {"b", kSecond}, {"c", kSecond}}));
       },
       {.message = "tensor is in another shard than the index says",
        .path = std::string("/") + kFirst,
        .tensor = "c",
        .expected = kSecond,
        .found = kFirst}},
      {"tensor in two shards",
       [](const Checkpoint& c) {
         c.put(kSecond, safetensors_of({kA, kB}));
       },
       {.message = "tensor is in another shard than the index says",
        .path = std::string("/") + kSecond,
        .tensor = "a",
        .expected = kFirst,
        .found = kSecond}},
      {"tensor in no shard",
       [](const Checkpoint& c) { c.put(kFirst, safetensors_of({kA})); },
       {.message = "tensor is not in the shard that the index names",
        .path = std::string("/") + kFirst,
        .tensor = "c"}},
      {"no index",
       [](const Checkpoint& c) { c.remove(kIndex); },
       {.message = "several shards but no index",
        .path = "",
        .expected = kIndex,
        .found = "2 *.safetensors files",
        .hint = "download the index too..."}},
      {"no index and one shard of two",
       [](const Checkpoint& c) {
         c.remove(kIndex);
         c.remove(kSecond);
       },
       {.message = "several shards but no index",
        .path = "",
        .expected = kIndex,
        .found = kFirst,
        .hint = "download the index too..."}},
      {"two models",
       [](const Checkpoint& c) {
         c.put("model.safetensors", safetensors_of({kA, kB, kC}));
       },
       {.message = "the folder has both model.safetensors and an index of other shards",
        .path = "",
        .hint = "move one of the two models away"}},
      {"no weights",
       [](const Checkpoint& c) {
         for (const char* name : {kIndex, kFirst, kSecond}) c.remove(name);
         c.put("pytorch_model.bin", "x");
       },
       {.message = "no *.safetensors file in the folder",
        .path = "",
        .expected = std::string("model.safetensors or ") + kIndex,
        .hint = "a checkpoint in another format (pytorch_model.bin, GGUF)..."}},
      {"half a shard",
       [](const Checkpoint& c) {
         c.put(kSecond, safetensors_of({kB}).substr(0, safetensors_of({kB}).size() - 1));
       },
       {.message = "tensor ends after the end of the file",
        .path = std::string("/") + kSecond,
        .tensor = "b",
        .expected = "an end of at most 5",
        .found = "0 to 6",
        .hint = "the file is cut off or its header is wrong; fetch it again"}},
      {"half a header",
       [](const Checkpoint& c) {
         c.put(kFirst, safetensors_of({kA, kC}).substr(0, 40));
       },
       {.message = "safetensors header length is out of range",
        .path = std::string("/") + kFirst,
        .expected = "at most 32",
        .found = std::to_string(safetensors_of({kA, kC}).size() - 8 - 10),
        .hint = "the file is damaged, cut off, or no safetensors file"}},
      {"two spellings in the folder",
       [](const Checkpoint& c) { c.put("MODEL-00001-of-00002.safetensors", safetensors_of({kA})); },
       {.message = "two file names differ only in case",
        .path = "",
        .expected = "one of them",
        .found = std::string("'MODEL-00001-of-00002.safetensors' and '") + kFirst + "'"}},
      {"suffix in capitals",
       [](const Checkpoint& c) { c.put("model-00001-of-00002.SAFETENSORS", safetensors_of({kA})); },
       {.message = "two file names differ only in case",
        .path = "",
        .expected = "one of them",
        .found = std::string("'model-00001-of-00002.SAFETENSORS' and '") + kFirst + "'"}},
  };
  for (const Case& k : cases) {
    SCOPED_TRACE(k.name);
    const Checkpoint c;
    ASSERT_FALSE(c.open());
    k.damage(c);
    expect_parts(c.open(), absolute(k.parts, c));
  }
}

TEST(Checkpoint, ShardNamesMustBePlainFileNames) {
  struct Name {
    std::string shard, why;
  };
  const std::vector<Name> names{
      {"", "is empty"},
      {"/etc/model.safetensors", "is an absolute path"},
      {"../m/model.safetensors", "contains '..'"},
      {"..", "contains '..'"},
      {"a/../../model.safetensors", "contains '..'"},
      {"sub/model.safetensors", "contains a folder"},
      {"./model.safetensors", "contains a folder"},
      {"sub\\model.safetensors", "contains a folder"},
      {"C:\\model.safetensors", "contains a folder"},
      {std::string("model.safetensors\0.safetensors", 30), "contains a zero byte"},
      {"config.json", "does not end in .safetensors"},
      {"model.SAFETENSORS", "does not end in .safetensors"},
  };
  for (const Name& n : names) {
    SCOPED_TRACE(n.shard);
    const Checkpoint c;
    c.put(kIndex, index_of({{"a", kFirst}, {"b", n.shard}, {"c", kFirst}}));
    expect_parts(c.open(), {.message = "shard name " + n.why,
                            .path = c.at(kIndex),
                            .tensor = "b",
                            .found = "'" + n.shard + "'"});
  }
  // Whether the file that is named exists changes nothing.
  const Checkpoint c;
  write_bytes(c.beside("model.safetensors"), safetensors_of({kB}));
  c.put(kIndex, index_of({{"a", kFirst}, {"b", "../model.safetensors"}, {"c", kFirst}}));
  expect_parts(c.open(), {.message = "shard name contains '..'",
                          .path = c.at(kIndex),
                          .tensor = "b",
                          .found = "'../model.safetensors'"});
}

TEST(Checkpoint, IndexesThatAreNone) {
  struct Text {
    const char* name;
    std::string text;
    Parts parts;
    std::optional<std::uint64_t> offset = std::nullopt;
  };
  const std::string good = index_of({{"a", kFirst}});
  std::string nul = good;
  nul.push_back('\0');
  const std::string damaged = "the file may be damaged or only half downloaded";
  const std::vector<Text> texts{
      {"empty", "", {.message = "not valid JSON", .hint = damaged}, 0},
      {"cut off", good.substr(0, 20), {.message = "not valid JSON", .hint = damaged}, 20},
      {"text behind it", good + "x", {.message = "not valid JSON", .hint = damaged}, good.size()},
      {"zero byte behind it", nul, {.message = "not valid JSON: a zero byte"}, good.size()},
      {"a list",
       "[]",
       {.message = "the file is not a JSON object", .expected = "an object", .found = "a list of 0"}},
      {"no map",
       R"({"weight_mapp":{}})",
       {.message = "key 'weight_map' is missing", .hint = "did you mean its 'weight_mapp'?"}},
      {"map is null",
       R"({"weight_map":null})",
       {.message = "key 'weight_map' must not be null", .found = "null"}},
      {"map is a list",
       R"({"weight_map":[1]})",
       {.message = "key 'weight_map' is not a JSON object", .expected = "an object", .found = "a list of 1"}},
      {"shard is a number",
       R"({"weight_map":{"a":7}})",
       {.message = "key 'weight_map.a' is not a string", .expected = "a string", .found = "7"}},
      {"tensor twice",
       R"({"weight_map":{"a":"x.safetensors","\u0061":"y.safetensors"}})",
       {.message = "key 'a' appears twice in one JSON object"}},
      {"case clash",
       R"({"weight_map":{"a":"x.safetensors","b":"X.safetensors"}})",
       {.message = "two shard names differ only in case",
        .tensor = "b",
        .expected = "'x.safetensors'",
        .found = "'X.safetensors'"}},
      {"deep",
       R"({"weight_map":)" + std::string(100000, '['),
       {.message = "JSON is nested too deeply", .expected = "at most 64 levels"}},
  };
  for (const Text& t : texts) {
    SCOPED_TRACE(t.name);
    Parts parts = t.parts;
    parts.path = "the/index";
    const std::optional<Error> error = error_of([&] { parse_safetensors_index(t.text, "the/index"); });
    expect_parts(error, parts);
    if (error && t.offset) {
      EXPECT_EQ(error->offset(), t.offset) << error->what();
    }
    const Checkpoint c;
    c.put(kIndex, t.text);
    parts.path = c.at(kIndex);
    expect_parts(c.open(), parts);
  }
  // A limit, so that a huge index is not read into memory: a sparse file one byte above it.
  const Checkpoint c;
  stdfs::resize_file(c.at(kIndex), 100'000'001);
  expect_parts(c.open(), {.message = "file is too long",
                          .path = c.at(kIndex),
                          .expected = "at most 100000000 bytes",
                          .found = "100000001 or more"});
}

TEST(Checkpoint, UnfinishedDownloadsAreNamed) {
  for (const char* name :
       {"model.safetensors.part", "model.safetensors.partial", "x.safetensors.0123abcd.incomplete",
        "model.safetensors.crdownload", "model.safetensors.download", "model.safetensors.aria2",
        "model.safetensors.tmp", "model.safetensors.temp", "model.safetensors.filepart",
        "MODEL.SAFETENSORS.PART", "model.safetensors.index.json.part"}) {
    SCOPED_TRACE(name);
    const Checkpoint c;
    c.put(name, "");
    expect_parts(c.open(), {.message = "an unfinished download",
                            .path = c.at(name),
                            .hint = "finish the download, or delete this file..."});
  }
  const Checkpoint c;
  c.put("notes.part", "");  // no weights
  EXPECT_FALSE(c.open());
}

TEST(Checkpoint, LinksMustStayInTheFolder) {
  const std::string hint = "copy the file into the folder if you trust it";
  for (const char* name : {kIndex, kFirst, kSecond}) {  // a link to a file of the same content elsewhere
    SCOPED_TRACE(name);
    const Checkpoint c;
    stdfs::rename(c.at(name), c.beside("elsewhere"));
    stdfs::create_symlink("../elsewhere", c.at(name));
    const std::string real = stdfs::canonical(c.path()).string();
    expect_parts(c.open(), {.message = "a link leads out of the folder",
                            .path = c.at(name),
                            .expected = "a file inside " + real,
                            .found = stdfs::canonical(c.beside("elsewhere")).string(),
                            .hint = hint});
  }
  {
    const TempFolder folder;  // the single file too
    stdfs::create_directory(folder / "m");
    write_bytes(folder / "elsewhere", safetensors_of({kA}));
    stdfs::create_symlink(folder / "elsewhere", folder / "m/model.safetensors");
    const auto error = error_of([&] { const CheckpointReader reader(folder / "m"); });
    ASSERT_TRUE(error);
    EXPECT_EQ(error->message(), "a link leads out of the folder");
    EXPECT_EQ(error->path(), folder / "m/model.safetensors");
  }
  {
    const Checkpoint c;  // a folder whose name begins with this one's is another folder
    stdfs::create_directory(c.beside("m2"));
    stdfs::rename(c.at(kFirst), c.beside("m2/x"));
    stdfs::create_symlink("../m2/x", c.at(kFirst));
    ASSERT_TRUE(c.open());
    EXPECT_EQ(c.open()->message(), "a link leads out of the folder");
  }
  {
    const Checkpoint c;  // inside is fine, over any detour
    stdfs::create_directory(c.at("sub"));
    stdfs::rename(c.at(kFirst), c.at("sub/x"));
    stdfs::create_symlink("../m/sub/x", c.at(kFirst));
    EXPECT_FALSE(c.open());
  }
  {
    const Checkpoint c;
    c.remove(kFirst);
    stdfs::create_symlink("nowhere", c.at(kFirst));
    expect_parts(c.open(), {.message = "the file is missing", .path = c.at(kFirst)});
  }
}

// The cache that huggingface_hub makes: snapshots/REVISION/NAME -> ../../blobs/HASH, and no other shape.
TEST(Checkpoint, LinksOfAHuggingFaceCache) {
  const TempFolder folder;
  stdfs::create_directories(folder / "models--x/snapshots/rev");
  stdfs::create_directories(folder / "models--x/blobs/deep");
  const std::string snapshot = folder / "models--x/snapshots/rev";
  const auto opens = [&](const std::string& target) {
    stdfs::remove(snapshot + "/model.safetensors");
    stdfs::create_symlink(target, snapshot + "/model.safetensors");
    return error_of([&] { const CheckpointReader reader(snapshot); });
  };
  for (const char* file : {"blobs/0af1", "blobs/deep/0af1", "0af1"}) {
    write_bytes(folder / (std::string("models--x/") + file), safetensors_of({kA}));
  }
  EXPECT_FALSE(opens("../../blobs/0af1"));
  for (const char* target : {"../../0af1", "../../blobs/deep/0af1"}) {
    const auto error = opens(target);
    ASSERT_TRUE(error) << target;
    EXPECT_EQ(error->message(), "a link leads out of the folder");
  }
}

TEST(Checkpoint, FoldersAndPipesInPlaceOfFiles) {
  {
    const Checkpoint c;
    c.remove(kFirst);
    stdfs::create_directory(c.at(kFirst));
    expect_parts(c.open(), {.message = "not a regular file", .path = c.at(kFirst)});
  }
  for (const char* name : {kFirst, kIndex}) {  // must not wait for somebody to write into the pipe
    const Checkpoint c;
    c.remove(name);
    ASSERT_EQ(::mkfifo(c.at(name).c_str(), 0600), 0);
    expect_parts(c.open(), {.message = "not a regular file", .path = c.at(name)});
  }
  const TempFolder folder;
  const std::string hint = "name the folder that holds config.json and the *.safetensors files";
  expect_parts(
      error_of([&] { const CheckpointReader reader(folder / "none"); }),
      {.kind = ErrorKind::usage, .message = "no such folder", .path = folder / "none", .hint = hint});
  write_bytes(folder / "file", "");
  expect_parts(error_of([&] { const CheckpointReader reader(folder / "file"); }),
               {.kind = ErrorKind::usage, .message = "not a folder", .path = folder / "file", .hint = hint});
}

TEST(Checkpoint, UnfinishedOutputsDoNotLoad) {
  const std::string message = "an unfinished FireQ output does not load";
  const std::string hint = "finish it: run the same command with --resume";
  for (const std::string_view marker : {kLockFile, kResumeFile}) {
    const Checkpoint c;
    c.put(std::string(marker), "");
    expect_parts(c.open(),
                 {.message = message, .path = c.path(), .found = std::string(marker), .hint = hint});
  }
  const Checkpoint c;
  const std::string partial = c.beside("q.fireq-partial");
  stdfs::create_directories(partial);
  stdfs::rename(c.path(), partial + "/out");
  expect_parts(
      error_of([&] { const CheckpointReader reader(partial + "/out"); }),
      {.message = message, .path = partial + "/out", .found = "'q.fireq-partial' in its path", .hint = hint});
  stdfs::create_directory_symlink(partial + "/out", c.beside("alias"));  // nor by another name
  const auto error = error_of([&] { const CheckpointReader reader(c.beside("alias")); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->message(), message);
}

// The fingerprint says which tensors these are: the cut into files, the threads and the order of the tensors
// in a file do not matter; everything else does.
TEST(Checkpoint, FingerprintIsOfTheTensorsOnly) {
  std::mt19937_64 random(7);
  const std::size_t big = (std::size_t{9} << 20U) + 4;  // several pieces, the last one not whole
  const RawTensor large{"w", "U8", "[" + std::to_string(big) + "]", test::random_bytes(random, big)};
  const auto fingerprint = [](const std::vector<std::vector<RawTensor>>& shards, int threads) {
    const TempFolder folder;
    std::vector<std::pair<std::string, std::string>> map;
    for (std::size_t i = 0; i < shards.size(); ++i) {
      const std::string name = "s" + std::to_string(i) + ".safetensors";
      write_bytes(folder / name, safetensors_of(shards[i]));
      for (const RawTensor& t : shards[i]) map.emplace_back(t.name, name);
    }
    if (shards.size() > 1) write_bytes(folder / kIndex, index_of(map));
    return CheckpointReader(folder.path()).fingerprint(threads);
  };
  const std::string one = fingerprint({{kA, kB, large}}, 1);
  EXPECT_EQ(one.size(), 32U);
  EXPECT_EQ(one.find_first_not_of("0123456789abcdef"), std::string::npos);
  EXPECT_EQ(fingerprint({{large, kB, kA}}, 7), one);
  EXPECT_EQ(fingerprint({{kB}, {large}, {kA}}, 2), one);

  std::set<std::string> seen{one};
  for (const std::size_t at : {std::size_t{0}, (std::size_t{4} << 20U) - 1, std::size_t{4} << 20U, big - 1}) {
    RawTensor changed = large;
    changed.data[at] = static_cast<char>(changed.data[at] ^ 1);
    EXPECT_TRUE(seen.insert(fingerprint({{kA, kB, changed}}, 2)).second) << at;
  }
  RawTensor renamed = kA, reshaped = kA, retyped = kA;
  renamed.name = "aa";
  reshaped.shape = "[1,2]";
  retyped.dtype = "I32";
  for (const RawTensor& t : {renamed, reshaped, retyped}) {
    EXPECT_TRUE(seen.insert(fingerprint({{t, kB, large}}, 2)).second);
  }
  EXPECT_TRUE(seen.insert(fingerprint({{kA, large}}, 2)).second);
}

// Every model of the test data, in F16, BF16 and F32, one file or several: names, dtypes, shapes and bytes
// are what a second and simpler reader finds.
TEST(Checkpoint, TestModelsAsASecondReaderSeesThem) {
  std::size_t models = 0;
  std::set<std::string> dtypes;
  for (const auto& entry : stdfs::directory_iterator(FIREQ_TEST_DATA "/tiny")) {
    SCOPED_TRACE(entry.path().filename().string());
    const CheckpointReader reader(entry.path().string());
    std::size_t tensors = 0;
    for (const auto& file : stdfs::directory_iterator(entry.path())) {
      if (file.path().extension() != ".safetensors") continue;
      const std::string bytes = test::read_bytes(file.path().string());
      std::uint64_t length = 0;
      std::memcpy(&length, bytes.data(), 8);
      const nlohmann::json header = nlohmann::json::parse(bytes.substr(8, length));
      for (const auto& [name, info] : header.items()) {
        if (name == "__metadata__") continue;
        ++tensors;
        const TensorView view = reader.tensor(name);
        EXPECT_EQ(dtype_name(view.dtype), info["dtype"].get<std::string>());
        EXPECT_EQ(view.shape, info["shape"].get<std::vector<std::uint64_t>>());
        const auto begin = info["data_offsets"][0].get<std::size_t>();
        const auto end = info["data_offsets"][1].get<std::size_t>();
        EXPECT_EQ(test::text_of(view.data), std::string_view(bytes).substr(8 + length + begin, end - begin));
        EXPECT_EQ(reader.file_of(name), file.path().string());
        dtypes.insert(info["dtype"].get<std::string>());
      }
    }
    EXPECT_EQ(reader.names().size(), tensors);
    ++models;
  }
  EXPECT_GE(models, 16U);
  EXPECT_EQ(dtypes, (std::set<std::string>{"BF16", "F16", "F32"}));
}

}  // namespace
}  // namespace fireq::formats
