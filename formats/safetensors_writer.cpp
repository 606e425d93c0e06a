#include <algorithm>
#include <nlohmann/json.hpp>
#include <unordered_set>
#include <utility>

#include "common/checked.hpp"
#include "formats/safetensors.hpp"

namespace fireq::formats {
namespace {

constexpr std::uint64_t kAlignment = 8;  // of the data section: the largest element

std::string quoted(const std::string& text) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    throw Error(ErrorKind::input, "name is not UTF-8").tensor(text);
  }
}

}  // namespace

std::uint64_t TensorPlan::bytes() const {
  return checked_mul(checked_elements(shape, name), dtype_size(dtype), name);
}

std::string make_safetensors_head(std::span<const TensorPlan> plan,
                                  const std::map<std::string, std::string>& metadata) {
  std::string head(kAlignment, '\0');
  head += '{';
  const char* comma = "";
  if (!metadata.empty()) {
    head += "\"__metadata__\":{";
    for (const auto& [key, value] : metadata) {
      head.append(comma).append(quoted(key)).append(":").append(quoted(value));
      comma = ",";
    }
    head += '}';
  }
  std::unordered_set<std::string_view> names{"__metadata__"};
  std::uint64_t begin = 0;
  for (const TensorPlan& tensor : plan) {
    if (!names.insert(tensor.name).second) {
      throw Error(ErrorKind::internal, "a tensor is to be written twice").tensor(tensor.name);
    }
    const std::uint64_t end = checked_add(begin, tensor.bytes(), tensor.name);
    head.append(comma).append(quoted(tensor.name)).append(R"(:{"dtype":")");
    head += dtype_name(tensor.dtype);
    head += R"(","shape":[)";
    for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
      head.append(i == 0 ? "" : ",").append(std::to_string(tensor.shape[i]));
    }
    head += "],\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(end) + "]}";
    comma = ",";
    begin = end;
  }
  head += '}';
  head.resize((head.size() + kAlignment - 1) / kAlignment * kAlignment, ' ');
  const std::uint64_t length = head.size() - kAlignment;
  if (length > kLargestSafetensorsHeader) {
    throw Error(ErrorKind::input, "safetensors header would be too long")
        .expected("at most " + std::to_string(kLargestSafetensorsHeader))
        .found(std::to_string(length));
  }
  for (std::size_t i = 0; i < kAlignment; ++i) head[i] = static_cast<char>(length >> (8 * i) & 0xffU);
  return head;
}

struct SafetensorsWriter::Impl {
  Impl(std::string path_in, const std::vector<TensorPlan>& plan,
       const std::map<std::string, std::string>& metadata)
      : path(std::move(path_in)), head(make_safetensors_head(plan, metadata)) {
    for (const TensorPlan& tensor : plan) expected += tensor.bytes();
  }
  void open(std::unique_ptr<OutputFile> opened) {
    file = std::move(opened);
    file->write(std::as_bytes(std::span(head)));
  }

  std::unique_ptr<OutputFile> file;
  std::string path;
  std::string head;
  std::uint64_t expected = 0;
  std::uint64_t written = 0;
};

// The plan is checked before the file is created.
SafetensorsWriter::SafetensorsWriter(FileSystem& fs, const std::string& path,
                                     const std::vector<TensorPlan>& plan,
                                     const std::map<std::string, std::string>& metadata)
    : impl_(std::make_unique<Impl>(path, plan, metadata)) {
  impl_->open(fs.create(path));
}
SafetensorsWriter::SafetensorsWriter(std::unique_ptr<OutputFile> file, const std::string& path,
                                     const std::vector<TensorPlan>& plan,
                                     const std::map<std::string, std::string>& metadata)
    : impl_(std::make_unique<Impl>(path, plan, metadata)) {
  impl_->open(std::move(file));
}

SafetensorsWriter::~SafetensorsWriter() = default;

std::uint64_t SafetensorsWriter::file_size() const noexcept {
  return impl_->head.size() + impl_->expected;
}

void SafetensorsWriter::append(std::span<const std::byte> bytes) {
  if (bytes.size() > impl_->expected - impl_->written) {
    throw Error(ErrorKind::internal, "more bytes than the planned tensors hold").path(impl_->path);
  }
  impl_->file->write(bytes);
  impl_->written += bytes.size();
}

void SafetensorsWriter::finish() {
  if (impl_->written != impl_->expected) {
    throw Error(ErrorKind::internal, "fewer bytes than the planned tensors hold")
        .path(impl_->path)
        .expected(std::to_string(impl_->expected))
        .found(std::to_string(impl_->written));
  }
  impl_->file->sync();
  impl_->file->close();
}

}  // namespace fireq::formats
