#include <hdf5.h>

#include <algorithm>
#include <mutex>
#include <nlohmann/json.hpp>
#include <utility>

#include "common/error.hpp"
#include "formats/hash.hpp"
#include "formats/statistics.hpp"
#include "formats/statistics_file.hpp"

namespace fireq::formats {
namespace {

constexpr std::size_t kGrow = std::size_t{1} << 20U;  // bytes the image in memory grows by

std::mutex& hdf5_mutex() {
  static std::mutex mutex;
  return mutex;
}

herr_t keep_description(unsigned /*depth*/, const H5E_error2_t* error, void* text) {
  if (error->desc != nullptr) *static_cast<std::string*>(text) = error->desc;
  return 0;
}

// The library's one lock, and its habit of printing errors switched off while it is held.
class Hdf5Session {
 public:
  Hdf5Session() : lock_(hdf5_mutex()) {
    H5Eget_auto2(H5E_DEFAULT, &print_, &print_data_);
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
  }
  ~Hdf5Session() {
    H5Eclear2(H5E_DEFAULT);
    H5Eset_auto2(H5E_DEFAULT, print_, print_data_);
  }
  Hdf5Session(const Hdf5Session&) = delete;
  Hdf5Session& operator=(const Hdf5Session&) = delete;

 private:
  std::unique_lock<std::mutex> lock_;
  H5E_auto2_t print_ = nullptr;
  void* print_data_ = nullptr;
};

class Hdf5Handle {
 public:
  using Close = herr_t (*)(hid_t);
  Hdf5Handle(hid_t id, Close close) : id_(id), close_(close) {}
  ~Hdf5Handle() {
    if (id_ >= 0) close_(id_);
  }
  Hdf5Handle(const Hdf5Handle&) = delete;
  Hdf5Handle& operator=(const Hdf5Handle&) = delete;
  hid_t get() const noexcept { return id_; }

 private:
  hid_t id_;
  Close close_;
};

// What HDF5 says about its last failure, at the place where it arose.
std::string hdf5_reason() {
  std::string text;
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_DOWNWARD, keep_description, &text);  // the last one is the innermost
  return text;
}

hid_t file_type(StatisticType type) {
  return type == StatisticType::f32   ? H5T_IEEE_F32LE
         : type == StatisticType::f64 ? H5T_IEEE_F64LE
                                      : H5T_STD_U64LE;
}
hid_t memory_type(StatisticType type) {
  return type == StatisticType::f32   ? H5T_NATIVE_FLOAT
         : type == StatisticType::f64 ? H5T_NATIVE_DOUBLE
                                      : H5T_NATIVE_UINT64;
}
[[noreturn]] void fail(const char* what) {
  throw Error(ErrorKind::internal, std::string("HDF5 cannot make the statistics: ") + what)
      .found(hdf5_reason());
}

Hdf5Handle checked(hid_t id, Hdf5Handle::Close close, const char* what) {
  if (id < 0) fail(what);
  return {id, close};
}
void check(herr_t status, const char* what) {
  if (status < 0) fail(what);
}

void write_attribute(hid_t object, const char* name, std::uint64_t value) {
  const Hdf5Handle space = checked(H5Screate(H5S_SCALAR), H5Sclose, name);
  const Hdf5Handle attribute =
      checked(H5Acreate2(object, name, H5T_STD_U64LE, space.get(), H5P_DEFAULT, H5P_DEFAULT), H5Aclose, name);
  check(H5Awrite(attribute.get(), H5T_NATIVE_UINT64, &value), name);
}

void write_attribute(hid_t object, const char* name, std::string text) {
  const Hdf5Handle space = checked(H5Screate(H5S_SCALAR), H5Sclose, name);
  const Hdf5Handle type = checked(H5Tcopy(H5T_C_S1), H5Tclose, name);
  if (text.empty()) text.push_back('\0');  // HDF5 has no string type of size 0
  check(H5Tset_size(type.get(), text.size()), name);
  check(H5Tset_strpad(type.get(), H5T_STR_NULLPAD), name);
  const Hdf5Handle attribute =
      checked(H5Acreate2(object, name, type.get(), space.get(), H5P_DEFAULT, H5P_DEFAULT), H5Aclose, name);
  check(H5Awrite(attribute.get(), type.get(), text.data()), name);
}

class Writer {
 public:
  explicit Writer(const CalibrationStatistics& statistics)
      : group_options_(checked(H5Pcreate(H5P_GROUP_CREATE), H5Pclose, "group options")) {
    const Hdf5Handle file_options = checked(H5Pcreate(H5P_FILE_CREATE), H5Pclose, "file options");
    const Hdf5Handle access = checked(H5Pcreate(H5P_FILE_ACCESS), H5Pclose, "access options");
    // The oldest file format, which every version of the library reads. (In a later one the superblock has a
    // checksum, and H5Fget_file_image changes the superblock without renewing it: nothing can read the
    // result.) No times, so that equal statistics are equal bytes; links inside the groups' headers, which is
    // smaller and simpler than the index HDF5 would build from 9 links on, and is to be had together with
    // their order only; an index of chunks that is sized for the one chunk of a dataset.
    for (const hid_t options : {group_options_.get(), file_options.get()}) {
      check(H5Pset_obj_track_times(options, false), "times");
      check(H5Pset_link_phase_change(options, 65535, 65535), "links");
      check(H5Pset_link_creation_order(options, H5P_CRT_ORDER_TRACKED), "links");
    }
    check(H5Pset_istore_k(file_options.get(), 1), "index of chunks");
    check(H5Pset_libver_bounds(access.get(), H5F_LIBVER_EARLIEST, H5F_LIBVER_V18), "format");
    check(H5Pset_fapl_core(access.get(), kGrow, false), "memory image");
    const Hdf5Handle file = checked(
        H5Fcreate("fireq-statistics", H5F_ACC_TRUNC, file_options.get(), access.get()), H5Fclose, "file");
    write_meta(file.get(), statistics);
    const Hdf5Handle layers = group(file.get(), "layers");
    for (std::size_t i = 0; i < statistics.layers.size(); ++i) {
      write_layer(layers.get(), layer_group_name(i), statistics.layers[i], statistics.meta);
    }
    check(H5Fflush(file.get(), H5F_SCOPE_GLOBAL), "flush");
    const ssize_t size = H5Fget_file_image(file.get(), nullptr, 0);
    if (size <= 0) fail("size");
    image_.resize(static_cast<std::size_t>(size));
    if (H5Fget_file_image(file.get(), image_.data(), image_.size()) != size) fail("image");
  }

