// Every GEMM kernel against the definition: operands bit by bit, products in double, outputs poisoned with
// NaN and guarded. Suites named Small* are what the sanitizers run.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <map>

#include "common/error.hpp"
#include "kernels/activations.hpp"
#include "kernels/gemm.hpp"
#include "libquant/packing.hpp"
#include "tests/kernels/device_layer.hpp"

namespace fireq::kernels::testing {
namespace {

constexpr std::uint16_t kPoison = 0x7fc1;

class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (device_count() == 0) GTEST_SKIP() << "no CUDA device";
    device = current_device();
    workspace_memory =
        DeviceBuffer<std::uint8_t>(gemm_workspace_bytes(device) + cublas_scratch_bytes(1024, 15000));
    workspace = {workspace_memory.get(), workspace_memory.size()};
    init_workspace(workspace, nullptr);
  }
  // Kernels leave the shared part of the workspace as it was made.
  void expect_clean_workspace() const {
    std::vector<std::uint8_t> bytes(gemm_workspace_bytes(device));
    cuda_ok(cudaMemcpy(bytes.data(), workspace.data, bytes.size(), cudaMemcpyDeviceToHost), "workspace");
    EXPECT_TRUE(std::all_of(bytes.begin(), bytes.end(), [](std::uint8_t b) { return b == 0xff; }))
        << "a partial sum was left behind";
  }

  DeviceInfo device;
  DeviceBuffer<std::uint8_t> workspace_memory;
  Workspace workspace;
};

// Frobenius error relative to the definition, and every element within rounding of bf16 and of FP8
// accumulation.
double compare(const std::vector<std::uint16_t>& y, std::uint64_t pitch, const Product& expected,
               std::uint64_t tokens, std::uint64_t rows, const std::vector<double>& addend) {
  double error = 0, norm = 0, worst = 0;
  for (std::uint64_t m = 0; m < tokens; ++m) {
    for (std::uint64_t n = 0; n < rows; ++n) {
      const double want = expected.y[m * rows + n] + (addend.empty() ? 0.0 : addend[m * rows + n]);
      const double got = from_bf16(y[m * pitch + n]);
      const double d = got - want;
      if (std::isnan(got)) {
        ADD_FAILURE() << "output " << m << ", " << n << " was not written or is NaN";
        return 1;
      }
      error += d * d;
      norm += want * want;
      worst = std::max(worst,
                       std::fabs(d) / (std::fabs(want) / 200 + 0.015 * expected.noise[m * rows + n] + 1e-6));
    }
    for (std::uint64_t n = rows; n < pitch; ++n) {
      if (y[m * pitch + n] != kPoison) {
        ADD_FAILURE() << "wrote behind the row of token " << m << " at " << n;
        return 1;
      }
    }
  }
  EXPECT_LT(worst, 1.0) << "an element is off by more than rounding";
  return std::sqrt(error / norm);
}

struct Case {
  std::uint64_t m, n, k;
};

class GemmTest : public GpuTest {
 protected:
  // Runs a configuration twice and compares it with the definition; the two runs must agree bit by bit.
  void check(const Layer& l, const DeviceLayer& d, const Tokens& t, const Product& expected,
             const GemmConfig& config, bool with_epilogue, double limit) {
    const WeightRef& w = config.route == Route::portable && t.tokens % 2 == 1 ? d.row : d.sm90;
    SCOPED_TRACE(to_string(config) + ", M " + std::to_string(t.tokens) + ", N " + std::to_string(l.rows) +
                 ", K " + std::to_string(l.cols) + (with_epilogue ? ", bias and residual" : ""));
    const std::uint64_t pitch = l.rows % 2 == 0 ? (l.rows + 15) / 8 * 8 : l.rows + 3;
    DeviceBuffer<std::uint8_t> x8(t.x8);
    DeviceBuffer<float> scale(t.scale);
    TokensRef x = t.ref();
    x.x8 = x8.get();
    x.scale = scale.get();
    Epilogue epilogue;
    std::vector<std::uint16_t> start(t.tokens * pitch, kPoison);
    std::vector<double> addend;
    DeviceBuffer<std::uint16_t> y(start.size());
    if (with_epilogue) {
      std::mt19937 rng(7);
      std::normal_distribution<float> normal;
      addend.resize(t.tokens * l.rows);
      for (std::uint64_t m = 0; m < t.tokens; ++m)
        for (std::uint64_t n = 0; n < l.rows; ++n) {
          start[m * pitch + n] = to_bf16(30 * normal(rng));
          addend[m * l.rows + n] = static_cast<double>(l.bias[n]) + from_bf16(start[m * pitch + n]);
        }
      epilogue.bias = d.bias.get();
      epilogue.residual = y.get();  // in place
      epilogue.residual_pitch = pitch;
    }
    GemmOptions options;
    options.workspace = workspace;
    options.config = config;
    std::vector<std::uint16_t> first;
    for (int round = 0; round < 2; ++round) {
      y.upload(start);
      gemm_w4a8(x, w, {y.get(), pitch}, epilogue, options);
      cuda_ok(cudaDeviceSynchronize(), "gemm");
      const std::vector<std::uint16_t> out = y.download();
      if (round == 0) {
        first = out;
        const double error = compare(out, pitch, expected, t.tokens, l.rows, addend);
        EXPECT_LT(error, limit);
        worst_error[to_string(config.route)] = std::max(worst_error[to_string(config.route)], error);
      } else {
        EXPECT_EQ(out, first) << "two runs differ";
      }
    }
    expect_clean_workspace();
  }

