// The checks of `validate --device`: a right device passes, and each fault is seen where it is.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "calib/device_check.hpp"
#include "calib/quantize_job.hpp"
#include "common/error.hpp"
#include "libquant/number_formats.hpp"
#include "tests/calib/random_model.hpp"
#include "tests/calib/support.hpp"
#include "tests/calib/twin_device.hpp"

namespace fireq::calib {
namespace {

using test::TempFolder;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing_support::RandomModel;

const RandomModel kShape{.hidden = 136,
                         .ffn = 150,
                         .layers = 1,
                         .heads = 3,
                         .kv_heads = 1,
                         .head_dim = 32,
                         .attention_bias = true,
                         .seed = 41};

class DeviceCheck : public testing::Test {
 protected:
  DeviceCheck() { write_random_model(folder_.path() / "model", kShape); }

  std::unique_ptr<WeightSource> quantise(const std::string& preset, formats::WeightLayout layout) {
    QuantizeOptions options;
    options.out = folder_ / (preset + std::to_string(static_cast<int>(layout)));
    options.recipe = preset_recipe(preset);
    if (options.recipe.needs_statistics()) {
      test::Random random(5);
      Windows windows{{}, 4, 40};
      for (int i = 0; i < 160; ++i)
        windows.ids.push_back(static_cast<std::int32_t>(random.below(kShape.vocab)));
      options.calibration = windows;
    }
    options.layout = layout;
    options.tool_version = "test";
    Progress silent;
    quantize_model(*open_weights(folder_ / "model"), options, formats::real_file_system(), silent);
    return open_weights(options.out);
  }

  static std::vector<DeviceLinearCheck> check(const WeightSource& model, test::TwinProbe& probe,
                                              DeviceCheckOptions options = {}) {
    options.threads = 2;
    Progress silent;
    return check_device_linears(model, probe, options, silent);
  }

