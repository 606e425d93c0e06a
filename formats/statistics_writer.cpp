#include <algorithm>
#include <mutex>
#include <utility>

#include "common/error.hpp"
#include "formats/hash.hpp"
#include "formats/statistics.hpp"
#include "formats/statistics_file.hpp"

namespace fireq::formats {
namespace {

constexpr std::size_t kGrow = std::size_t{1} << 20U;  // bytes the image in memory grows by

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

  std::string take() { return std::move(image_); }

 private:
  Hdf5Handle group(hid_t parent, const std::string& name) const {
    return checked(H5Gcreate2(parent, name.c_str(), H5P_DEFAULT, group_options_.get(), H5P_DEFAULT), H5Gclose,
                   "group");
  }

  void write_meta(hid_t file, const CalibrationStatistics& statistics) const {
    const Hdf5Handle meta = group(file, "meta");
    const StatisticsMeta& m = statistics.meta;
    write_attribute(meta.get(), "format_version", kStatisticsVersion);
    write_attribute(meta.get(), "model_fingerprint", m.model_fingerprint);
    write_attribute(meta.get(), "text_fingerprint", m.text_fingerprint);
    write_attribute(meta.get(), "tokens", m.tokens);
    write_attribute(meta.get(), "windows", m.windows);
    write_attribute(meta.get(), "seed", m.seed);
    write_attribute(meta.get(), "layers", statistics.layers.size());
    write_attribute(meta.get(), "kv_heads", m.kv_heads);
    write_attribute(meta.get(), "head_dim", m.head_dim);
  }

  void write_layer(hid_t layers, const std::string& name, const LayerStatistics& layer,
                   const StatisticsMeta& meta) const {
    const Hdf5Handle here = group(layers, name);
    for (std::size_t s = 0; s < kSites; ++s) {
      const SiteStatistics& site = layer.sites[s];
      if (!site.empty()) write_site(here.get(), std::string(site_name(static_cast<Site>(s))), site);
    }
    if (!layer.k_pair_radius.empty()) {
      write_dataset(here.get(), kRadiusDataset, layer.k_pair_radius.data(),
                    {meta.kv_heads, meta.head_dim / 2});
    }
  }

  void write_site(hid_t layer, const std::string& name, const SiteStatistics& s) const {
    const Hdf5Handle here = group(layer, name);
    std::vector<double> absmean(s.abssum);
    for (double& value : absmean) value /= static_cast<double>(s.count);
    const std::array<const void*, kSiteDatasets.size()> data{
        s.absmax.data(), absmean.data(), s.abssum.data(),    s.sumsq.data(), s.sum1.data(),
        s.sum3.data(),   s.sum4.data(),  s.histogram.data(), &s.count};
    const std::uint64_t channels = s.absmax.size();
    for (std::size_t i = 0; i < data.size(); ++i) {
      const std::uint64_t size = i == 7 ? kHistogramBins : i == 8 ? 1 : channels;
      write_dataset(here.get(), kSiteDatasets[i], data[i], {size});
    }
  }

  static void write_dataset(hid_t parent, const DatasetRow& row, const void* data,
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
  }

  Hdf5Handle group_options_;
  std::string image_;
};

std::recursive_mutex& hdf5_mutex() {
  static std::recursive_mutex mutex;
  return mutex;
}

herr_t keep_description(unsigned /*depth*/, const H5E_error2_t* error, void* text) {
  if (error->desc != nullptr) *static_cast<std::string*>(text) = error->desc;
  return 0;
}

}  // namespace

Hdf5Session::Hdf5Session() : lock_(hdf5_mutex()) {
  // A damaged file can leave the library with objects that it cannot close, about which it would complain on
  // the terminal at the end of the process. Everything that matters is closed long before.
  static const herr_t no_closing_at_exit = H5dont_atexit();
  static_cast<void>(no_closing_at_exit);
  H5Eget_auto2(H5E_DEFAULT, &print_, &print_data_);
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}
Hdf5Session::~Hdf5Session() {
  H5Eclear2(H5E_DEFAULT);
  H5Eset_auto2(H5E_DEFAULT, print_, print_data_);
}

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
std::size_t type_size(StatisticType type) {
  return type == StatisticType::f32 ? 4 : 8;
}

std::string layer_group_name(std::size_t layer) {
  const std::string digits = std::to_string(layer);
  return std::string(digits.size() < 3 ? 3 - digits.size() : 0, '0').append(digits);
}

std::string statistics_head_block(std::span<const std::byte> hdf5_data) {
  std::string block(kHeadText);
  block.append(hex(XXH3_128bits(hdf5_data.data(), hdf5_data.size()))).append("\n");
  block.resize(kHeadBlock, '\0');
  return block;
}

std::string statistics_file_bytes(const CalibrationStatistics& statistics,
                                  const std::string& path_for_errors) {
  check_statistics(statistics, path_for_errors);
  const Hdf5Session session;
  std::string image = Writer(statistics).take();
  image.insert(0, statistics_head_block(std::as_bytes(std::span(image))));
  return image;
}

void write_statistics(FileSystem& fs, const std::string& path, const CalibrationStatistics& statistics) {
  write_file_atomically(fs, path, std::string_view(statistics_file_bytes(statistics, path)));
}

}  // namespace fireq::formats