  void check_all(const Case& c, const std::array<float, 8>& levels, Spread spread, bool per_tensor,
                 double limit) {
    std::mt19937 rng(20261128);
    const Layer l = make_layer(rng, c.n, c.k, levels, spread, per_tensor);
    const DeviceLayer d(l);
    const Tokens t = make_tokens(rng, c.m, c.k);
    const Product expected = definition_product(t, l, definition_operands(l));
    // With few outputs the roundings to bf16, up to 2^-8 each, do not average out.
    if (c.m * c.n < 1024) limit = std::max(limit, 3.9e-3);
    for (const GemmConfig& config : gemm_configs(device, WeightLayout::sm90, c.m)) {
      const bool plain_only = config.route == Route::cublas;
      if (plain_only && (c.n % 8 != 0 || c.k % 16 != 0 || per_tensor)) continue;
      check(l, d, t, expected, config, false, limit);
      if (!plain_only) check(l, d, t, expected, config, true, limit);
    }
  }

  std::map<std::string, double> worst_error;
  void TearDown() override {
    for (const auto& [route, error] : worst_error)
      std::printf("  %-9s worst relative error %.2e\n", route.c_str(), error);
  }
};

// What racecheck has the time for.
TEST_F(GemmTest, SmallestOfEveryKernel) {
  for (const Case& c : {Case{3, 130, 300}, {60, 200, 900}, {70, 130, 520}})
    check_all(c, kInt4, Spread::usual, false, 2.6e-3);
}

TEST_F(GemmTest, SmallTails) {
  for (const Case& c : {Case{1, 128, 128}, {3, 130, 129}, {7, 1, 300}, {8, 257, 500}})
    check_all(c, kInt4, Spread::usual, false, 2.6e-3);
}

TEST_F(GemmTest, SmallSplit) {
  for (const Case& c : {Case{9, 384, 1280}, {16, 200, 1408}, {33, 300, 900}, {64, 128, 2304}})
    check_all(c, kNormalLike, Spread::usual, true, 2.6e-3);
}

// Rows of the output that end inside a tile, at and beside multiples of 16 bytes, and more tokens than a
// tile.
TEST_F(GemmTest, SmallPrefillTails) {
  for (const Case& c : {Case{70, 130, 129}, {129, 264, 260}, {300, 142, 640}, {257, 77, 384}})
    check_all(c, kInt4, Spread::usual, false, 2.6e-3);
}

TEST_F(GemmTest, TokenCountsAroundTheTiles) {
  for (const std::uint64_t m :
       {1U, 7U, 8U, 9U, 15U, 16U, 17U, 31U, 32U, 33U, 63U, 64U, 65U, 127U, 128U, 129U, 255U, 257U, 333U})
    check_all({m, 520, 640}, m % 2 == 0 ? kInt4 : kNormalLike, Spread::usual, m % 3 == 0, 2.6e-3);
}

TEST_F(GemmTest, AnyLevelsAndScales) {
  check_all({5, 300, 700}, kWide, Spread::all_scales, false, 2.6e-3);
  check_all({130, 300, 700}, kWide, Spread::all_scales, true, 2.6e-3);
}

TEST_F(GemmTest, WholeAndSplitBlocks) {
  // More row blocks than multiprocessors: a shared remainder and whole blocks.
  for (const std::uint64_t m : {2U, 30U, 64U})
    check_all({m, 128ULL * device.multiprocessors + 128 * 37 + 5, 512}, kInt4, Spread::usual, false, 2.6e-3);
  check_all({300, 128ULL * device.multiprocessors + 128 * 37 + 5, 768}, kInt4, Spread::usual, false, 2.6e-3);
}

TEST_F(GemmTest, LongKStaysAccurate) {
  for (const std::uint64_t k : {4096U, 14336U})
    for (const std::uint64_t m : {1U, 16U, 60U, 200U})
      check_all({m, 256, k}, kInt4, Spread::usual, false, 2.2e-3);
}

