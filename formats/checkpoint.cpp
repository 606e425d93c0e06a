#include "formats/checkpoint.hpp"

#include <algorithm>
#include <array>
#include <filesystem>
#include <optional>
#include <system_error>
#include <utility>

#include "common/checked.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"
#include "formats/file_system.hpp"
#include "formats/folder_rules.hpp"
#include "formats/hash.hpp"
#include "formats/names.hpp"
#include "formats/safetensors.hpp"

namespace fireq::formats {
namespace {

namespace stdfs = std::filesystem;

constexpr std::string_view kSuffix = ".safetensors";
constexpr std::string_view kSingleFile = "model.safetensors";
constexpr std::string_view kIndexFile = "model.safetensors.index.json";
constexpr std::uint64_t kLargestIndex = 100'000'000;
// Part of the fingerprint's definition: another size gives other fingerprints.
constexpr std::uint64_t kHashChunk = std::uint64_t{4} << 20U;

Error input_error(std::string message, const std::string& path) {
  return std::move(Error(ErrorKind::input, std::move(message)).path(path));
}

void refuse_partial(const std::string& folder) {
  std::error_code code;
  const stdfs::path real = stdfs::canonical(folder, code);
  if (code) throw system_error("resolve", folder, code.value());
  const auto refuse = [&](const std::string& found) {
    throw input_error("an unfinished FireQ output does not load", folder)
        .found(found)
        .hint("finish it: run the same command with --resume");
  };
  for (const stdfs::path& part : real) {
    if (part.string().ends_with(kPartialSuffix)) refuse(in_quotes(part.string()) + " in its path");
  }
  for (const std::string_view marker : {kLockFile, kResumeFile}) {
    if (path_exists((real / marker).string())) refuse(std::string(marker));
  }
}

struct Listing {
  std::vector<std::string> safetensors;  // sorted
  bool index = false;
};

// What download tools leave of a file that is not whole yet: x.safetensors.part,
// x.safetensors.HASH.incomplete.
bool is_unfinished_download(const std::string& name) {
  const std::string lower = ascii_lower(name);
  if (lower.find(kSuffix) == std::string::npos) return false;
  static constexpr std::array<std::string_view, 9> kEndings{
      ".part", ".partial", ".incomplete", ".crdownload", ".download", ".aria2", ".tmp", ".temp", ".filepart"};
  return std::any_of(kEndings.begin(), kEndings.end(),
                     [&](std::string_view ending) { return lower.ends_with(ending); });
}

Listing list_folder(const std::string& folder) {
  Listing listing;
  std::map<std::string, std::string> spelling;
  for (const std::string& name : list_names(folder)) {  // sorted: the same error on any disk
    if (is_unfinished_download(name)) {
      throw input_error("an unfinished download", std::string(folder).append("/").append(name))
          .hint("finish the download, or delete this file if the model is complete without it");
    }
    if (name == kIndexFile) listing.index = true;
    const std::string lower = ascii_lower(name);
    if (!lower.ends_with(kSuffix)) continue;
    const auto [known, fresh] = spelling.emplace(lower, name);
    if (!fresh) {
      throw input_error("two file names differ only in case", folder)
          .expected("one of them")
          .found(in_quotes(known->second) + " and " + in_quotes(name));
    }
    if (name.ends_with(kSuffix)) listing.safetensors.push_back(name);
  }
  return listing;
}

// model-00001-of-00003.safetensors with a count above 1.
bool is_one_of_several(const std::string& name) {
  const std::size_t of = name.rfind("-of-");
  if (of == std::string::npos) return false;
  const std::string count = name.substr(of + 4, name.size() - of - 4 - kSuffix.size());
  return !count.empty() && count.find_first_not_of("0123456789") == std::string::npos &&
         count.find_first_not_of('0') != std::string::npos &&
         count.substr(count.find_first_not_of('0')) != "1";
}

}  // namespace

struct CheckpointReader::Impl {
  struct Place {
    std::size_t shard = 0;
    TensorInfo info;
  };
  std::string folder;
  std::vector<SafetensorsFile> shards;
  std::map<std::string, Place> tensors;

