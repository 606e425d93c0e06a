#include "calib/device_check.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>

#include "calib/exact_e4m3.hpp"
#include "common/checked.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/activation_quantizer.hpp"
#include "libquant/number_formats.hpp"
#include "libquant/packing.hpp"

namespace fireq::calib {
namespace {

using libquant::kGroupSize;
using libquant::QuantizedLinear;

// Bytes that differ; bytes that one of the two has too many count as well.
std::uint64_t differing(std::span<const std::uint8_t> a, std::span<const std::uint8_t> b) {
  const std::size_t n = std::min(a.size(), b.size());
  std::uint64_t count = std::max(a.size(), b.size()) - n;
  if (n > 0 && std::memcmp(a.data(), b.data(), n) == 0) return count;
  for (std::size_t i = 0; i < n; ++i) count += a[i] != b[i] ? 1U : 0U;
  return count;
}

// w8 [N, Kp] by the definition, as bytes.
std::vector<std::uint8_t> exact_operands(const QuantizedLinear& q, int threads) {
  const ExactE4m3 exact;
  std::array<std::array<std::uint8_t, 8>, 127> table{};
  for (std::size_t sigma = 0; sigma < table.size(); ++sigma) {
    for (std::size_t i = 0; i < 8; ++i) {
      table[sigma][i] = exact.nearest(static_cast<double>(q.levels.magnitude[i]) *
                                      exact.value(static_cast<std::uint8_t>(sigma)));
    }
  }
  const std::uint64_t kp = q.padded_cols();
  std::vector<std::uint8_t> out(checked_mul(q.rows, kp, "operands"));
  parallel_for(q.rows, threads, [&](std::size_t r) {
    for (std::uint64_t k = 0; k < kp; ++k) {
      const std::uint8_t code = q.code(r, k);
      const std::uint8_t byte = table[q.group_scales[r * q.groups() + k / kGroupSize]][code & 7U];
      out[r * kp + k] = static_cast<std::uint8_t>((code & 8U) != 0 ? byte | 0x80U : byte);
    }
  });
  return out;
}

struct Tokens {
  std::vector<std::uint16_t> x;  // [count, cols] bf16
  std::vector<std::uint8_t> x8;  // what the CPU's quantiser makes of it
  std::vector<float> scale;
  std::vector<double> y;  // [count, rows]: the definition's product
};

// Normal values, each channel with its width.
Tokens draw_tokens(std::uint64_t count, const std::vector<float>& width, std::mt19937_64& random) {
  Tokens t;
  std::normal_distribution<float> normal;
  const std::uint64_t cols = width.size();
  std::vector<float> row(cols);
  t.x.resize(count * cols);
  t.x8.resize(count * cols);
  for (std::uint64_t m = 0; m < count; ++m) {
    for (std::uint64_t k = 0; k < cols; ++k) row[k] = width[k] * normal(random);
    libquant::round_token(row, std::span(t.x).subspan(m * cols, cols));
    t.scale.push_back(libquant::quantize_token(row, std::span(t.x8).subspan(m * cols, cols)));
  }
  return t;
}

// The definition in double: each output one chain of additions over ascending k. Tokens go in blocks of 16,
// whose values lie side by side, so that a row's operands are read once per block.
void multiply_exactly(const QuantizedLinear& q, std::span<const std::uint8_t> operands,
                      const std::vector<float>& bias, int threads, Tokens& t) {
  constexpr std::uint64_t kBlock = 16;
  constexpr std::uint64_t kRows = 32;
  const ExactE4m3 exact;
  std::array<float, 256> value{};
  for (unsigned b = 0; b < 256; ++b) {
    const auto low = static_cast<std::uint8_t>(b & 0x7fU);
    const double v = low == 0x7f ? std::nan("") : exact.value(low);
    value[b] = static_cast<float>(b < 128 ? v : -v);
  }
  const std::uint64_t count = t.scale.size();
  t.y.assign(checked_mul(count, q.rows, "outputs"), std::nan(""));
  std::vector<float> block(kBlock * q.cols);  // [K][16]
  for (std::uint64_t first = 0; first < count; first += kBlock) {
    const std::uint64_t n = std::min(kBlock, count - first);
    std::fill(block.begin(), block.end(), 0.0F);
    for (std::uint64_t i = 0; i < n; ++i)
      for (std::uint64_t k = 0; k < q.cols; ++k)
        block[k * kBlock + i] = value[t.x8[(first + i) * q.cols + k]];
    parallel_for((q.rows + kRows - 1) / kRows, threads, [&](std::size_t task) {
      for (std::uint64_t r = task * kRows; r < std::min((task + 1) * kRows, q.rows); ++r) {
        std::array<double, kBlock> sum{};
        const std::uint8_t* w = operands.data() + r * q.padded_cols();
        for (std::uint64_t k = 0; k < q.cols; ++k) {
          const double weight = value[w[k]];
          const float* x = block.data() + k * kBlock;
          for (std::uint64_t i = 0; i < kBlock; ++i) sum[i] += weight * static_cast<double>(x[i]);
        }
        for (std::uint64_t i = 0; i < n; ++i) {
          double y = static_cast<double>(t.scale[first + i]) * q.row_scale(r) * sum[i];
          if (!bias.empty()) y += bias[r];
          t.y[(first + i) * q.rows + r] = y;
        }
      }
    });
  }
}

// Frobenius, of the first `tokens` tokens.
double relative_error(std::span<const std::uint16_t> y, const Tokens& expected) {
  double error = 0;
  double norm = 0;
  for (std::size_t i = 0; i < y.size(); ++i) {
    const double want = expected.y[i];
    const double d = static_cast<double>(libquant::decode_bf16(y[i])) - want;
    error += d * d;
    norm += want * want;
  }
  return norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
}

// The site whose statistics describe a linear's input.
formats::Site input_site(std::size_t linear) {
  switch (static_cast<LinearIndex>(linear)) {
    case kO:
      return formats::Site::o_in;
    case kGate:
    case kUp:
      return formats::Site::mlp_in;
    case kDown:
      return formats::Site::down_in;
    default:
      return formats::Site::attn_in;
  }
}

// Root mean squares of the calibration's channels, else log-normal widths with one channel in a hundred far
// out.
std::vector<float> channel_widths(const formats::SiteStatistics* site, std::uint64_t cols,
                                  std::mt19937_64& random) {
  std::vector<float> width(cols);
  if (site != nullptr && !site->empty() && site->sumsq.size() == cols) {
    for (std::uint64_t k = 0; k < cols; ++k)
      width[k] = static_cast<float>(std::sqrt(site->sumsq[k] / static_cast<double>(site->count)));
    return width;
  }
  std::normal_distribution<float> normal;
  for (float& w : width) w = std::exp(normal(random)) * (random() % 100 == 0 ? 40.0F : 1.0F);
  return width;
}

class Checker {
 public:
  Checker(const DeviceCheckOptions& options, DeviceProbe& device) : options_(options), device_(device) {}