  // HDF5 data and table.
  std::string take() { return std::move(image_) + table_.dump() + "\n"; }
  std::uint64_t table_offset() const noexcept { return kHeadBlock + image_.size(); }

 private:
  Hdf5Handle group(hid_t parent, const std::string& name) const {
    return checked(H5Gcreate2(parent, name.c_str(), H5P_DEFAULT, group_options_.get(), H5P_DEFAULT), H5Gclose,
                   "group");
  }

  void write_meta(hid_t file, const CalibrationStatistics& statistics) {
    const Hdf5Handle meta = group(file, "meta");
    const StatisticsMeta& m = statistics.meta;
    for (const auto& [name, text] :
         {std::pair{"model_fingerprint", &m.model_fingerprint}, {"text_fingerprint", &m.text_fingerprint}}) {
      write_attribute(meta.get(), name, *text);
      table_["meta"][name] = *text;
    }
    for (const auto& [name, value] : {std::pair{"format_version", kStatisticsVersion},
                                      {"tokens", m.tokens},
                                      {"windows", m.windows},
                                      {"seed", m.seed},
                                      {"layers", std::uint64_t{statistics.layers.size()}},
                                      {"kv_heads", m.kv_heads},
                                      {"head_dim", m.head_dim}}) {
      write_attribute(meta.get(), name, value);
      table_["meta"][name] = value;
    }
    table_["layers"] = nlohmann::json::array();
  }

  void write_layer(hid_t layers, const std::string& name, const LayerStatistics& layer,
                   const StatisticsMeta& meta) {
    const Hdf5Handle here = group(layers, name);
    nlohmann::json& row = table_["layers"].emplace_back(nlohmann::json::object());
    for (std::size_t s = 0; s < kSites; ++s) {
      const SiteStatistics& site = layer.sites[s];
      const std::string site_text(site_name(static_cast<Site>(s)));
      if (!site.empty()) row[site_text] = write_site(here.get(), site_text, site);
    }
    if (!layer.k_pair_radius.empty()) {
      row[kRadiusDataset.name] = write_dataset(here.get(), kRadiusDataset, layer.k_pair_radius.data(),
                                               {meta.kv_heads, meta.head_dim / 2});
    }
    if (!layer.k_centre_gain.empty()) {
      row[kCentreDataset.name] =
          write_dataset(here.get(), kCentreDataset, layer.k_centre_gain.data(), {meta.kv_heads});
    }
    if (!layer.q_products.empty()) {
      row[kProductsDataset.name] = write_dataset(here.get(), kProductsDataset, layer.q_products.data(),
                                                 {meta.kv_heads, meta.head_dim, meta.head_dim});
    }
  }

