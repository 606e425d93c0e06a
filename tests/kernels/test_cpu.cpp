// What needs no GPU: the split of work, the choice of configurations, the access to both layouts, the CPU
// twin.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <set>

#include "common/error.hpp"
#include "kernels/cpu_twin.hpp"
#include "kernels/gemm.hpp"
#include "kernels/gemm_config.hpp"
#include "kernels/gpu_session.hpp"
#include "kernels/weight_access.hpp"
#include "libquant/packing.hpp"
#include "tests/kernels/problem.hpp"

namespace fireq::kernels::testing {
namespace {

TEST(SplitPlan, EveryUnitBelongsToOneWorkerAndTheMapsAgree) {
  std::mt19937 rng(std::random_device{}());
  std::uniform_int_distribution<std::uint32_t> blocks(1, 500), units(1, 60), workers(1, 140);
  for (int round = 0; round < 300; ++round) {
    const SplitPlan plan = make_split_plan(blocks(rng), units(rng), workers(rng));
    SCOPED_TRACE(std::to_string(plan.blocks) + " blocks " + std::to_string(plan.units) + " units " +
                 std::to_string(plan.workers) + " workers");
    std::vector<int> seen(plan.blocks * plan.units, 0);
    std::vector<std::vector<std::uint32_t>> sharers(plan.blocks);  // workers, in order
    const std::uint32_t rounds = (plan.blocks - plan.split_blocks) / plan.workers;
    EXPECT_EQ(plan.split_blocks + rounds * plan.workers, plan.blocks);
    EXPECT_LE(plan.split_workers, plan.workers);
    for (std::uint32_t w = 0; w < plan.workers; ++w) {
      const SegmentWalk walk(plan, w);
      Segment s;
      std::uint32_t turn = 0, whole = 0;
      for (; walk.at(turn, s); ++turn) {
        ASSERT_LT(s.begin, s.end);
        ASSERT_LE(s.end, plan.units);
        ASSERT_LT(s.block, plan.blocks);
        for (std::uint32_t u = s.begin; u < s.end; ++u) ++seen[s.block * plan.units + u];
        const bool all = s.begin == 0 && s.end == plan.units;
        if (s.block < plan.split_blocks) {
          EXPECT_EQ(whole, 0U) << "a share after a whole block";
          sharers[s.block].push_back(w);
          // As even as can be: every share within one unit of K / workers.
          const std::uint32_t even = plan.units / plan.workers_of(s.block);
          EXPECT_GE(s.end - s.begin, even);
          EXPECT_LE(s.end - s.begin, even + 1);
        } else {
          EXPECT_TRUE(all);
          ++whole;
        }
      }
      EXPECT_EQ(whole, rounds);
      EXPECT_EQ(turn - whole, w < plan.split_workers ? 1U : 0U);
      const Segment before = s;
      EXPECT_FALSE(walk.at(turn, s));
      EXPECT_TRUE(s.block == before.block && s.begin == before.begin && s.end == before.end);
    }
    EXPECT_THAT(seen, ::testing::Each(1));
    for (std::uint32_t b = 0; b < plan.split_blocks; ++b) {
      ASSERT_EQ(sharers[b].size(), plan.workers_of(b));
      for (std::uint32_t i = 0; i < sharers[b].size(); ++i)
        EXPECT_EQ(sharers[b][i], plan.first_worker(b) + i);
      EXPECT_GE(plan.workers_of(b), std::min(plan.units, plan.workers / plan.split_blocks));
    }
  }
}

// Both warpgroups, whatever part of K a segment is.
TEST(Promotion, NeverAfterMoreThanItsGroups) {
  std::mt19937 rng(std::random_device{}());
  for (const std::uint32_t stages : {4U, 5U, 6U, 8U}) {
    for (std::uint32_t groups = 1; groups < 700; ++groups) {
      const std::uint32_t chunk = prefill_chunk(groups, stages);
      EXPECT_EQ(chunk % stages, 0U);
      EXPECT_LE(chunk, kPromoteGroups);
      const std::uint32_t begin = std::uniform_int_distribution<std::uint32_t>(0, groups - 1)(rng);
      const std::uint32_t end = std::uniform_int_distribution<std::uint32_t>(begin + 1, groups)(rng);
      for (const std::uint32_t earlier : {0U, stages}) {
        std::uint32_t stop = begin;
        for (std::uint32_t next = begin + chunk; stop != end; next += chunk) {
          const std::uint32_t g = stop;
          stop = promotion_after(g, next, end, earlier);
          ASSERT_GT(stop, g) << groups << " groups, " << stages << " stages";
          ASSERT_LE(stop - g, kPromoteGroups);
          ASSERT_LE(stop, end);
        }
      }
    }
  }
}

// What the decode kernel takes for granted: a cluster has one row block, and each of its CTAs a share, which
// is the whole block if and only if it is alone.
TEST(DecodePlan, ClustersShareOneBlock) {
  for (const std::uint32_t row_tile : {128U, 64U}) {
    for (const std::uint32_t tile : {8U, 16U, 32U, 64U}) {
      for (const std::uint32_t cluster : {1U, 2U, 4U}) {
        for (const std::uint64_t cols : {1U, 128U, 256U, 257U, 512U, 1024U, 4096U, 14336U}) {
          for (const std::uint64_t rows : {1U, 64U, 65U, 128U, 300U, 4096U, 28672U}) {
            const GemmConfig config{Route::decode, tile, cluster, 1, cluster > 1 || row_tile == 64, row_tile};
            const SplitPlan plan = decode_plan(rows, cols, config, 132);
            ASSERT_EQ(plan.workers, plan.blocks * plan.shares);
            for (std::uint32_t w = 0; w < plan.workers; ++w) {
              const SegmentWalk walk(plan, w);
              Segment s;
              ASSERT_TRUE(walk.at(0, s));
              ASSERT_EQ(s.block, w / plan.shares);
              ASSERT_EQ(s.begin == 0 && s.end == plan.units, plan.shares == 1);
              ASSERT_FALSE(walk.at(1, s));
            }
          }
        }
      }
    }
  }
}

TEST(GemmConfig, ChoiceIsOneOfTheConfigurations) {
  const DeviceInfo hopper{90, 132, "test", 30, 15};
  const DeviceInfo ampere{80, 108, "test"};
  for (const std::uint64_t m : {1U, 8U, 9U, 16U, 17U, 32U, 33U, 64U, 65U, 128U, 129U, 256U, 257U, 5000U}) {
    for (const auto& device : {hopper, ampere}) {
      for (const WeightLayout layout : {WeightLayout::row, WeightLayout::sm90}) {
        for (const auto& [n, k] :
             {std::pair{4096U, 4096U}, {1000U, 4096U}, {6144U, 4096U}, {4096U, 14336U}}) {
          const GemmChoice choice = choose_gemm(device, layout, m, n, k);
          EXPECT_THAT(gemm_configs(device, layout, m), ::testing::Contains(choice.config))
              << to_string(choice.config);
          EXPECT_FALSE(choice.reason.empty());
          if (device.compute_capability == 80) {
            EXPECT_EQ(choice.config.route, Route::portable);
          }
          if (choice.config.route == Route::decode) {
            EXPECT_GE(choice.config.token_tile * (choice.config.token_tile == 64 ? decode_token_tiles(m) : 1),
                      m);
          }
        }
      }
    }
  }
}

TEST(WeightAccess, BothLayoutsGiveTheSameCodesAndScales) {
  std::mt19937 rng(std::random_device{}());
  for (const auto& [rows, cols] :
       {std::pair{1U, 1U}, {127U, 128U}, {129U, 300U}, {256U, 256U}, {70U, 129U}}) {
    const Layer l = make_layer(rng, rows, cols, kInt4, Spread::all_scales);
    libquant::QuantizedLinear q;
    q.rows = rows;
    q.cols = cols;
    q.codes = l.codes;
    q.group_scales = l.group_scales;
    q.row_scales = l.row_scales;
    const std::vector<std::uint8_t> tiles = libquant::pack_sm90(q);
    WeightRef row = l.ref();
    WeightRef tiled = row;
    tiled.layout = WeightLayout::sm90;
    tiled.tiles = tiles.data();
    ASSERT_EQ(tiles.size(), tiled.tile_bytes());
    for (std::uint64_t n = 0; n < rows; ++n) {
      for (std::uint64_t k = 0; k < l.groups() * 128; k += 4) {
        const std::uint32_t expected =
            l.code(n, k) | l.code(n, k + 1) << 4U | l.code(n, k + 2) << 8U | l.code(n, k + 3) << 12U;
        ASSERT_EQ(load_quad(row, n, k), expected);
        ASSERT_EQ(load_quad(tiled, n, k), expected) << "row " << n << " column " << k;
        ASSERT_EQ(load_scale(tiled, n, k / 128), l.group_scales[n * l.groups() + k / 128]);
      }
    }
  }
}

TEST(WeightAccess, QuadsSurviveTheWord) {
  for (std::uint32_t first = 0; first < 65536; first += 77) {
    const std::uint32_t second = (first * 40503U) & 0xffffU;
    const std::uint32_t word = join_quads(first, second);
    ASSERT_EQ(split_quad(word, 0), first);
    ASSERT_EQ(split_quad(word, 1), second);
  }
}

class CpuTwin : public ::testing::TestWithParam<std::array<float, 8>> {};

TEST_P(CpuTwin, OperandsAndProductAreTheDefinitions) {
  std::mt19937 rng(std::random_device{}());
  for (const auto& [m, n, k] :
       {std::tuple{1U, 1U, 1U}, {3U, 65U, 129U}, {7U, 128U, 384U}, {2U, 33U, 1000U}}) {
    const Layer l = make_layer(rng, n, k, GetParam(), Spread::all_scales, m == 3);
    const Tokens t = make_tokens(rng, m, k);
    const std::vector<std::uint8_t> w8 = definition_operands(l);
    std::vector<std::uint8_t> twin(w8.size(), 0xee);
    cpu::dequantize_to_fp8(l.ref(), twin, 2);
    EXPECT_EQ(twin, w8);
    const Product expected = definition_product(t, l, w8);
    Epilogue epilogue;
    std::vector<double> y(m * n, std::nan(""));
    cpu::gemm_w4a8_reference(t.ref(), l.ref(), epilogue, y, 2);
    std::vector<std::uint16_t> residual(m * n);
    std::normal_distribution<float> normal;
    for (auto& r : residual) r = to_bf16(normal(rng));
    epilogue.bias = l.bias.data();
    epilogue.residual = residual.data();
    epilogue.residual_pitch = n;
    std::vector<std::uint16_t> out(m * (n + 3), 0x7fc1);
    cpu::gemm_w4a8(t.ref(), l.ref(), {out.data(), n + 3}, epilogue, 2);
    for (std::uint64_t i = 0; i < m; ++i) {
      for (std::uint64_t j = 0; j < n; ++j) {
        const double definition = expected.y[i * n + j];
        const double noise = expected.noise[i * n + j];
        EXPECT_NEAR(y[i * n + j], definition, 1e-12 * noise);
        const double full = definition + l.bias[j] + from_bf16(residual[i * n + j]);
        EXPECT_NEAR(from_bf16(out[i * (n + 3) + j]), full, std::fabs(full) / 250 + 1e-4 * noise + 1e-5);
      }
      for (std::uint64_t j = n; j < n + 3; ++j) EXPECT_EQ(out[i * (n + 3) + j], 0x7fc1);
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Levels, CpuTwin, ::testing::Values(kInt4, kNormalLike, kWide));

TEST(CpuTwin, QuantiserRoundsToTheNearestOperand) {
  std::mt19937 rng(std::random_device{}());
  std::normal_distribution<float> normal;
  const std::uint64_t tokens = 3, cols = 200, pitch = 208;
  std::vector<std::uint16_t> x(tokens * cols);
  for (auto& v : x) v = to_bf16(normal(rng));
  for (std::uint64_t k = 0; k < cols; ++k) x[2 * cols + k] = 0;  // a token of zeros
  std::vector<std::uint8_t> x8(tokens * pitch, 0xaa);
  std::vector<float> scale(tokens);
  cpu::quantize_activations({x.data(), cols}, tokens, cols, {x8.data(), pitch, scale.data()});
  EXPECT_EQ(scale[2], 0x1p-20F * (1.0F / 448.0F));
  for (std::uint64_t m = 0; m < tokens; ++m)
    for (std::uint64_t k = 0; k < pitch; ++k) {
      if (k >= cols) {
        EXPECT_EQ(x8[m * pitch + k], 0xaa);
        continue;
      }
      const float quotient = from_bf16(x[m * cols + k]) / scale[m];
      EXPECT_EQ(x8[m * pitch + k], e4m3_nearest(quotient)) << quotient;
    }
}

TEST(NoDevice, LaunchersRefuseImpossibleOperands) {
  if (device_count() > 0) GTEST_SKIP() << "a device is there; the GPU tests cover it";
  EXPECT_THROW(current_device(), Error);
  EXPECT_THROW(gemm_w4a8({}, {}, {}, {}, {}), Error);
  try {
    const GpuSession session;
    ADD_FAILURE() << "a session without a device";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::environment);
    EXPECT_THAT(e.what(), ::testing::HasSubstr("CUDA"));
  }
}

}  // namespace
}  // namespace fireq::kernels::testing
