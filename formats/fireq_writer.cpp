// Staging and assembly. A tensor's bytes go: memory or source mapping -> units/UNIT.safetensors -> shard; or,
// when nothing changes in them, source mapping -> shard.
#include <algorithm>
#include <array>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

#include "common/checked.hpp"
#include "common/error.hpp"
#include "formats/checkpoint.hpp"
#include "formats/fireq_folder.hpp"
#include "formats/fireq_output.hpp"
#include "formats/folder_rules.hpp"
#include "formats/hash.hpp"
#include "formats/model_config_json.hpp"

namespace fireq::formats {
namespace {

constexpr std::uint64_t kCopyStep = std::uint64_t{8} << 20U;
// Metadata keys of a staged file: JSON list of the unit's tensors that stay in the source; JSON object of the
// hashes of the others.
constexpr const char* kFromSource = "from_source";
constexpr const char* kHashes = "xxh3";

std::string hash_of(std::span<const std::byte> bytes) {
  return hex(XXH3_128bits(bytes.data(), bytes.size()));
}

// Passes writes on and hashes them, so that a staged file is not read again for its record. A staged file is
// not fsynced: what a power failure takes from it shows in its record when the run is resumed, and what a
// failing disk takes shows in its tensors' hashes when the shards are assembled.
class HashingFile final : public OutputFile {
 public:
  HashingFile(std::unique_ptr<OutputFile> file, Hasher& hasher) : file_(std::move(file)), hasher_(hasher) {}
  void write(std::span<const std::byte> bytes) override {
    hasher_.add_bytes(bytes);
    file_->write(bytes);
  }
  void write_at(std::uint64_t /*offset*/, std::span<const std::byte> /*bytes*/) override {
    throw Error(ErrorKind::internal, "a hashed file is written front to back");
  }
  void sync() override {}
  void close() override { file_->close(); }

 private:
  std::unique_ptr<OutputFile> file_;
  Hasher& hasher_;
};

// Files of the source folder that go along: what turns text into ids and back, how to generate, and under
// which terms. Weights of other formats and config.json do not.
bool is_copied(const std::string& name) {
  const std::string lower = ascii_lower(name);
  for (const char* const exact :
       {"special_tokens_map.json", "added_tokens.json", "generation_config.json", "merges.txt"}) {
    if (lower == exact) return true;
  }
  constexpr std::array<std::string_view, 6> kPrefixes{"tokenizer", "vocab",   "chat_template",
                                                      "license",   "licence", "notice"};
  return std::any_of(kPrefixes.begin(), kPrefixes.end(),
                     [&](std::string_view prefix) { return lower.starts_with(prefix); });
}

std::string shard_name(std::size_t index, std::size_t count) {
  if (count == 1) return "model.safetensors";
  const auto digits = [](std::size_t n) {
    const std::string text = std::to_string(n);
    return std::string(text.size() < 5 ? 5 - text.size() : 0, '0').append(text);
  };
  return std::string("model-")
      .append(digits(index + 1))
      .append("-of-")
      .append(digits(count))
      .append(".safetensors");
}

std::span<const std::byte> bytes_of(const FireqWriter::Tensor& tensor) {
  return tensor.owned.empty() ? tensor.borrowed : std::span<const std::byte>(tensor.owned);
}

struct Piece {
  TensorPlan plan;
  std::uint64_t bytes = 0;
  const SafetensorsFile* staged = nullptr;  // null: in the source
  TensorInfo info;
  std::string hash;  // of a staged one
};

}  // namespace

struct FireqWriter::Impl {
  Impl(FileSystem& fs_in, std::string out, const std::string& source, Mode mode, bool force,
       const std::array<std::string, 3>& fingerprints)
      : fs(fs_in), source_folder(source), folder(fs, std::move(out), source, mode, force, fingerprints) {}

  const CheckpointReader& source() {
    if (!reader) reader.emplace(source_folder);
    return *reader;
  }
  TensorView source_tensor(const TensorPlan& plan) {
    TensorView view = source().tensor(plan.name);
    if (view.dtype != plan.dtype || view.shape != plan.shape) {
      throw Error(ErrorKind::internal, "a tensor to be kept is not the source's").tensor(plan.name);
    }
    return view;
  }

  std::vector<Piece> collect(const std::vector<std::string>& units);
  static std::vector<std::vector<const Piece*>> cut(const std::vector<Piece>& pieces,
                                                    std::uint64_t shard_size);
  void write_shard(const std::string& name, const std::vector<const Piece*>& pieces);
  static void append_staged(SafetensorsWriter& writer, const Piece& piece);
  void copy_source_files();
  void write_file(const std::string& name, std::string_view text);
  void remove_leftovers();

