// A Hugging Face checkpoint folder: model.safetensors, or shards with model.safetensors.index.json.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/tensor.hpp"

namespace fireq::formats {

class CheckpointReader {
 public:
  // Opens and checks the folder: index and shards agree, no shard outside the folder, no tensor twice, no
  // half-downloaded file. Throws Error(input), or Error(usage) when the folder does not exist.
  explicit CheckpointReader(const std::string& folder);
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

  // xxHash3-128 hex over names, dtypes, shapes and bytes of all tensors in name order. Reads everything once.
  std::string fingerprint(int threads) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fireq::formats
