// Reads the statistics file through its table (statistics_file.hpp). Every place that the table names lies in
// the file, no two share a byte, and so what is read is never larger than the file.
#include <algorithm>
#include <charconv>
#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>

#include "common/checked.hpp"
#include "common/error.hpp"
#include "formats/mapped_file.hpp"
#include "formats/model_config_json.hpp"
#include "formats/names.hpp"
#include "formats/statistics.hpp"
#include "formats/statistics_file.hpp"

namespace fireq::formats {
namespace {

constexpr std::uint64_t kMostLayers = 100'000;
constexpr std::uint64_t kLargestNumber = std::uint64_t{1} << 53U;  // of a count or size
constexpr std::uint64_t kMostHeads = std::uint64_t{1} << 31U;

class Reader {
 public:
  explicit Reader(const std::string& path) : path_(path), file_(path) {}

  CalibrationStatistics read() {
    const nlohmann::json table = parse_json(check_head(), path_);
    const JsonFields fields(table, path_);
    CalibrationStatistics statistics;
    const std::uint64_t layers = read_meta(fields.object("meta"), statistics.meta);
    const nlohmann::json& rows = fields.array("layers");
    if (rows.size() != layers)
      fields.fail("layers", "has another length than its number says", std::to_string(layers));
    statistics.layers.resize(layers);
    for (std::size_t i = 0; i < layers; ++i) {
      const std::string name = "layers." + layer_group_name(i) + ".";
      read_layer(JsonFields(rows[i], path_, name), "/layers/" + layer_group_name(i) + "/", statistics.meta,
                 statistics.layers[i]);
    }
    check_disjoint();
    check_statistics(statistics, path_);
    return statistics;
  }

 private:
  struct Range {
    std::uint64_t begin, end;
    std::string name;
  };

  std::string_view text() const {
    return {reinterpret_cast<const char*>(file_.bytes().data()), file_.bytes().size()};
  }

  // Returns the table's text.
  std::string_view check_head() {
    if (text().size() <= kHeadBlock || !text().starts_with(kHeadText)) {
      throw Error(ErrorKind::input, "not a FireQ statistics file")
          .path(path_)
          .offset(0)
          .expected(in_quotes(kHeadText))
          .hint("make one with 'fireq calibrate'");
    }
    const std::size_t line = text().find(kTableText);
    if (line < kHeadBlock - kTableText.size()) {
      const char* const digits = text().data() + line + kTableText.size();
      std::from_chars(digits, text().data() + kHeadBlock, table_);
    }
    // Made again as a whole, so that every byte of the block counts.
    const std::string head = statistics_head_block(file_.bytes().subspan(kHeadBlock), table_);
    if (text().substr(0, kHeadBlock) != head) {
      throw Error(ErrorKind::input, "the file is damaged: its checksum does not fit")
          .path(path_)
          .offset(kHeadText.size())
          .expected(head.substr(kHeadText.size(), 32))
          .found(std::string(text().substr(kHeadText.size(), 32)))
          .hint("copy it again, or make it again with 'fireq calibrate'");
    }
    if (table_ < kHeadBlock || table_ > text().size()) {
      throw Error(ErrorKind::input, "the table's place is outside of the file")
          .path(path_)
          .offset(line)
          .expected(std::to_string(kHeadBlock) + " to " + std::to_string(text().size()))
          .found(std::to_string(table_));
    }
    return text().substr(table_);
  }

  static std::uint64_t read_meta(const JsonFields& fields, StatisticsMeta& meta) {
    if (fields.count("format_version", 0, kLargestNumber) != kStatisticsVersion) {
      fields.fail("format_version", "is unknown", std::to_string(kStatisticsVersion),
                  "the file was made by another version of this program");
    }
    meta.model_fingerprint = fields.text("model_fingerprint");
    meta.text_fingerprint = fields.text("text_fingerprint");
    meta.tokens = fields.count("tokens", 0, kLargestNumber);
    meta.windows = fields.count("windows", 0, kLargestNumber);
    meta.seed = fields.count("seed", 0, ~std::uint64_t{0});
    meta.kv_heads = fields.count("kv_heads", 0, kMostHeads);
    meta.head_dim = fields.count("head_dim", 0, kMostHeads);
    return fields.count("layers", 0, kMostLayers);
  }