  // Returns the site's entry in the table.
  nlohmann::json write_site(hid_t layer, const std::string& name, const SiteStatistics& s) const {
    const Hdf5Handle here = group(layer, name);
    nlohmann::json entry{{"channels", s.absmax.size()}};
    std::vector<double> absmean(s.abssum);
    for (double& value : absmean) value /= static_cast<double>(s.count);
    const std::array<const void*, kSiteDatasets.size()> data{
        s.absmax.data(), absmean.data(), s.abssum.data(),    s.sumsq.data(), s.sum1.data(),
        s.sum3.data(),   s.sum4.data(),  s.histogram.data(), &s.count};
    const std::uint64_t channels = s.absmax.size();
    for (std::size_t i = 0; i < data.size(); ++i) {
      const std::uint64_t size = i == 7 ? kHistogramBins : i == 8 ? 1 : channels;
      entry[kSiteDatasets[i].name] = write_dataset(here.get(), kSiteDatasets[i], data[i], {size});
    }
    return entry;
  }

  // Returns the offset of the values in the finished file.
  static std::uint64_t write_dataset(hid_t parent, const DatasetRow& row, const void* data,
                                     const std::vector<hsize_t>& shape) {
    const auto rank = static_cast<int>(shape.size());
    const Hdf5Handle space = checked(H5Screate_simple(rank, shape.data(), nullptr), H5Sclose, row.name);
    const Hdf5Handle options = checked(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, row.name);
    check(H5Pset_obj_track_times(options.get(), false), row.name);
    check(H5Pset_chunk(options.get(), rank, shape.data()), row.name);  // one chunk: always read whole
    const Hdf5Handle dataset = checked(H5Dcreate2(parent, row.name, file_type(row.type), space.get(),
                                                  H5P_DEFAULT, options.get(), H5P_DEFAULT),
                                       H5Dclose, row.name);
    check(H5Dwrite(dataset.get(), memory_type(row.type), H5S_ALL, H5S_ALL, H5P_DEFAULT, data), row.name);
    write_attribute(dataset.get(), "description", std::string(row.description));
    hsize_t chunk_bytes = 0;
    haddr_t address = HADDR_UNDEF;
    std::vector<hsize_t> first(shape.size());
    check(H5Dget_chunk_info(dataset.get(), space.get(), 0, first.data(), nullptr, &address, &chunk_bytes),
          row.name);
    if (address == HADDR_UNDEF) fail(row.name);
    return kHeadBlock + address;
  }

  Hdf5Handle group_options_;
  std::string image_;
  nlohmann::json table_;
};

}  // namespace

std::size_t type_size(StatisticType type) {
  return type == StatisticType::f32 ? 4 : 8;
}

std::string layer_group_name(std::size_t layer) {
  const std::string digits = std::to_string(layer);
  return std::string(digits.size() < 3 ? 3 - digits.size() : 0, '0').append(digits);
}

std::string statistics_head_block(std::span<const std::byte> following, std::uint64_t table_offset) {
  std::string block(kHeadText);
  block.append(hex(XXH3_128bits(following.data(), following.size()))).append("\n");
  block.append(kTableText).append(std::to_string(table_offset)).append("\n");
  block.resize(kHeadBlock, '\0');
  return block;
}

std::string statistics_file_bytes(const CalibrationStatistics& statistics,
                                  const std::string& path_for_errors) {
  check_statistics(statistics, path_for_errors);
  const Hdf5Session session;
  Writer writer(statistics);
  const std::uint64_t table_offset = writer.table_offset();
  std::string following = writer.take();
  return following.insert(0, statistics_head_block(std::as_bytes(std::span(following)), table_offset));
}

void write_statistics(FileSystem& fs, const std::string& path, const CalibrationStatistics& statistics) {
  write_file_atomically(fs, path, std::string_view(statistics_file_bytes(statistics, path)));
}

}  // namespace fireq::formats