  FileSystem& fs;
  std::string source_folder;
  OutputFolder folder;
  std::optional<CheckpointReader> reader;
  std::vector<SafetensorsFile> staged;
  std::set<std::string> side_files;
};

FireqWriter::FireqWriter(FileSystem& fs, std::string out, const std::string& source_folder, Mode mode,
                         bool force, const std::array<std::string, 3>& fingerprints)
    : impl_(std::make_unique<Impl>(fs, std::move(out), source_folder, mode, force, fingerprints)) {}
FireqWriter::~FireqWriter() = default;

void FireqWriter::refuse_early(FileSystem& fs, std::string out, const std::string& source_folder, Mode mode,
                               bool force) {
  OutputFolder::refuse_early(fs, std::move(out), source_folder, mode, force);
}

const std::string& FireqWriter::partial_folder() const noexcept {
  return impl_->folder.partial();
}

bool FireqWriter::unit_done(const std::string& unit) const {
  return impl_->folder.done().contains(unit);
}

SafetensorsFile FireqWriter::open_unit(const std::string& unit) const {
  if (!unit_done(unit)) throw Error(ErrorKind::internal, "a unit is not staged").found(unit);
  return SafetensorsFile(impl_->folder.unit_path(unit));
}

std::string FireqWriter::side_file(const std::string& name) {
  if (name.empty() || name.find('/') != std::string::npos || name.front() == '.') {
    throw Error(ErrorKind::internal, "bad name of a side file").found(in_quotes(name));
  }
  impl_->side_files.insert(name);
  return impl_->folder.files() + "/" + name;
}

void FireqWriter::stage(const std::string& unit, std::span<const Tensor> tensors) {
  if (unit_done(unit)) throw Error(ErrorKind::internal, "the unit is staged already").found(unit);
  std::vector<const Tensor*> sorted;
  for (const Tensor& tensor : tensors) sorted.push_back(&tensor);
  std::sort(sorted.begin(), sorted.end(),
            [](const Tensor* a, const Tensor* b) { return a->plan.name < b->plan.name; });
  std::vector<TensorPlan> plan;
  nlohmann::json kept = nlohmann::json::array(), hashes = nlohmann::json::object();
  for (const Tensor* const tensor : sorted) {
    if (tensor->from_source) {
      impl_->source_tensor(tensor->plan);
      kept.push_back(tensor->plan.name);
      continue;
    }
    const std::span<const std::byte> bytes = bytes_of(*tensor);
    if (bytes.size() != tensor->plan.bytes()) {
      throw Error(ErrorKind::internal, "a staged tensor has not the bytes of its shape")
          .tensor(tensor->plan.name)
          .expected(std::to_string(tensor->plan.bytes()))
          .found(std::to_string(bytes.size()));
    }
    plan.push_back(tensor->plan);
    hashes[tensor->plan.name] = hash_of(bytes);
  }
  Hasher hasher;
  const std::string path = impl_->folder.unit_path(unit);
  SafetensorsWriter writer(std::make_unique<HashingFile>(impl_->fs.create(path), hasher), path, plan,
                           {{kFromSource, kept.dump()}, {kHashes, hashes.dump()}});
  for (const Tensor* const tensor : sorted) {
    if (!tensor->from_source) writer.append(bytes_of(*tensor));
  }
  writer.finish();
  impl_->folder.record(unit, {writer.file_size(), hasher.digest()});
}

std::vector<Piece> FireqWriter::Impl::collect(const std::vector<std::string>& units) {
  std::vector<Piece> pieces;
  std::set<std::string> names;
  staged.clear();
  staged.reserve(units.size());  // pieces point into it
  for (const std::string& unit : units) {
    if (!folder.done().contains(unit)) throw Error(ErrorKind::internal, "a unit is not staged").found(unit);
    const SafetensorsFile& file = staged.emplace_back(folder.unit_path(unit));
    const std::size_t first = pieces.size();
    const auto metadata = [&](const char* key) {
      const auto found = file.header().metadata.find(key);
      if (found == file.header().metadata.end()) {
        throw Error(ErrorKind::input, "a staged file was not written by this program").path(file.path());
      }
      return parse_json(found->second, file.path());
    };
    const nlohmann::json hashes = metadata(kHashes);
    const JsonFields hash(hashes, file.path());
    for (const TensorInfo& info : file.header().tensors) {
      pieces.push_back(
          {{info.name, info.dtype, info.shape}, info.end - info.begin, &file, info, hash.text(info.name)});
    }
    for (const nlohmann::json& name : metadata(kFromSource)) {
      const TensorView view = source().tensor(name.get<std::string>());
      pieces.push_back({{view.name, view.dtype, view.shape}, view.data.size(), nullptr, {}, {}});
    }
    std::sort(pieces.begin() + static_cast<std::ptrdiff_t>(first), pieces.end(),
              [](const Piece& a, const Piece& b) { return a.plan.name < b.plan.name; });
  }
  for (const Piece& piece : pieces) {
    if (!names.insert(piece.plan.name).second) {
      throw Error(ErrorKind::internal, "two units hold the same tensor").tensor(piece.plan.name);
    }
  }
  return pieces;
}

std::vector<std::vector<const Piece*>> FireqWriter::Impl::cut(const std::vector<Piece>& pieces,
                                                              std::uint64_t shard_size) {
  std::vector<std::vector<const Piece*>> shards(1);
  std::uint64_t filled = 0;
  for (const Piece& piece : pieces) {
    if (!shards.back().empty() && (piece.bytes > shard_size || filled > shard_size - piece.bytes)) {
      shards.emplace_back();
      filled = 0;
    }
    shards.back().push_back(&piece);
    filled = checked_add(filled, piece.bytes, "bytes of a shard");
  }
  for (std::vector<const Piece*>& shard : shards) {
    // Larger elements first: every tensor is then aligned to its element size, which readers that make arrays
    // on the mapping rely on.
    std::stable_sort(shard.begin(), shard.end(), [](const Piece* a, const Piece* b) {
      return dtype_size(a->plan.dtype) > dtype_size(b->plan.dtype);
    });
  }
  return shards;
}

void FireqWriter::Impl::write_shard(const std::string& name, const std::vector<const Piece*>& pieces) {
  std::vector<TensorPlan> plan;
  plan.reserve(pieces.size());
  for (const Piece* const piece : pieces) plan.push_back(piece->plan);
  SafetensorsWriter writer(fs, folder.files() + "/" + name, plan, {{"format", "pt"}});
  for (const Piece* const piece : pieces) {
    if (piece->staged == nullptr) {
      writer.append(source_tensor(piece->plan).data);
      source().release(piece->plan.name);
      continue;
    }
    append_staged(writer, *piece);
  }
  writer.finish();
}

void FireqWriter::Impl::append_staged(SafetensorsWriter& writer, const Piece& piece) {
  Hasher hasher;
  TensorInfo part;
  for (part.begin = piece.info.begin; part.begin < piece.info.end; part.begin = part.end) {
    part.end = std::min(piece.info.end, part.begin + kCopyStep);
    const std::span<const std::byte> bytes = piece.staged->tensor(part).data;
    hasher.add_bytes(bytes);
    writer.append(bytes);
    piece.staged->release(part);  // so that resident memory stays small
  }
  if (hasher.digest() == piece.hash) return;
  throw Error(ErrorKind::environment, "a staged tensor no longer holds what was written")
      .path(piece.staged->path())
      .tensor(piece.plan.name)
      .expected("xxHash3 " + piece.hash)
      .found(hasher.digest())
      .hint("check the disk; --resume does this layer again");
}

void FireqWriter::Impl::copy_source_files() {
  for (const std::string& name : list_names(source_folder)) {
    if (!is_copied(name) || side_files.contains(name)) continue;
    std::error_code code;
    if (!std::filesystem::is_regular_file(source_folder + "/" + name, code)) continue;
    check_inside_folder(source_folder, name);
    fs.copy_file(source_folder + "/" + name, folder.files() + "/" + name);
  }
}

void FireqWriter::Impl::write_file(const std::string& name, std::string_view text) {
  const std::unique_ptr<OutputFile> file = fs.create(folder.files() + "/" + name);
  file->write(std::as_bytes(std::span(text)));
  file->sync();
  file->close();
}

// Of an assembly that was interrupted, perhaps with another shard size.
void FireqWriter::Impl::remove_leftovers() {
  for (const std::string& name : list_names(folder.files())) {
    if (!side_files.contains(name)) fs.remove_all(folder.files() + "/" + name);
  }
}

void FireqWriter::publish(const std::vector<std::string>& units_in_order, const std::string& config_json,
                          std::uint64_t shard_size, const Revise& revise) {
  if (shard_size == 0) throw Error(ErrorKind::usage, "the shard size is 0").hint("use --shard-size 5GB");
  Impl& impl = *impl_;
  impl.remove_leftovers();
  const std::vector<Piece> pieces = impl.collect(units_in_order);
  const auto shards = impl.cut(pieces, shard_size);
  nlohmann::json index = {{"metadata", {{"total_size", 0}}}, {"weight_map", nlohmann::json::object()}};
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const std::string name = shard_name(i, shards.size());
    impl.write_shard(name, shards[i]);
    for (const Piece* const piece : shards[i]) {
      index["weight_map"][piece->plan.name] = name;
      total += piece->bytes;
    }
  }
  impl.copy_source_files();
  index["metadata"]["total_size"] = total;
  if (shards.size() > 1) impl.write_file("model.safetensors.index.json", index.dump(2) + "\n");
  impl.write_file("config.json", config_json);
  impl.staged.clear();
  if (revise) impl.write_file("config.json", revise(impl.folder.files()));
  impl.folder.swap_in();
}

}  // namespace fireq::formats