  void read_layer(const JsonFields& row, const std::string& group, const StatisticsMeta& meta,
                  LayerStatistics& layer) {
    std::size_t known = 0;
    for (std::size_t s = 0; s < kSites; ++s) {
      const std::string site(site_name(static_cast<Site>(s)));
      if (row.find(site) == nullptr) continue;
      ++known;
      read_site(row.object(site), group + site + "/", layer.sites[s]);
    }
    if (row.find(kRadiusDataset.name) != nullptr) {
      ++known;
      const std::uint64_t pairs = checked_mul(meta.kv_heads, meta.head_dim / 2, kRadiusDataset.name);
      read_values(row, kRadiusDataset, group, pairs, layer.k_pair_radius);
    }
    if (row.find(kCentreDataset.name) != nullptr) {
      ++known;
      read_values(row, kCentreDataset, group, meta.kv_heads, layer.k_centre_gain);
    }
    if (row.find(kProductsDataset.name) != nullptr) {
      ++known;
      const std::uint64_t square = checked_mul(meta.head_dim, meta.head_dim, kProductsDataset.name);
      read_values(row, kProductsDataset, group, checked_mul(meta.kv_heads, square, kProductsDataset.name),
                  layer.q_products);
    }
    refuse_others(row, known);
  }

  void read_site(const JsonFields& entry, const std::string& group, SiteStatistics& s) {
    const std::uint64_t channels = entry.count("channels", 1, kLargestNumber);
    read_values(entry, kSiteDatasets[0], group, channels, s.absmax);
    std::vector<double> absmean;  // for people; the sum is what counts here
    const std::array<std::vector<double>*, 6> sums{&absmean, &s.abssum, &s.sumsq, &s.sum1, &s.sum3, &s.sum4};
    for (std::size_t i = 0; i < sums.size(); ++i)
      read_values(entry, kSiteDatasets[1 + i], group, channels, *sums[i]);
    read_values(entry, kSiteDatasets[7], group, kHistogramBins, s.histogram);
    std::vector<std::uint64_t> count;
    read_values(entry, kSiteDatasets[8], group, 1, count);
    if (count[0] == 0 || count[0] > kLargestNumber) {
      throw Error(ErrorKind::input, "out of range")
          .path(path_)
          .tensor(group + "count")
          .expected("1 to 2^53")
          .found(std::to_string(count[0]));
    }
    s.count = count[0];
    refuse_others(entry, 1 + kSiteDatasets.size());
  }

  // Every key that the format has was asked for.
  void refuse_others(const JsonFields& fields, std::size_t known) const {
    if (fields.value().size() == known) return;
    throw Error(ErrorKind::input, "key '" + fields.where() + "...' that is unknown, or null")
        .path(path_)
        .expected(std::to_string(known) + " keys")
        .found(std::to_string(fields.value().size()));
  }

  template <typename T>
  void read_values(const JsonFields& entry, const DatasetRow& row, const std::string& group,
                   std::uint64_t elements, std::vector<T>& out) {
    const std::string name = group + row.name;
    const std::uint64_t bytes = checked_mul(elements, type_size(row.type), name);
    const std::uint64_t begin = entry.count(row.name, kHeadBlock, kLargestNumber);
    const std::uint64_t end = checked_add(begin, bytes, name);
    if (end > table_) {
      throw Error(ErrorKind::input, "the values lie outside of the HDF5 data")
          .path(path_)
          .tensor(name)
          .offset(begin)
          .expected("an end of at most " + std::to_string(table_))
          .found(std::to_string(end));
    }
    // The sum is bounded before memory is taken; that no two share a byte is known at the end only.
    bytes_ = checked_add(bytes_, bytes, name);
    if (bytes_ > file_.bytes().size()) {
      throw Error(ErrorKind::input, "the values are larger than the file")
          .path(path_)
          .tensor(name)
          .expected("at most " + std::to_string(file_.bytes().size()) + " bytes")
          .found(std::to_string(bytes_));
    }
    ranges_.push_back({begin, end, name});
    out.resize(elements);
    if (bytes > 0) std::memcpy(out.data(), file_.bytes().data() + begin, bytes);
  }

  void check_disjoint() {
    std::sort(ranges_.begin(), ranges_.end(),
              [](const Range& a, const Range& b) { return a.begin < b.begin; });
    for (std::size_t i = 1; i < ranges_.size(); ++i) {
      if (ranges_[i].begin >= ranges_[i - 1].end) continue;
      throw Error(ErrorKind::input, "two datasets share bytes")
          .path(path_)
          .tensor(ranges_[i].name)
          .offset(ranges_[i].begin)
          .found("bytes of " + ranges_[i - 1].name);
    }
  }

  const std::string& path_;
  MappedFile file_;
  std::uint64_t table_ = 0;  // its offset
  std::uint64_t bytes_ = 0;
  std::vector<Range> ranges_;
};

}  // namespace

CalibrationStatistics read_statistics(const std::string& path) {
  try {
    return Reader(path).read();
  } catch (Error& error) {
    throw error.path_if_unset(path);
  }
}

}  // namespace fireq::formats
