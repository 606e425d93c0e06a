// What the writer and the reader of the statistics file share: names, meanings, the block in front of the
// HDF5 data, and owners of HDF5 handles. Internal to formats/.
#pragma once

#include <hdf5.h>

#include <array>
#include <cstdint>
#include <mutex>
#include <span>
#include <string>
#include <string_view>

#include "common/error.hpp"

namespace fireq::formats {

inline constexpr std::uint64_t kStatisticsVersion = 1;

// HDF5 lets a file begin with a block of any content, and looks for its own signature behind it. Ours is 512
// bytes: a text line with the version and the xxHash3-128 of everything that follows, padded with zeros.
inline constexpr std::size_t kHeadBlock = 512;
inline constexpr std::string_view kHeadText = "FireQ statistics 1, xxh3-128 of the HDF5 data that follows: ";
std::string statistics_head_block(std::span<const std::byte> hdf5_data);

enum class StatisticType : std::uint8_t { f32, f64, u64 };

struct DatasetRow {
  const char* name;
  StatisticType type;
  const char* description;
};

// One site's datasets. All [C] but histogram [kHistogramBins] and count [1].
inline constexpr std::array<DatasetRow, 9> kSiteDatasets{{
    {"absmax", StatisticType::f32, "largest |x| of each channel over all tokens; unit: of the activation"},
    {"absmean", StatisticType::f64, "mean |x| of each channel: abssum / count; unit: of the activation"},
    {"abssum", StatisticType::f64, "sum of |x| of each channel over all tokens; unit: of the activation"},
    {"sumsq", StatisticType::f64,
     "sum of x^2 of each channel over all tokens; unit: of the activation, squared"},
    {"sum1", StatisticType::f64, "sum of x of each channel over all tokens; unit: of the activation"},
    {"sum3", StatisticType::f64,
     "sum of x^3 of each channel over all tokens; unit: of the activation, cubed"},
    {"sum4", StatisticType::f64,
     "sum of x^4 of each channel over all tokens; unit: of the activation, to the fourth"},
    {"histogram", StatisticType::u64,
     "values of all channels by floor(log2 |x|): bin 0 is |x| < 2^-16, bin i is [2^(i-17), 2^(i-16)), bin 39 "
     "is "
     "all above; unit: values"},
    {"count", StatisticType::u64, "tokens that were seen; unit: tokens"},
}};
inline constexpr DatasetRow kRadiusDataset{"k_pair_radius", StatisticType::f32,
                                           "largest sqrt(k_i^2 + k_(i+D/2)^2) of each KV head's RoPE pair i "
                                           "before RoPE, over all tokens; unit: of the "
                                           "activation"};

std::string layer_group_name(std::size_t layer);  // "000"

hid_t file_type(StatisticType type);    // little-endian, as stored
hid_t memory_type(StatisticType type);  // of this machine
std::size_t type_size(StatisticType type);

// The library's one lock, and its habit of printing errors switched off while it is held.
class Hdf5Session {
 public:
  Hdf5Session();
  ~Hdf5Session();
  Hdf5Session(const Hdf5Session&) = delete;
  Hdf5Session& operator=(const Hdf5Session&) = delete;

 private:
  std::unique_lock<std::recursive_mutex> lock_;
  H5E_auto2_t print_ = nullptr;
  void* print_data_ = nullptr;
};

// What HDF5 says about its last failure, at the place where it arose.
std::string hdf5_reason();

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
  bool valid() const noexcept { return id_ >= 0; }

 private:
  hid_t id_;
  Close close_;
};

}  // namespace fireq::formats