TEST_F(GemmTest, SmallOperandsAreTheDefinitionsBitForBit) {
  std::mt19937 rng(20261128);
  for (const auto& levels : {kInt4, kNormalLike, kWide}) {
    for (const auto& [n, k] : {std::pair{1U, 1U}, {129U, 300U}, {256U, 128U}, {200U, 1408U}}) {
      const Layer l = make_layer(rng, n, k, levels, Spread::all_scales);
      const DeviceLayer d(l);
      const std::vector<std::uint8_t> expected = definition_operands(l);
      DeviceBuffer<std::uint8_t> out(expected.size());
      for (const WeightRef& w : {d.row, d.sm90}) {
        for (const std::uint64_t m : {1U, 9U, 17U, 33U, 65U}) {
          for (const GemmConfig& config : gemm_configs(device, w.layout, m)) {
            if (config.route == Route::cublas) continue;
            SCOPED_TRACE(to_string(config) + " " + std::to_string(n) + " x " + std::to_string(k));
            out.fill(0x7f);
            dump_operands(w, config, out.get(), workspace, nullptr);
            EXPECT_TRUE(out.download() == expected);
          }
        }
        out.fill(0x7f);
        dequantize_to_fp8(w, out.get(), nullptr);
        EXPECT_TRUE(out.download() == expected) << "dequantised";
      }
    }
  }
}

TEST_F(GemmTest, SmallPrepackIsTheCpusAndComesBack) {
  std::mt19937 rng(20261128);
  for (const std::uint64_t n : {1U, 8U, 127U, 128U, 129U, 288U}) {
    for (const std::uint64_t k : {1U, 8U, 127U, 128U, 129U, 288U}) {
      const Layer l = make_layer(rng, n, k, kInt4, Spread::all_scales);
      const DeviceLayer d(l);
      libquant::QuantizedLinear q;
      q.rows = n;
      q.cols = k;
      q.codes = l.codes;
      q.group_scales = l.group_scales;
      q.row_scales = l.row_scales;
      EXPECT_EQ(d.tiles.download(), libquant::pack_sm90(q)) << n << " x " << k;
      DeviceBuffer<std::uint8_t> codes(l.codes.size()), scales(l.group_scales.size());
      codes.fill(0xee);
      scales.fill(0xee);
      unpack_sm90(d.sm90, codes.get(), scales.get(), nullptr);
      EXPECT_EQ(codes.download(), l.codes);
      EXPECT_EQ(scales.download(), l.group_scales);
    }
  }
}

// A chain of programmatic launches, each reading what the one before wrote, equals the same launches one by
// one.
TEST_F(GemmTest, ChainedLaunchesWaitForEachOther) {
  if (device.compute_capability != 90) GTEST_SKIP() << "no sm_90a kernels here";
  std::mt19937 rng(20261128);
  const std::uint64_t width = 1024;
  const Layer l = make_layer(rng, width, width, kNormalLike, Spread::usual);
  const DeviceLayer d(l);
  for (const std::uint64_t m : {3U, 16U, 40U, 150U}) {
    std::vector<std::uint16_t> x(m * width);
    std::normal_distribution<float> normal;
    for (auto& v : x) v = to_bf16(normal(rng));
    std::vector<std::uint16_t> results[2];
    for (const bool programmatic : {false, true}) {
      DeviceBuffer<std::uint16_t> h(x);
      DeviceBuffer<std::uint8_t> x8(m * width);
      DeviceBuffer<float> scale(m);
      x8.fill(0);
      GemmOptions options;
      options.workspace = workspace;
      options.programmatic = programmatic;
      for (int layer = 0; layer < 40; ++layer) {
        quantize_activations({h.get(), width}, m, width, {x8.get(), width, scale.get()},
                             {nullptr, programmatic});
        gemm_w4a8({x8.get(), scale.get(), m, width}, d.sm90, {h.get(), width}, {}, options);
      }
      cuda_ok(cudaDeviceSynchronize(), "chain");
      results[programmatic ? 1 : 0] = h.download();
    }
    EXPECT_EQ(results[0], results[1]) << "M " << m;
    expect_clean_workspace();
  }
}

