// A Hugging Face checkpoint folder: model.safetensors, or shards with model.safetensors.index.json.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/tensor.hpp"

namespace fireq::formats {

// What marks a folder in which a run still grows (fireq_folder.hpp); such a folder never loads.
inline constexpr std::string_view kPartialSuffix = ".fireq-partial";
inline constexpr std::string_view kLockFile = "fireq.lock";
inline constexpr std::string_view kResumeFile = "fireq-resume.jsonl";

class CheckpointReader {
 public:
  // Opens and checks the folder: index and shards agree, no shard outside the folder, no tensor twice, no
  // half-downloaded file, no half-written FireQ output. Throws Error(input), or Error(usage) when the folder
  // does not exist. Links are followed when they stay in the folder, or when they are those of a Hugging Face
  // cache (snapshots/REVISION/FILE -> blobs/HASH).
  // being_written: half-written outputs are let through, for a run that reads its own before it appears.
  enum class Output : std::uint8_t { finished, being_written };
  explicit CheckpointReader(const std::string& folder, Output output = Output::finished);
  ~CheckpointReader();
  CheckpointReader(CheckpointReader&&) noexcept;
  CheckpointReader& operator=(CheckpointReader&&) noexcept;

  const std::string& folder() const noexcept;
  std::vector<std::string> names() const;  // sorted
  bool contains(const std::string& name) const;
  TensorView tensor(const std::string& name) const;      // Error(input) when absent, naming the folder
  std::string file_of(const std::string& name) const;    // path of the shard (for messages)
  void release(const std::string& name) const noexcept;  // give back the mapped pages
  std::uint64_t total_bytes() const;                     // of all tensors' data

  // xxHash3-128 (32 hex digits) over names, dtypes, shapes and bytes of all tensors in name order. Reads
  // everything once; does not depend on threads or on how the tensors are cut into files.
  std::string fingerprint(int threads) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Tensor name -> shard file name, from the text of model.safetensors.index.json. Shard names are plain file
// names that end in ".safetensors" and differ in more than case. Throws Error(input).
std::map<std::string, std::string> parse_safetensors_index(std::string_view json_text,
                                                           const std::string& path_for_errors);

}  // namespace fireq::formats
