// An output folder and everything that can happen to it: a fault or the end of the process at each call of
// the file system, a second run, a changed input, an output that is in the way.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "formats/checkpoint.hpp"
#include "formats/fault_injection.hpp"
#include "formats/fireq_folder.hpp"
#include "tests/formats/support.hpp"

namespace fireq::formats {
namespace {

namespace stdfs = std::filesystem;
using test::error_of;
using test::expect_parts;
using test::read_tree;
using test::TempFolder;
using Fault = FaultInjectingFileSystem::Fault;
using Mode = FireqWriter::Mode;
using Tree = std::map<std::string, std::string>;

const std::array<std::string, 3> kPrints{"model-1", "text-1", "recipe-1"};
const std::vector<std::string> kUnits{"embedding", "layer-0", "layer-1"};

std::string config_json() {
  QuantizationConfig q;
  q.recipe_json = "{}";
  q.source_fingerprint = "s";
  q.tool_version = "1";
  return make_config_json(R"({"model_type":"llama"})", q);
}

class FireqOutput : public ::testing::Test {
 protected:
  FireqOutput() {
    stdfs::create_directory(source);
    test::write_bytes(source + "/model.safetensors",
                      test::safetensors_of({{"embed", "F32", "[8]", std::string(32, 'e')}}));
    test::write_bytes(source + "/config.json", "{}");
    test::write_bytes(source + "/tokenizer.json", "tokens");
    test::write_bytes(source + "/LICENSE", "terms");
    test::write_bytes(source + "/secret.bin", "not copied");
  }

  // What the command does: stage what is not there yet, write the side file, publish.
  void run(FileSystem& fs, Mode mode, bool force, const std::array<std::string, 3>& prints = kPrints,
           std::size_t units = 3, std::uint64_t shard_size = 60) {
    FireqWriter writer(fs, out, source, mode, force, prints);
    EXPECT_EQ(writer.partial_folder(), out + ".fireq-partial");
    for (std::size_t u = 0; u < units; ++u) {
      if (writer.unit_done(kUnits[u])) {
        ++reused;
        continue;
      }
      std::vector<FireqWriter::Tensor> tensors(2);
      if (u == 0) {
        tensors.resize(1);
        tensors[0].plan = {"embed", Dtype::f32, {8}};
        tensors[0].from_source = true;
      } else {
        const auto fill = static_cast<std::byte>('0' + u);
        tensors[0].plan = {kUnits[u] + ".z", Dtype::u8, {21}};
        tensors[0].owned.assign(21, fill);
        tensors[1].plan = {kUnits[u] + ".a", Dtype::f32, {2, 3}};
        tensors[1].owned.assign(24, fill);
      }
      writer.stage(kUnits[u], tensors);
    }
    if (units < kUnits.size()) return;
    write_file_atomically(fs, writer.side_file("calibration.h5"), std::string_view("statistics"));
    if (damage_before_publish) damage_before_publish();
    writer.publish(kUnits, config_json(), shard_size);
  }
  void run(Mode mode, bool force = false) {
    FaultInjectingFileSystem fs;  // the real one, without its slow fsync
    run(fs, mode, force);
  }
  std::optional<Error> refused(Mode mode, bool force = false,
                               const std::array<std::string, 3>& prints = kPrints) {
    FaultInjectingFileSystem fs;
    return error_of([&] { run(fs, mode, force, prints); });
  }
  std::optional<Error> opens(const std::string& path) const {
    return error_of([&] { const CheckpointReader reader(path); });
  }
  void expect_partial_does_not_load() const {
    for (const char* inside : {"", "/out", "/units", "/old"}) {
      if (!stdfs::is_directory(partial + inside)) continue;
      EXPECT_TRUE(opens(partial + inside)) << inside;
    }
  }