  TempFolder folder_;
};

TEST_F(DeviceCheck, ARightDevicePasses) {
  for (const auto& [preset, layout] :
       {std::pair{"rtn", formats::WeightLayout::row}, std::pair{"rtn", formats::WeightLayout::sm90},
        std::pair{"paper", formats::WeightLayout::row}, std::pair{"fast", formats::WeightLayout::sm90}}) {
    SCOPED_TRACE(preset);
    const auto model = quantise(preset, layout);
    test::TwinProbe probe;
    const auto checks = check(*model, probe);
    ASSERT_EQ(checks.size(), 7 * kShape.layers);
    for (const DeviceLinearCheck& c : checks) {
      EXPECT_THAT(c.failures(), IsEmpty()) << c.name;
      ASSERT_EQ(c.operands.size(), 2U);
      EXPECT_EQ(c.operands[1].kernel, "twin again");
      ASSERT_EQ(c.products.size(), 8U);  // two kinds of activations, four numbers of tokens
      for (const auto& p : c.products) {
        // bf16 rounding of the outputs and nothing less.
        EXPECT_GT(p.relative_error, 2e-4) << c.name << " " << p.tokens;
        EXPECT_LT(p.relative_error, 3.9e-3);
      }
    }
    EXPECT_EQ(checks[6].name, "model.layers.0.mlp.down_proj");
    EXPECT_EQ(checks[6].rows, kShape.hidden);
    EXPECT_EQ(checks[6].cols, kShape.ffn);
    EXPECT_EQ(probe.multiplied.size(), 8 * checks.size());
  }
}

TEST_F(DeviceCheck, EachFaultIsSeenWhereItIs) {
  const auto model = quantise("rtn", formats::WeightLayout::row);
  const auto expect_one = [&](test::TwinFaults faults, const char* what, std::uint64_t count) {
    SCOPED_TRACE(what);
    test::TwinProbe probe(std::move(faults));
    for (const DeviceLinearCheck& c : check(*model, probe)) {
      const auto failures = c.failures();
      EXPECT_THAT(failures, ElementsAre(HasSubstr(what)));
      if (failures.empty()) continue;
      EXPECT_EQ(failures[0].rfind(std::to_string(count) + " ", 0), 0U) << failures[0];
    }
  };
  expect_one({.tiles = [](auto& t) { t[t.size() / 2] ^= 1U; }}, "prepacked bytes", 1);
  expect_one({.tiles = [](auto& t) { t.pop_back(); }}, "prepacked bytes", 1);
  expect_one({.unpacked = [](auto& r) { r.codes.back() ^= 0x80U; }}, "unpacked bytes", 1);
  expect_one({.unpacked = [](auto& r) { r.group_scales[0] += 1; }}, "unpacked bytes", 1);
  expect_one({.operands = [](auto& o) { o[3] ^= 0x80U; }}, "operands of twin again differ (first at [0, 3]",
             1);
  expect_one({.operands = [](auto& o) { o[o.size() - 1] = o[o.size() - 129] = 0xff; }}, "found 0xff", 2);
  // Products run eight times a linear.
  expect_one({.product = [](auto& p) { p.x8[0] ^= 1U; }}, "quantised activations", 8);
  expect_one({.product = [](auto& p) { p.scale[0] = std::nextafter(p.scale[0], 9.0F); }},
             "quantised activations", 8);
  expect_one({.product = [](auto& p) { p.y2[0] ^= 1U; }}, "outputs vary", 8);
  expect_one({.product =
                  [](auto& p) {  // two percent too large
                    for (auto& v : p.y) v = libquant::encode_bf16(1.02F * libquant::decode_bf16(v));
                    p.y2 = p.y;
                  }},
             "products", 8);
  // One token's row of zeros among 333.
  expect_one({.product =
                  [](auto& p) {
                    if (p.scale.size() != 333) return;
                    const std::size_t n = p.y.size() / 333;
                    std::fill_n(p.y.begin() + 100 * static_cast<std::ptrdiff_t>(n), n, std::uint16_t{0});
                    p.y2 = p.y;
                  }},
             "products", 2);
}

TEST_F(DeviceCheck, AnOutputThatWasNotWrittenIsSeen) {
  const auto model = quantise("rtn", formats::WeightLayout::row);
  test::TwinFaults faults;
  faults.product = [](auto& p) {
    p.y.back() = 0xffff;
    p.y2 = p.y;
  };
  test::TwinProbe probe(std::move(faults));
  for (const DeviceLinearCheck& c : check(*model, probe)) {
    EXPECT_EQ(c.unwritten_outputs, 8U);
    EXPECT_TRUE(std::isnan(c.worst_product().relative_error));
    EXPECT_THAT(c.failures(), ElementsAre(HasSubstr("not finite"), HasSubstr("products out of tolerance")));
  }
}

// The folder's own tiles count in layout sm90, not what this program would make of the rows.
TEST_F(DeviceCheck, TilesOfTheFolderAreWhatIsCompared) {
  const auto model = quantise("rtn", formats::WeightLayout::sm90);
  test::TwinProbe probe({.tiles = [](auto& t) { t[0] ^= 0x10U; }});
  for (const DeviceLinearCheck& c : check(*model, probe)) EXPECT_EQ(c.wrong_tile_bytes, 1U);
}

TEST_F(DeviceCheck, CalibrationWidthsShapeTheActivations) {
  const auto model = quantise("rtn", formats::WeightLayout::row);
  // Statistics with a single live channel: tokens of one value, so each output is one product.
  formats::CalibrationStatistics statistics;
  statistics.layers.resize(kShape.layers);
  const auto fill = [](formats::SiteStatistics& s, std::uint64_t channels) {
    s.sumsq.assign(channels, 0);
    s.sumsq[3] = 100;
    s.count = 4;  // root mean square 5
  };
  for (auto& layer : statistics.layers) {
    fill(layer.site(formats::Site::attn_in), kShape.hidden);
    fill(layer.site(formats::Site::o_in), kShape.heads * kShape.head_dim);
    fill(layer.site(formats::Site::mlp_in), kShape.hidden);
    fill(layer.site(formats::Site::down_in), kShape.ffn);
  }
  DeviceCheckOptions options;
  options.statistics = &statistics;
  std::uint64_t one_value = 0, all_values = 0;
  test::TwinProbe probe({.product = [&](auto& p) {
    std::size_t live = 0;
    const std::size_t cols = p.x8.size() / p.scale.size();
    for (std::size_t k = 0; k < cols; ++k) live += (p.x8[k] & 0x7fU) != 0 ? 1U : 0U;
    (live == 1 ? one_value : all_values) += 1;
  }});
  for (const DeviceLinearCheck& c : check(*model, probe, options)) EXPECT_THAT(c.failures(), IsEmpty());
  EXPECT_EQ(one_value, all_values);
  EXPECT_GT(one_value, 0U);

  statistics.layers.pop_back();
  EXPECT_THROW(check(*model, probe, options), Error);
  options = {};
  options.tokens = {0};
  EXPECT_THROW(check(*model, probe, options), Error);
}

}  // namespace
}  // namespace fireq::calib
