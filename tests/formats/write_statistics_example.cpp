// Writes the statistics file that check_h5py.py reads: every value follows from its place by a formula that
// the script knows too. With a second argument: statistics of the shape of a 70B model instead, with random
// content, for the test of large reports.
#include <cmath>
#include <cstdio>
#include <random>

#include "formats/file_system.hpp"
#include "formats/statistics.hpp"

namespace fireq::formats {
namespace {

constexpr std::uint64_t kLayers = 2, kKvHeads = 2, kHeadDim = 4, kTokens = 3;

SiteStatistics example_site(std::uint64_t layer, std::uint64_t site) {
  const bool kv = site >= 2 && site <= 4;
  const std::uint64_t channels = kv ? kKvHeads * kHeadDim : 5 + site;
  SiteStatistics s;
  s.count = kTokens;
  for (std::uint64_t c = 0; c < channels; ++c) {
    const auto base = static_cast<double>(1000 * layer + 100 * site + c);
    s.absmax.push_back(static_cast<float>(base + 0.5));
    s.abssum.push_back(base * 3);
    s.sumsq.push_back(base * base);
    s.sum1.push_back(-base);
    s.sum3.push_back(-base * base * base);
    s.sum4.push_back(base * base * base * base);
  }
  s.histogram.assign(kHistogramBins, 0);
  s.histogram[site] = kTokens * channels - 1;
  s.histogram[kHistogramBins - 1] = 1;
  return s;
}

CalibrationStatistics example() {
  CalibrationStatistics all;
  all.meta = {"00112233445566778899aabbccddeeff",
              "ffeeddccbbaa99887766554433221100",
              kTokens,
              1,
              42,
              kKvHeads,
              kHeadDim};
  all.layers.resize(kLayers);
  for (std::uint64_t i = 0; i < kLayers; ++i) {
    for (std::uint64_t s = 0; s < kSites; ++s) all.layers[i].sites[s] = example_site(i, s);
    for (std::uint64_t k = 0; k < kKvHeads * kHeadDim / 2; ++k) {
      all.layers[i].k_pair_radius.push_back(static_cast<float>(10 * i + k) + 0.25F);
    }
    for (std::uint64_t g = 0; g < kKvHeads; ++g) {
      all.layers[i].k_centre_gain.push_back(static_cast<double>(10 * i + g) - 0.75);
    }
    for (std::uint64_t k = 0; k < kKvHeads * kHeadDim * kHeadDim; ++k) {
      all.layers[i].q_products.push_back(static_cast<double>(100 * i + k) - 3.5);
    }
  }
  return all;
}

// Sites in their order; keys, values and the rest as wide as those of Llama-3-70B.
CalibrationStatistics large_example() {
  constexpr std::uint64_t kLargeLayers = 80, kHidden = 8192, kKv = 1024, kFfn = 28672, kCount = 4;
  constexpr std::array<std::uint64_t, kSites> kChannels{kHidden, kHidden, kKv,     kKv,
                                                        kKv,     kHidden, kHidden, kFfn};
  CalibrationStatistics all;
  all.meta = {"00112233445566778899aabbccddeeff", "ffeeddccbbaa99887766554433221100", kCount, 1, 0, 8, 128};
  all.layers.resize(kLargeLayers);
  std::mt19937_64 random(70);
  std::lognormal_distribution<double> spread(0, 1);
  for (LayerStatistics& layer : all.layers) {
    for (std::size_t i = 0; i < kSites; ++i) {
      SiteStatistics& s = layer.sites[i];
      s.count = kCount;
      for (std::uint64_t c = 0; c < kChannels[i]; ++c) {
        const double x = spread(random);
        s.absmax.push_back(static_cast<float>(x));
        s.abssum.push_back(x * 2);
        s.sumsq.push_back(x * x * 2);
        s.sum1.push_back(x / 2);
        s.sum3.push_back(x);
        s.sum4.push_back(x * x * x * x * 2);
      }
      s.histogram.assign(kHistogramBins, 0);
      s.histogram[17] = kCount * kChannels[i];
    }
    for (std::uint64_t k = 0; k < kKv / 2; ++k)
      layer.k_pair_radius.push_back(static_cast<float>(spread(random)));
  }
  return all;
}

}  // namespace
}  // namespace fireq::formats

int main(int count, char** arguments) {
  if (count != 2 && count != 3) return 2;
  try {
    using namespace fireq::formats;
    write_statistics(real_file_system(), arguments[1], count == 3 ? large_example() : example());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