  const TempFolder folder;
  const std::string source = folder / "source", out = folder / "out", partial = out + ".fireq-partial";
  std::size_t reused = 0;
  std::function<void()> damage_before_publish;
};

TEST_F(FireqOutput, HoldsWhatItShould) {
  run(Mode::fresh);
  const Tree tree = read_tree(out);
  std::vector<std::string> names;
  for (const auto& entry : tree) names.push_back(entry.first);
  EXPECT_EQ(names, (std::vector<std::string>{
                       "LICENSE", "calibration.h5", "config.json", "model-00001-of-00003.safetensors",
                       "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors",
                       "model.safetensors.index.json", "tokenizer.json"}));
  EXPECT_EQ(tree.at("tokenizer.json"), "tokens");
  EXPECT_EQ(tree.at("calibration.h5"), "statistics");
  EXPECT_EQ(tree.at("config.json"), config_json());
  EXPECT_FALSE(stdfs::exists(partial));
  const CheckpointReader reader(out);
  EXPECT_EQ(reader.names(),
            (std::vector<std::string>{"embed", "layer-0.a", "layer-0.z", "layer-1.a", "layer-1.z"}));
  EXPECT_EQ(test::text_of(reader.tensor("embed").data), std::string(32, 'e'));
  EXPECT_EQ(test::text_of(reader.tensor("layer-1.z").data), std::string(21, '2'));
  EXPECT_EQ(nlohmann::json::parse(tree.at("model.safetensors.index.json"))["metadata"]["total_size"],
            32 + 45 + 45);
  // Another shard size moves tensors between files, and nothing else.
  FaultInjectingFileSystem fs;
  const std::string fingerprint = reader.fingerprint(1);
  run(fs, Mode::fresh, true, kPrints, 3, 1U << 30U);
  EXPECT_TRUE(stdfs::exists(out + "/model.safetensors"));
  EXPECT_EQ(CheckpointReader(out).fingerprint(1), fingerprint);
}

// The heart of it: at each call of the file system in turn the disk is full, or broken, or the process ends.
TEST_F(FireqOutput, AnyFaultThenResumeGivesTheSameBytes) {
  FaultInjectingFileSystem counting;
  run(counting, Mode::fresh, false);
  const Tree whole = read_tree(out);
  EXPECT_GT(counting.operations(), 50U);
  std::size_t reused_units = 0;
  for (const Fault fault : {Fault::no_space, Fault::io_error, Fault::crash}) {
    for (std::uint64_t at = 0; at < counting.operations(); ++at) {
      stdfs::remove_all(out);
      stdfs::remove_all(partial);
      FaultInjectingFileSystem fs(fault, at);
      bool failed = false;
      try {
        const auto error = error_of([&] { run(fs, Mode::fresh, false); });
        failed = error.has_value();
        if (error) {
          EXPECT_EQ(error->kind(), ErrorKind::environment);
          EXPECT_FALSE(error->path().empty());
          EXPECT_FALSE(error->hint().empty());
        }
      } catch (const SimulatedCrash&) {
        failed = true;
      }
      SCOPED_TRACE(std::to_string(at) + ": " + fs.failed_operation());
      ASSERT_TRUE(failed);
      expect_partial_does_not_load();
      if (stdfs::exists(out)) {  // the fault came after the rename
        ASSERT_EQ(read_tree(out), whole);
        ASSERT_FALSE(refused(Mode::resume, true));
      } else {
        reused = 0;
        run(Mode::resume);
        reused_units += reused;
      }
      ASSERT_EQ(read_tree(out), whole);
      ASSERT_FALSE(opens(out));
      ASSERT_FALSE(stdfs::exists(partial));
    }
  }
  EXPECT_GT(reused_units, counting.operations());  // a resume does not do everything again
}

TEST_F(FireqOutput, FaultsWhileAnOldOutputIsReplaced) {
  const std::array<std::string, 3> other{"model-1", "text-2", "recipe-1"};
  FaultInjectingFileSystem fs_old;
  run(fs_old, Mode::fresh, false, other, 3, 1U << 30U);
  const Tree old = read_tree(out);
  stdfs::copy(out, folder / "kept", stdfs::copy_options::recursive);
  FaultInjectingFileSystem counting;
  run(counting, Mode::fresh, true);
  const Tree whole = read_tree(out);
  ASSERT_NE(old, whole);
  for (const Fault fault : {Fault::io_error, Fault::crash}) {
    for (std::uint64_t at = 0; at < counting.operations(); ++at) {
      stdfs::remove_all(out);
      stdfs::remove_all(partial);
      stdfs::copy(folder / "kept", out, stdfs::copy_options::recursive);
      FaultInjectingFileSystem fs(fault, at);
      try {
        ASSERT_TRUE(error_of([&] { run(fs, Mode::fresh, true); }));
      } catch (const SimulatedCrash&) {
      }
      SCOPED_TRACE(std::to_string(at) + ": " + fs.failed_operation());
      expect_partial_does_not_load();
      if (stdfs::exists(out)) {  // one of the two, whole; or, between the two renames, none
        const Tree now = read_tree(out);
        ASSERT_TRUE(now == old || now == whole);
      } else {
        ASSERT_EQ(read_tree(partial + "/old"), old);  // nothing is lost
      }
      run(Mode::resume, true);
      ASSERT_EQ(read_tree(out), whole);
      ASSERT_FALSE(stdfs::exists(partial));
    }
  }
}

TEST_F(FireqOutput, ASecondRunIsRefusedWhileTheFirstLives) {
  const auto expect_locked = [&] {
    for (const Mode mode : {Mode::fresh, Mode::resume, Mode::restart}) {
      expect_parts(refused(mode), {.kind = ErrorKind::environment,
                                   .message = "another run is writing this output",
                                   .path = partial,
                                   .hint = "wait until it has ended, or choose another output"});
    }
  };
  {
    const FireqWriter first(real_file_system(), out, source, Mode::fresh, false, kPrints);
    expect_locked();
  }
  ASSERT_FALSE(refused(Mode::fresh));  // it ended, and had done nothing
  stdfs::remove_all(out);

  // Another process holds it; killed, its lock is gone and its finished unit is used.
  std::array<int, 2> ready{};
  ASSERT_EQ(::pipe(ready.data()), 0);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    FaultInjectingFileSystem fs;
    FireqWriter writer(fs, out, source, Mode::fresh, false, kPrints);
    std::vector<FireqWriter::Tensor> tensors(1);
    tensors[0].plan = {"embed", Dtype::f32, {8}};
    tensors[0].from_source = true;
    writer.stage("embedding", tensors);
    const char byte = 1;
    if (::write(ready[1], &byte, 1) == 1) ::pause();
    ::_exit(1);
  }
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  expect_locked();
  ASSERT_EQ(::kill(child, SIGKILL), 0);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  ::close(ready[0]);
  ::close(ready[1]);
  run(Mode::resume);
  EXPECT_EQ(reused, 1U);
  EXPECT_FALSE(opens(out));
}

TEST_F(FireqOutput, ResumingSomethingElseIsRefusedByName) {
  FaultInjectingFileSystem fs;
  run(fs, Mode::fresh, false, kPrints, 2);
  expect_parts(refused(Mode::fresh), {.kind = ErrorKind::usage,
                                      .message = "an unfinished output is there",
                                      .path = partial,
                                      .hint = "add --resume to finish it, or --restart to throw it away"});
  const std::array<const char*, 3> names{"model", "text", "recipe"};
  for (std::size_t i = 0; i < 3; ++i) {
    std::array<std::string, 3> changed = kPrints;
    changed[i] = "other";
    expect_parts(refused(Mode::resume, false, changed),
                 {.message = std::string("the unfinished output belongs to another ") + names[i],
                  .path = partial,
                  .expected = kPrints[i],
                  .found = "other",
                  .hint = std::string("give the same ") + names[i] + ", or add --restart to throw it away"});
  }
  EXPECT_FALSE(stdfs::exists(out));
  run(Mode::restart);
  EXPECT_EQ(reused, 0U);
}

TEST_F(FireqOutput, UnitsThatDoNotFitTheirRecordAreDoneAgain) {
  FaultInjectingFileSystem fs;
  run(fs, Mode::fresh, false);
  const Tree whole = read_tree(out);
  const std::string unit = partial + "/units/layer-0.safetensors", record = partial + "/fireq-resume.jsonl";
  const auto resume_after = [&](const auto& damage, std::size_t expected_reused) {
    stdfs::remove_all(out);
    run(fs, Mode::fresh, false, kPrints, 2);
    damage();
    reused = 0;
    run(Mode::resume);
    EXPECT_EQ(reused, expected_reused);
    EXPECT_EQ(read_tree(out), whole);
  };
  resume_after([] {}, 2);
  resume_after([&] { stdfs::resize_file(unit, stdfs::file_size(unit) - 1); }, 1);
  resume_after(
      [&] {
        std::string bytes = test::read_bytes(unit);
        bytes.back() = 'x';
        test::write_bytes(unit, bytes);
      },
      1);
  resume_after([&] { stdfs::remove(unit); }, 1);
  resume_after([&] { stdfs::resize_file(record, stdfs::file_size(record) - 5); }, 1);  // its last line is cut
  resume_after(
      [&] {
        test::write_bytes(record, test::read_bytes(record) +
                                      "{\"unit\":\"../../x\",\"size\":1,"
                                      "\"xxh3\":\"0\"}\n");
      },
      2);
  // A record without its first line is nothing to go on with.
  stdfs::remove_all(out);
  run(fs, Mode::fresh, false, kPrints, 2);
  for (const char* text : {"", "{}", "garbage\n", "{\"fireq_resume\":1}\n"}) {
    test::write_bytes(record, text);
    const auto error = refused(Mode::resume);
    ASSERT_TRUE(error) << text;
    EXPECT_EQ(error->kind(), ErrorKind::input) << error->what();
    EXPECT_EQ(error->path(), record);
  }
  run(Mode::restart);
  EXPECT_EQ(read_tree(out), whole);
}

// Staged files are not fsynced: a disk that loses their bytes under a living run must not get through.
TEST_F(FireqOutput, AStagedFileThatChangedIsNotPublished) {
  FaultInjectingFileSystem fs;
  run(Mode::fresh);
  const Tree whole = read_tree(out);
  for (const std::size_t from_end : {1U, 22U, 45U}) {  // both tensors, 24 and 21 bytes
    stdfs::remove_all(out);
    damage_before_publish = [&] {
      const std::string unit = partial + "/units/layer-0.safetensors";
      std::string bytes = test::read_bytes(unit);
      bytes[bytes.size() - from_end] ^= 1;
      test::write_bytes(unit, bytes);
    };
    const auto error = refused(Mode::fresh);
    damage_before_publish = nullptr;
    ASSERT_TRUE(error);
    EXPECT_EQ(error->kind(), ErrorKind::environment) << error->what();
    EXPECT_EQ(error->path(), partial + "/units/layer-0.safetensors");
    EXPECT_EQ(error->tensor(), from_end > 21 ? "layer-0.a" : "layer-0.z");
    EXPECT_FALSE(stdfs::exists(out));
    expect_partial_does_not_load();
    reused = 0;
    run(Mode::resume);
    EXPECT_EQ(reused, 2U);  // the others
    EXPECT_EQ(read_tree(out), whole);
  }
}

TEST_F(FireqOutput, NothingOfTheUsersIsOverwritten) {
  const std::string elsewhere = "choose an output folder elsewhere";
  const auto refusal = [&](const std::string& where, bool force) {
    FaultInjectingFileSystem fs;
    return error_of([&] { const FireqWriter writer(fs, where, source, Mode::fresh, force, kPrints); });
  };
  const std::string real = stdfs::canonical(source).string();
  for (const bool force : {false, true}) {
    expect_parts(refusal(source, force), {.kind = ErrorKind::usage,
                                          .message = "the output is the input",
                                          .path = source,
                                          .found = real,
                                          .hint = elsewhere});
    expect_parts(refusal(source + "/q", force), {.kind = ErrorKind::usage,
                                                 .message = "the output lies inside the input",
                                                 .path = source + "/q",
                                                 .found = real,
                                                 .hint = elsewhere});
    expect_parts(refusal(folder.path(), force), {.kind = ErrorKind::usage,
                                                 .message = "the input lies inside the output",
                                                 .path = folder.path(),
                                                 .found = real,
                                                 .hint = elsewhere});
    expect_parts(refusal(folder / "no/out", force), {.kind = ErrorKind::usage,
                                                     .message = "the folder to write into does not exist",
                                                     .path = folder / "no"});
  }
  stdfs::create_directory_symlink(source, folder / "alias");  // the input by another name
  EXPECT_EQ(refusal(folder / "alias", true)->message(), "the output is the input");
  EXPECT_EQ(refusal(folder / "alias/q", true)->message(), "the output lies inside the input");

  stdfs::create_directory(out);
  test::write_bytes(out + "/diary.txt", "mine");
  expect_parts(refused(Mode::fresh), {.kind = ErrorKind::usage,
                                      .message = "the output exists",
                                      .path = out,
                                      .hint = "choose another name, or add --force to replace it"});
  expect_parts(refused(Mode::fresh, true),
               {.kind = ErrorKind::usage,
                .message = "the output exists and is no FireQ folder; --force does not replace it",
                .path = out,
                .hint = "choose another name, or remove it yourself"});
  EXPECT_EQ(read_tree(out), (Tree{{"diary.txt", "mine"}}));
  EXPECT_FALSE(stdfs::exists(partial));
  stdfs::remove(out + "/diary.txt");
  EXPECT_FALSE(refused(Mode::fresh, true));  // an empty folder is nobody's
}

// Files that go along are the folder's own: a link must not bring another file of the user's into the output.
TEST_F(FireqOutput, CopiesNoFileFromOutsideTheSource) {
  test::write_bytes(folder / "key", "secret");
  stdfs::create_symlink(folder / "key", source + "/tokenizer_config.json");
  const auto error = refused(Mode::fresh);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->kind(), ErrorKind::input);
  EXPECT_EQ(error->message(), "a link leads out of the folder");
  EXPECT_EQ(error->path(), source + "/tokenizer_config.json");
  EXPECT_FALSE(stdfs::exists(out));
}

}  // namespace
}  // namespace fireq::formats