  DeviceLinearCheck check(const std::string& name, const QuantizedLinear& q, const std::vector<float>& bias,
                          std::span<const std::uint8_t> tiles, const formats::SiteStatistics* site,
                          std::uint64_t seed) {
    DeviceLinearCheck result;
    result.name = name;
    result.rows = q.rows;
    result.cols = q.cols;
    const std::unique_ptr<LinearProbe> probe = device_.load(q, bias);
    result.wrong_tile_bytes = differing(probe->tiles(), tiles);
    const LinearProbe::Rows rows = probe->unpacked();
    result.wrong_unpacked_bytes =
        differing(rows.codes, q.codes) + differing(rows.group_scales, q.group_scales);

    const std::vector<std::uint8_t> operands = exact_operands(q, options_.threads);
    probe->visit_operands(options_.tokens, [&](const LinearProbe::Operands& found) {
      DeviceLinearCheck::Operands& kernel = result.operands.emplace_back();
      kernel.kernel = found.kernel;
      kernel.wrong = differing(found.bytes, operands);
      const auto [got, expected] =
          std::mismatch(found.bytes.begin(), found.bytes.end(), operands.begin(), operands.end());
      if (got == found.bytes.end() || expected == operands.end()) return;
      const auto at = static_cast<std::uint64_t>(expected - operands.begin());
      kernel.row = at / q.padded_cols();
      kernel.col = at % q.padded_cols();
      kernel.expected = *expected;
      kernel.found = *got;
    });

    std::mt19937_64 random(seed);
    const std::uint64_t most = *std::max_element(options_.tokens.begin(), options_.tokens.end());
    std::vector<float> flat(q.cols, 1.0F);
    flat[random() % q.cols] = 30.0F;
    const std::vector<float> like_calibration = channel_widths(site, q.cols, random);
    const std::array<std::pair<const char*, const std::vector<float>*>, 2> kinds{
        {{"random", &flat}, {"calibration-like", &like_calibration}}};
    for (const auto& [kind, width] : kinds) {
      Tokens tokens = draw_tokens(most, *width, random);
      multiply_exactly(q, operands, bias, options_.threads, tokens);
      for (const std::uint64_t m : options_.tokens) products(*probe, q, tokens, m, kind, result);
    }
    return result;
  }