// Large layers many times over: a race shows as a run that differs. Every configuration, launches one by one
// and chained.
TEST_F(GemmTest, RepeatedRunsAgree) {
  if (device.compute_capability != 90) GTEST_SKIP() << "no sm_90a kernels here";
  std::mt19937 rng(std::random_device{}());
  const std::uint64_t n = 4096, k = 14336;
  WeightRef w;
  w.rows = n;
  w.cols = k;
  w.layout = WeightLayout::sm90;
  w.levels = kNormalLike;
  std::vector<std::uint8_t> bytes(w.tile_bytes());
  for (std::size_t i = 0; i < bytes.size(); ++i)
    bytes[i] = static_cast<std::uint8_t>(i % 4160 < 4096 ? rng() : 0x38 + rng() % 24);
  DeviceBuffer<std::uint8_t> tiles(bytes);
  DeviceBuffer<float> row_scales(std::vector<float>(n, 1e-3F));
  w.tiles = tiles.get();
  w.row_scales = row_scales.get();
  for (const std::uint64_t m : {8U, 16U, 32U, 64U, 100U}) {
    const Tokens t = make_tokens(rng, m, k);
    DeviceBuffer<std::uint8_t> x8(t.x8);
    DeviceBuffer<float> scale(t.scale);
    TokensRef x = t.ref();
    x.x8 = x8.get();
    x.scale = scale.get();
    for (const GemmConfig& config : gemm_configs(device, WeightLayout::sm90, m)) {
      if (config.route == Route::portable || config.route == Route::cublas) continue;
      GemmOptions options;
      options.workspace = workspace;
      options.config = config;
      std::vector<std::uint16_t> first;
      int different = 0;
      for (int round = 0; round < 25; ++round) {
        constexpr std::uint64_t kRuns = 6;
        DeviceBuffer<std::uint16_t> y(kRuns * m * n);
        y.fill(0xff);
        options.programmatic = round % 2 == 1;
        for (std::uint64_t run = 0; run < kRuns; ++run)
          gemm_w4a8(x, w, {y.get() + run * m * n, n}, {}, options);
        cuda_ok(cudaDeviceSynchronize(), "repeated runs");
        const std::vector<std::uint16_t> all = y.download();
        if (first.empty()) first.assign(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(m * n));
        for (std::uint64_t run = 0; run < kRuns; ++run) {
          if (std::equal(first.begin(), first.end(), all.begin() + static_cast<std::ptrdiff_t>(run * m * n)))
            continue;
          std::uint64_t wrong = 0, low = n, high = 0, early = m, late = 0;
          for (std::uint64_t i = 0; i < m * n; ++i) {
            if (all[run * m * n + i] == first[i]) continue;
            ++wrong;
            low = std::min(low, i % n);
            high = std::max(high, i % n);
            early = std::min(early, i / n);
            late = std::max(late, i / n);
          }
          if (++different <= 3)
            ADD_FAILURE() << to_string(config) << ", M " << m << ", round " << round << ", run " << run
                          << ": " << wrong << " outputs differ, rows " << low << " to " << high << ", tokens "
                          << early << " to " << late;
        }
      }
      EXPECT_EQ(different, 0) << to_string(config) << ", M " << m;
      expect_clean_workspace();
    }
  }
}

TEST_F(GemmTest, RefusesBrokenOperands) {
  std::mt19937 rng(20261128);
  const Layer l = make_layer(rng, 128, 256, kInt4, Spread::usual);
  const DeviceLayer d(l);
  DeviceBuffer<std::uint8_t> x8(512 * 256);
  DeviceBuffer<float> scale(512);
  DeviceBuffer<std::uint16_t> y(512 * 128);
  const TokensRef x{x8.get(), scale.get(), 4, 256};
  const OutputRef out{y.get(), 128};
  GemmOptions options;
  options.workspace = workspace;
  TokensRef bad = x;
  bad.tokens = 0;
  EXPECT_THROW(gemm_w4a8(bad, d.sm90, out, {}, options), Error);
  bad = x;
  bad.pitch = 255;
  EXPECT_THROW(gemm_w4a8(bad, d.sm90, out, {}, options), Error);
  bad = x;
  bad.x8 = x8.get() + 1;
  EXPECT_THROW(gemm_w4a8(bad, d.sm90, out, {}, options), Error);
  EXPECT_THROW(gemm_w4a8(x, d.sm90, {y.get(), 127}, {}, options), Error);
  WeightRef w = d.sm90;
  w.levels[7] = 500;
  EXPECT_THROW(gemm_w4a8(x, w, out, {}, options), Error);
  if (device.compute_capability == 90) {
    GemmOptions small = options;
    small.workspace.bytes = 256;
    EXPECT_THROW(gemm_w4a8(x, d.sm90, out, {}, small), Error);
    GemmOptions wrong = options;
    wrong.config = GemmConfig{Route::decode, 8, 1};
    bad = x;
    bad.tokens = 9;
    EXPECT_THROW(gemm_w4a8(bad, d.sm90, out, {}, wrong), Error);
    wrong.config = GemmConfig{Route::decode, 24, 1};
    EXPECT_THROW(gemm_w4a8(x, d.sm90, out, {}, wrong), Error);
    EXPECT_THROW(gemm_w4a8(x, d.row, out, {}, wrong), Error);
  }
}

}  // namespace
}  // namespace fireq::kernels::testing
