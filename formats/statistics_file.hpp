// What the writer and the reader of the statistics file share. Internal to formats/.
//
// The file is: head block, HDF5 data, table. The HDF5 data are for people and their tools. The table, JSON,
// holds the attributes and the place of each dataset's values in the file, and is all that our own reader
// looks at: the HDF5 library crashes on files that were made to do harm, so it is never given one.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace fireq::formats {

inline constexpr std::uint64_t kStatisticsVersion = 1;

// HDF5 lets a file begin with a block of any content, and looks for its own signature behind it; and it does
// not mind bytes behind its end. The block is 512 bytes: a text line with the version and the xxHash3-128 of
// everything that follows, a line with the table's offset in the file, padded with zeros.
inline constexpr std::size_t kHeadBlock = 512;
inline constexpr std::string_view kHeadText = "FireQ statistics 1, xxh3-128 of what follows this block: ";
inline constexpr std::string_view kTableText = "table at byte ";
std::string statistics_head_block(std::span<const std::byte> following, std::uint64_t table_offset);

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

inline constexpr DatasetRow kCentreDataset{
    "k_centre_gain", StatisticType::f64,
    "squared error of each KV head's attention outputs with INT4 keys as they are, less that with their mean "
    "taken off first, summed over sampled tokens; unit: of the values, squared"};

inline constexpr DatasetRow kProductsDataset{"q_products", StatisticType::f64,
                                             "sum of q^T q of the queries after RoPE over all tokens and "
                                             "over the query heads of each KV head; unit: of "
                                             "the queries, squared"};

std::string layer_group_name(std::size_t layer);  // "000"
std::size_t type_size(StatisticType type);

}  // namespace fireq::formats