 private:
  void products(LinearProbe& probe, const QuantizedLinear& q, const Tokens& tokens, std::uint64_t m,
                const char* kind, DeviceLinearCheck& result) const {
    const LinearProbe::Product got = probe.multiply(std::span(tokens.x).first(m * q.cols), m);
    result.wrong_token_values += differing(got.x8, std::span(tokens.x8).first(m * q.cols));
    if (got.scale.size() != m || got.y.size() != m * q.rows || got.y2.size() != got.y.size())
      throw Error(ErrorKind::internal, "a device gave back outputs of another size");
    for (std::uint64_t i = 0; i < m; ++i) {
      // By bits: what is there may be NaN.
      if (std::bit_cast<std::uint32_t>(got.scale[i]) != std::bit_cast<std::uint32_t>(tokens.scale[i]))
        ++result.wrong_token_values;
    }
    for (std::size_t i = 0; i < got.y.size(); ++i) {
      if (!std::isfinite(libquant::decode_bf16(got.y[i]))) ++result.unwritten_outputs;
      if (got.y[i] != got.y2[i]) ++result.outputs_that_vary;
    }
    const double limit = options_.tolerance * (got.y.size() < 1024 ? 1.5 : 1.0);
    result.products.push_back({m, kind, got.kernel, relative_error(got.y, tokens), limit});
  }

  const DeviceCheckOptions& options_;
  DeviceProbe& device_;
};

}  // namespace

std::uint64_t DeviceLinearCheck::wrong_operands() const {
  std::uint64_t sum = 0;
  for (const Operands& o : operands) sum += o.wrong;
  return sum;
}

const DeviceLinearCheck::Product& DeviceLinearCheck::worst_product() const {
  if (products.empty()) throw Error(ErrorKind::internal, "no product was checked");
  // NaN is worst of all.
  const auto rank = [](const Product& p) {
    return std::isnan(p.relative_error) ? HUGE_VAL : p.relative_error / p.limit;
  };
  return *std::max_element(products.begin(), products.end(),
                           [&](const Product& a, const Product& b) { return rank(a) < rank(b); });
}

std::vector<std::string> DeviceLinearCheck::failures() const {
  std::vector<std::string> out;
  const auto count = [&](std::uint64_t n, const char* what) {
    if (n != 0) out.push_back(std::to_string(n) + " " + what);
  };
  count(wrong_tile_bytes, "prepacked bytes differ");
  count(wrong_unpacked_bytes, "unpacked bytes differ");
  for (const Operands& o : operands) {
    if (o.wrong == 0) continue;
    std::array<char, 64> first{};
    std::snprintf(first.data(), first.size(), " (first at [%llu, %llu]: expected 0x%02x, found 0x%02x)",
                  static_cast<unsigned long long>(o.row), static_cast<unsigned long long>(o.col), o.expected,
                  o.found);
    out.push_back(std::to_string(o.wrong) + " operands of " + o.kernel + " differ" + first.data());
  }
  count(wrong_token_values, "quantised activations differ");
  count(unwritten_outputs, "outputs are not finite");
  count(outputs_that_vary, "outputs vary between runs");
  const auto wrong = std::count_if(products.begin(), products.end(),
                                   [](const Product& p) { return !(p.relative_error <= p.limit); });
  count(static_cast<std::uint64_t>(wrong), "products out of tolerance");
  return out;
}

std::vector<DeviceLinearCheck> check_device_linears(const WeightSource& packed, DeviceProbe& device,
                                                    const DeviceCheckOptions& options, Progress& progress) {
  if (options.tokens.empty() || *std::min_element(options.tokens.begin(), options.tokens.end()) == 0)
    throw Error(ErrorKind::usage, "products are checked with one token or more");
  const formats::ModelConfig& config = packed.config();
  const formats::QuantizationConfig& quantization = *packed.quantization();
  if (options.statistics != nullptr && options.statistics->layers.size() != config.layers) {
    throw Error(ErrorKind::input, "statistics do not cover the model's layers")
        .path(packed.reader().folder() + "/calibration.h5")
        .expected(std::to_string(config.layers))
        .found(std::to_string(options.statistics->layers.size()));
  }
  Checker checker(options, device);
  std::vector<DeviceLinearCheck> checks;
  progress.begin("device", config.layers);
  for (std::uint64_t layer = 0; layer < config.layers; ++layer) {
    const LayerWeights rest = packed.load_unquantized(layer, options.threads);
    const auto names = formats::linear_names(layer);
    for (std::size_t i = 0; i < kLinears; ++i) {
      check_interrupt();
      if (!rest.linear[i].weight.empty()) continue;  // one that the folder leaves unquantised
      const QuantizedLinear q = packed.quantized(layer, i);
      std::vector<std::uint8_t> tiles;
      if (quantization.layout == formats::WeightLayout::sm90) {
        const auto bytes = packed.reader().tensor(names[i] + ".weight_tiles").data;
        tiles.resize(bytes.size());
        std::memcpy(tiles.data(), bytes.data(), bytes.size());
      } else {
        tiles = libquant::pack_sm90(q);
      }
      const formats::SiteStatistics* site =
          options.statistics == nullptr ? nullptr : &options.statistics->layers[layer].site(input_site(i));
      checks.push_back(checker.check(names[i], q, rest.linear[i].bias, tiles, site,
                                     options.seed * 1'000'003 + layer * kLinears + i));
    }
    progress.advance(layer + 1);
  }
  progress.end();
  return checks;
}

}  // namespace fireq::calib
