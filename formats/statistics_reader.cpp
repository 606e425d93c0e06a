// Reads the statistics file. Nothing that HDF5 could follow out of the file, or blow up in memory, is
// accepted: no links but hard ones, no object with two names, no external or virtual storage, no filters, and
// no dataset larger than what the file stores for it.
#include <algorithm>
#include <array>
#include <set>
#include <utility>

#include "common/checked.hpp"
#include "common/error.hpp"
#include "formats/mapped_file.hpp"
#include "formats/names.hpp"
#include "formats/statistics.hpp"
#include "formats/statistics_file.hpp"

namespace fireq::formats {
namespace {

constexpr std::uint64_t kMostLayers = 100'000;
constexpr std::uint64_t kLargestNumber = std::uint64_t{1} << 53U;  // of a count or size
constexpr std::size_t kLongestText = 64;

class Reader {
 public:
  explicit Reader(const std::string& path) : path_(path), file_(path) {}

  CalibrationStatistics read() {
    const std::span<const std::byte> image = check_head();
    const Hdf5Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
    // The bytes were copied into memory by H5Pset_file_image: no second look at the file, and no file lock.
    if (!access.valid() || H5Pset_fapl_core(access.get(), 1U << 16U, false) < 0 ||
        H5Pset_file_image(access.get(), const_cast<std::byte*>(image.data()), image.size()) < 0) {
      throw Error(ErrorKind::environment, "HDF5 cannot take the file").path(path_).found(hdf5_reason());
    }
    // The library refuses an image whose name is that of a file; nothing can lie below a regular file.
    const Hdf5Handle file(H5Fopen((path_ + "/image").c_str(), H5F_ACC_RDONLY, access.get()), H5Fclose);
    if (!file.valid()) throw broken("/", "not a readable HDF5 file");
    expect_links(file.get(), "/", 2);
    CalibrationStatistics statistics;
    const std::uint64_t layers = read_meta(file.get(), statistics.meta);
    const Hdf5Handle group = open_group(file.get(), "layers", "/layers");
    expect_links(group.get(), "/layers", layers);
    statistics.layers.resize(layers);
    for (std::size_t i = 0; i < layers; ++i) {
      const std::string name = layer_group_name(i);
      read_layer(group.get(), name, "/layers/" + name, statistics.meta, statistics.layers[i]);
    }
    check_statistics(statistics, path_);
    return statistics;
  }

 private:
  Error error(const std::string& name, std::string message) const {
    return std::move(Error(ErrorKind::input, std::move(message)).path(path_).tensor(name));
  }
  Error broken(const std::string& name, std::string message) const {
    Error e = error(name, std::move(message));
    const std::string reason = hdf5_reason();
    if (!reason.empty()) e.found(reason);
    return e;
  }

  std::span<const std::byte> check_head() const {
    const std::span<const std::byte> bytes = file_.bytes();
    const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    if (bytes.size() <= kHeadBlock || !text.starts_with(kHeadText)) {
      throw Error(ErrorKind::input, "not a FireQ statistics file")
          .path(path_)
          .offset(0)
          .expected(in_quotes(kHeadText))
          .hint("make one with 'fireq calibrate'");
    }
    const std::span<const std::byte> image = bytes.subspan(kHeadBlock);
    const std::string head = statistics_head_block(image);
    if (text.substr(0, kHeadBlock) != head) {
      throw Error(ErrorKind::input, "the file is damaged: its checksum does not fit")
          .path(path_)
          .offset(kHeadText.size())
          .expected(head.substr(kHeadText.size(), 32))
          .found(std::string(text.substr(kHeadText.size(), 32)))
          .hint("copy it again, or make it again with 'fireq calibrate'");
    }
    return image;
  }

  void expect_links(hid_t group, const std::string& name, std::uint64_t expected) const {
    H5G_info_t info{};
    if (H5Gget_info(group, &info) < 0) throw broken(name, "unreadable group");
    if (info.nlinks == expected) return;
    throw error(name, "wrong number of entries in the group")
        .expected(std::to_string(expected))
        .found(std::to_string(info.nlinks));
  }