  void open_single(const Listing& listing);
  void open_indexed(const Listing& listing);
  void add_shard(const std::string& name, const std::map<std::string, std::string>* shard_of);

  const Place& place(const std::string& name) const {
    const auto found = tensors.find(name);
    if (found == tensors.end()) throw input_error("the tensor is missing", folder).tensor(name);
    return found->second;
  }
};

void CheckpointReader::Impl::add_shard(const std::string& name,
                                       const std::map<std::string, std::string>* shard_of) {
  const std::size_t shard = shards.size();
  const std::string path = folder + "/" + name;
  shards.emplace_back(path);
  for (const TensorInfo& info : shards.back().header().tensors) {
    if (shard_of != nullptr) {
      const auto entry = shard_of->find(info.name);
      if (entry == shard_of->end()) {
        throw input_error("tensor is not in the index", path).tensor(info.name);
      }
      if (entry->second != name) {
        throw input_error("tensor is in another shard than the index says", path)
            .tensor(info.name)
            .expected(entry->second)
            .found(name);
      }
    }
    tensors.emplace(info.name, Place{shard, info});
  }
}

void CheckpointReader::Impl::open_single(const Listing& listing) {
  if (listing.safetensors.empty()) {
    throw input_error("no *.safetensors file in the folder", folder)
        .expected(std::string(kSingleFile) + " or " + std::string(kIndexFile))
        .hint(
            "a checkpoint in another format (pytorch_model.bin, GGUF) must be converted to safetensors "
            "first");
  }
  const std::string& name = listing.safetensors.front();
  if (listing.safetensors.size() > 1 || is_one_of_several(name)) {
    throw input_error("several shards but no index", folder)
        .expected(std::string(kIndexFile))
        .found(listing.safetensors.size() > 1
                   ? std::to_string(listing.safetensors.size()) + " *.safetensors files"
                   : name)
        .hint("download the index too, or keep one complete file in the folder");
  }
  add_shard(name, nullptr);
}

void CheckpointReader::Impl::open_indexed(const Listing& listing) {
  const std::string path = folder + "/" + std::string(kIndexFile);
  const std::map<std::string, std::string> shard_of =
      parse_safetensors_index(read_text_inside_folder(folder, std::string(kIndexFile), kLargestIndex), path);
  std::map<std::string, std::string> first_tensor;  // of each shard, for the message
  for (const auto& [tensor, shard] : shard_of) first_tensor.emplace(shard, tensor);
  for (const auto& [shard, tensor] : first_tensor) {
    if (std::binary_search(listing.safetensors.begin(), listing.safetensors.end(), shard)) continue;
    throw input_error("a shard is missing", folder + "/" + shard)
        .tensor(tensor)
        .hint("the index names it; download it again");
  }
  // Other *.safetensors files may lie beside the shards (some models ship a second copy in another format)
  // and are not read; but with the name that means "the whole model" it is unclear which of the two is meant.
  const std::string single(kSingleFile);
  if (std::binary_search(listing.safetensors.begin(), listing.safetensors.end(), single) &&
      !first_tensor.contains(single)) {
    throw input_error("the folder has both " + single + " and an index of other shards", folder)
        .hint("move one of the two models away");
  }
  for (const auto& [shard, tensor] : first_tensor) {
    check_inside_folder(folder, shard);
    add_shard(shard, &shard_of);
  }
  for (const auto& [tensor, shard] : shard_of) {
    if (tensors.contains(tensor)) continue;
    throw input_error("tensor is not in the shard that the index names", folder + "/" + shard).tensor(tensor);
  }
}

CheckpointReader::CheckpointReader(const std::string& folder, Output output)
    : impl_(std::make_unique<Impl>()) {
  impl_->folder = folder;
  while (impl_->folder.size() > 1 && impl_->folder.ends_with('/')) impl_->folder.pop_back();
  std::error_code code;
  if (!stdfs::is_directory(folder, code)) {
    throw Error(ErrorKind::usage, stdfs::exists(folder, code) ? "not a folder" : "no such folder")
        .path(folder)
        .hint("name the folder that holds config.json and the *.safetensors files");
  }
  if (output == Output::finished) refuse_partial(impl_->folder);
  const Listing listing = list_folder(impl_->folder);
  if (listing.index) {
    impl_->open_indexed(listing);
  } else {
    for (const std::string& name : listing.safetensors) check_inside_folder(impl_->folder, name);
    impl_->open_single(listing);
  }
}

CheckpointReader::~CheckpointReader() = default;
CheckpointReader::CheckpointReader(CheckpointReader&&) noexcept = default;
CheckpointReader& CheckpointReader::operator=(CheckpointReader&&) noexcept = default;

const std::string& CheckpointReader::folder() const noexcept {
  return impl_->folder;
}

std::vector<std::string> CheckpointReader::names() const {
  std::vector<std::string> names;
  names.reserve(impl_->tensors.size());
  for (const auto& entry : impl_->tensors) names.push_back(entry.first);
  return names;
}

bool CheckpointReader::contains(const std::string& name) const {
  return impl_->tensors.contains(name);
}

TensorView CheckpointReader::tensor(const std::string& name) const {
  const Impl::Place& place = impl_->place(name);
  return impl_->shards[place.shard].tensor(place.info);
}

std::string CheckpointReader::file_of(const std::string& name) const {
  return impl_->shards[impl_->place(name).shard].path();
}

void CheckpointReader::release(const std::string& name) const noexcept {
  const auto found = impl_->tensors.find(name);
  if (found != impl_->tensors.end()) impl_->shards[found->second.shard].release(found->second.info);
}

std::uint64_t CheckpointReader::total_bytes() const {
  std::uint64_t total = 0;
  for (const auto& entry : impl_->tensors) {
    total = checked_add(total, entry.second.info.end - entry.second.info.begin, "bytes of all tensors");
  }
  return total;
}

std::string CheckpointReader::fingerprint(int threads) const {
  struct Chunk {
    const SafetensorsFile* file;
    TensorInfo range;  // begin and end of this chunk; its other fields stay empty
    XXH128_hash_t hash{};
  };
  std::vector<Chunk> chunks;
  for (const auto& [name, place] : impl_->tensors) {
    for (std::uint64_t begin = place.info.begin; begin < place.info.end; begin += kHashChunk) {
      TensorInfo range;
      range.begin = begin;
      range.end = std::min(place.info.end, begin + kHashChunk);
      chunks.push_back({&impl_->shards[place.shard], range});
    }
  }
  parallel_for(chunks.size(), threads, [&](std::size_t i) {
    Chunk& chunk = chunks[i];
    const std::span<const std::byte> bytes = chunk.file->tensor(chunk.range).data;
    chunk.hash = XXH3_128bits(bytes.data(), bytes.size());
    chunk.file->release(chunk.range);
  });
  Hasher all;
  std::size_t next = 0;
  all.add("fireq tensors 1");
  for (const auto& [name, place] : impl_->tensors) {
    all.add(name);
    all.add(dtype_name(place.info.dtype));
    all.add(std::uint64_t{place.info.shape.size()});
    for (const std::uint64_t d : place.info.shape) all.add(d);
    for (std::uint64_t begin = place.info.begin; begin < place.info.end; begin += kHashChunk) {
      const XXH128_hash_t& hash = chunks[next++].hash;
      all.add(hash.high64);
      all.add(hash.low64);
    }
  }
  return all.digest();
}

}  // namespace fireq::formats