  bool has_link(hid_t group, const char* name, const std::string& full_name) const {
    const htri_t there = H5Lexists(group, name, H5P_DEFAULT);
    if (there < 0) throw broken(full_name, "unreadable link");
    if (there == 0) return false;
    H5L_info_t info{};
    if (H5Lget_info(group, name, &info, H5P_DEFAULT) < 0) throw broken(full_name, "unreadable link");
    if (info.type != H5L_TYPE_HARD) {
      throw error(full_name, "a soft or external link").expected("the object itself");
    }
    return true;
  }

  // A thousand names for one dataset would be read, and kept in memory, a thousand times.
  void expect_new(hid_t parent, const char* name, const std::string& full_name) {
    H5G_stat_t object{};
    if (H5Gget_objinfo(parent, name, false, &object) < 0) throw broken(full_name, "unreadable object");
    if (!objects_.emplace(object.objno[0], object.objno[1]).second) {
      throw error(full_name, "two names for one object");
    }
  }

  Hdf5Handle open_group(hid_t parent, const char* name, const std::string& full_name) {
    if (!has_link(parent, name, full_name)) throw error(full_name, "the group is missing");
    expect_new(parent, name, full_name);
    const hid_t id = H5Gopen2(parent, name, H5P_DEFAULT);
    if (id < 0) throw broken(full_name, "unreadable group");
    return {id, H5Gclose};
  }

  std::uint64_t read_meta(hid_t file, StatisticsMeta& meta) {
    const Hdf5Handle group = open_group(file, "meta", "/meta");
    expect_links(group.get(), "/meta", 0);
    const std::uint64_t version = number(group.get(), "format_version");
    if (version != kStatisticsVersion) {
      throw error("/meta", "unknown format_version")
          .expected(std::to_string(kStatisticsVersion))
          .found(std::to_string(version))
          .hint("the file was made by another version of this program");
    }
    meta.model_fingerprint = text(group.get(), "model_fingerprint");
    meta.text_fingerprint = text(group.get(), "text_fingerprint");
    meta.tokens = bounded(group.get(), "tokens", kLargestNumber);
    meta.windows = bounded(group.get(), "windows", kLargestNumber);
    meta.seed = number(group.get(), "seed");
    meta.kv_heads = bounded(group.get(), "kv_heads", std::uint64_t{1} << 31U);
    meta.head_dim = bounded(group.get(), "head_dim", std::uint64_t{1} << 31U);
    return bounded(group.get(), "layers", kMostLayers);
  }

  Hdf5Handle open_attribute(hid_t object, const char* name) const {
    const std::string full = std::string("/meta@") + name;
    const htri_t there = H5Aexists(object, name);
    if (there == 0) throw error(full, "the attribute is missing");
    const hid_t id = there < 0 ? -1 : H5Aopen(object, name, H5P_DEFAULT);
    if (id < 0) throw broken(full, "unreadable attribute");
    const Hdf5Handle space(H5Aget_space(id), H5Sclose);
    if (!space.valid() || H5Sget_simple_extent_type(space.get()) != H5S_SCALAR) {
      H5Aclose(id);
      throw error(full, "the attribute is no scalar");
    }
    return {id, H5Aclose};
  }

  std::uint64_t number(hid_t object, const char* name) const {
    const Hdf5Handle attribute = open_attribute(object, name);
    const Hdf5Handle type(H5Aget_type(attribute.get()), H5Tclose);
    std::uint64_t value = 0;
    if (!type.valid() || H5Tequal(type.get(), H5T_STD_U64LE) <= 0) {
      throw error(std::string("/meta@") + name, "wrong type").expected("a little-endian 64-bit number");
    }
    if (H5Aread(attribute.get(), H5T_NATIVE_UINT64, &value) < 0) {
      throw broken(std::string("/meta@") + name, "unreadable attribute");
    }
    return value;
  }
  std::uint64_t bounded(hid_t object, const char* name, std::uint64_t most) const {
    const std::uint64_t value = number(object, name);
    if (value <= most) return value;
    throw error(std::string("/meta@") + name, "out of range")
        .expected("at most " + std::to_string(most))
        .found(std::to_string(value));
  }

  std::string text(hid_t object, const char* name) const {
    const std::string full = std::string("/meta@") + name;
    const Hdf5Handle attribute = open_attribute(object, name);
    const Hdf5Handle type(H5Aget_type(attribute.get()), H5Tclose);
    const bool fixed =
        type.valid() && H5Tget_class(type.get()) == H5T_STRING && H5Tis_variable_str(type.get()) == 0;
    const std::size_t size = fixed ? H5Tget_size(type.get()) : 0;
    if (size == 0 || size > kLongestText) {
      throw error(full, "wrong type").expected("a string of fixed size, at most 64 bytes");
    }
    std::string value(size, '\0');
    const Hdf5Handle memory(H5Tcopy(H5T_C_S1), H5Tclose);
    if (!memory.valid() || H5Tset_size(memory.get(), size) < 0 ||
        H5Tset_strpad(memory.get(), H5T_STR_NULLPAD) < 0 ||
        H5Aread(attribute.get(), memory.get(), value.data()) < 0) {
      throw broken(full, "unreadable attribute");
    }
    return value.substr(0, value.find('\0'));
  }

  void read_layer(hid_t layers, const std::string& name, const std::string& full, const StatisticsMeta& meta,
                  LayerStatistics& layer) {
    const Hdf5Handle group = open_group(layers, name.c_str(), full);
    std::uint64_t known = 0;
    for (std::size_t s = 0; s < kSites; ++s) {
      const std::string site(site_name(static_cast<Site>(s)));
      const std::string site_full = full + "/" + site;
      if (!has_link(group.get(), site.c_str(), site_full)) continue;
      ++known;
      read_site(open_group(group.get(), site.c_str(), site_full).get(), site_full, layer.sites[s]);
    }
    const std::string radius = full + "/" + kRadiusDataset.name;
    if (has_link(group.get(), kRadiusDataset.name, radius)) {
      ++known;
      read_dataset(group.get(), kRadiusDataset, radius, {meta.kv_heads, meta.head_dim / 2},
                   layer.k_pair_radius);
    }
    expect_links(group.get(), full, known);
  }

  void read_site(hid_t group, const std::string& full, SiteStatistics& s) {
    expect_links(group, full, kSiteDatasets.size());
    const auto dataset = [&](std::size_t i, std::vector<hsize_t> shape, auto& out) {
      read_dataset(group, kSiteDatasets[i], full + "/" + kSiteDatasets[i].name, std::move(shape), out);
    };
    dataset(0, {}, s.absmax);  // the first tells the number of channels
    const hsize_t channels = s.absmax.size();
    std::vector<double> absmean;  // for people; the sum is what counts here
    const std::array<std::vector<double>*, 6> sums{&absmean, &s.abssum, &s.sumsq, &s.sum1, &s.sum3, &s.sum4};
    for (std::size_t i = 0; i < sums.size(); ++i) dataset(1 + i, {channels}, *sums[i]);
    dataset(7, {kHistogramBins}, s.histogram);
    std::vector<std::uint64_t> count;
    dataset(8, {1}, count);
    if (count[0] == 0 || count[0] > kLargestNumber) {
      throw error(full + "/count", "out of range").expected("1 to 2^53").found(std::to_string(count[0]));
    }
    s.count = count[0];
  }

  // `shape` empty: any one dimension of at least 1.
  template <typename T>
  void read_dataset(hid_t group, const DatasetRow& row, const std::string& full, std::vector<hsize_t> shape,
                    std::vector<T>& out) {
    if (!has_link(group, row.name, full)) throw error(full, "the dataset is missing");
    expect_new(group, row.name, full);
    const Hdf5Handle dataset(H5Dopen2(group, row.name, H5P_DEFAULT), H5Dclose);
    if (!dataset.valid()) throw broken(full, "unreadable dataset");
    check_storage(dataset.get(), full);
    const Hdf5Handle type(H5Dget_type(dataset.get()), H5Tclose);
    if (!type.valid() || H5Tequal(type.get(), file_type(row.type)) <= 0) {
      throw error(full, "wrong type")
          .expected(row.type == StatisticType::f32   ? "little-endian float32"
                    : row.type == StatisticType::f64 ? "little-endian float64"
                                                     : "little-endian uint64");
    }
    const std::uint64_t elements = check_shape(dataset.get(), full, std::move(shape));
    const std::uint64_t bytes = checked_mul(elements, type_size(row.type), full);
    const std::uint64_t stored = H5Dget_storage_size(dataset.get());
    if (stored != bytes) {
      throw error(full, "stored bytes do not fit the shape")
          .expected(std::to_string(bytes))
          .found(std::to_string(stored));
    }
    // Two datasets can still point at the same bytes.
    bytes_read_ = checked_add(bytes_read_, bytes, full);
    if (bytes_read_ > file_.bytes().size()) {
      throw error(full, "the datasets are larger than the file")
          .expected("at most " + std::to_string(file_.bytes().size()) + " bytes")
          .found(std::to_string(bytes_read_));
    }
    out.resize(elements);
    if (H5Dread(dataset.get(), memory_type(row.type), H5S_ALL, H5S_ALL, H5P_DEFAULT, out.data()) < 0) {
      throw broken(full, "unreadable dataset");
    }
  }

  void check_storage(hid_t dataset, const std::string& full) const {
    const Hdf5Handle options(H5Dget_create_plist(dataset), H5Pclose);
    if (!options.valid()) throw broken(full, "unreadable dataset");
    if (H5Pget_layout(options.get()) != H5D_CHUNKED || H5Pget_external_count(options.get()) != 0 ||
        H5Pget_nfilters(options.get()) != 0) {
      throw error(full, "unexpected storage").expected("chunks inside the file, without filters");
    }
  }

  std::uint64_t check_shape(hid_t dataset, const std::string& full, std::vector<hsize_t> shape) const {
    const Hdf5Handle space(H5Dget_space(dataset), H5Sclose);
    const int rank = space.valid() ? H5Sget_simple_extent_ndims(space.get()) : -1;
    const std::size_t expected_rank = shape.empty() ? 1 : shape.size();
    if (rank < 0) throw broken(full, "unreadable shape");
    if (static_cast<std::size_t>(rank) != expected_rank) {
      throw error(full, "wrong rank").expected(std::to_string(expected_rank)).found(std::to_string(rank));
    }
    std::vector<hsize_t> found(expected_rank);
    if (H5Sget_simple_extent_dims(space.get(), found.data(), nullptr) < 0) {
      throw broken(full, "unreadable shape");
    }
    std::uint64_t elements = 1;
    std::string text;
    for (std::size_t i = 0; i < found.size(); ++i) {
      elements = checked_mul(elements, found[i], full);
      text += (i == 0 ? "" : " x ") + std::to_string(found[i]);
    }
    if (shape.empty()) {
      if (elements == 0) throw error(full, "a site without channels");
    } else if (found != shape) {
      std::string wanted;
      for (std::size_t i = 0; i < shape.size(); ++i)
        wanted += (i == 0 ? "" : " x ") + std::to_string(shape[i]);
      throw error(full, "wrong shape").expected(wanted).found(text);
    }
    return elements;
  }

  const std::string& path_;
  MappedFile file_;
  std::set<std::pair<unsigned long, unsigned long>> objects_;
  std::uint64_t bytes_read_ = 0;
};

}  // namespace

CalibrationStatistics read_statistics(const std::string& path) {
  const Hdf5Session session;
  try {
    return Reader(path).read();
  } catch (Error& error) {
    throw error.path_if_unset(path);
  }
}

}  // namespace fireq::formats
