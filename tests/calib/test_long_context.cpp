// Contexts over many blocks of keys: the same bits for any number of threads, and attention against a plain
// sum in double.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "calib/attention.hpp"
#include "calib/evaluate.hpp"
#include "tests/calib/support.hpp"

namespace fireq::calib {
namespace {

TEST(LongContext, ThreadsDoNotChangeABit) {
  const auto model = open_weights(std::string(FIREQ_TEST_DATA) + "/models/stories260K");
  test::Random random(31);
  std::vector<std::int32_t> ids(2100);  // past the model's context, no multiple of anything
  for (auto& id : ids) id = static_cast<std::int32_t>(random.below(model->config().vocab));
  for (const Precision precision : {Precision{}, Precision{true, true, true, true, true}}) {
    const std::vector<float> one = window_logits(*model, ids, precision, 1);
    for (const int threads : {2, 3, 7}) {
      EXPECT_TRUE(test::same_bits(one, window_logits(*model, ids, precision, threads))) << threads;
    }
    Progress silent;
    double nll = 0;
    for (const int threads : {1, 2, 3, 7}) {
      EvaluationOptions options;
      options.precision = precision;
      options.threads = threads;
      const double got = evaluate(*model, {ids, 3, 700}, options, silent).nll_per_token;
      if (threads == 1) nll = got;
      EXPECT_EQ(nll, got) << threads;
    }
  }
}

TEST(LongContext, AttentionOver8192KeysIsThePlainSum) {
  constexpr std::uint64_t kKeys = 8192;
  constexpr std::uint64_t kDim = 8;
  test::Random random(32);
  const auto keys = random.normals(kKeys * kDim);
  const auto values = random.normals(kKeys * kDim);
  KvCache cache(1, 1, kDim, kKeys);
  for (std::uint64_t i = 0; i < kKeys; ++i) {
    cache.put(0, 0, i, std::span(keys).subspan(i * kDim, kDim), 1.0F,
              std::span(values).subspan(i * kDim, kDim), 1.0F);
  }
  for (const std::uint64_t window : {std::uint64_t{0}, std::uint64_t{1000}}) {
    for (const double gain : {0.0, 1.0, 30.0}) {  // flat, mixed, one key takes all
      const auto queries = random.normals(QueryRows::kMost * kDim, gain);
      QueryRows rows;
      rows.count = QueryRows::kMost;
      rows.q = queries.data();
      rows.stride = kDim;
      for (std::size_t i = 0; i < rows.count; ++i) {
        rows.scale[i] = 0.35F;
        rows.position[i] = kKeys - QueryRows::kMost + i;
      }
      AttentionArea area;
      std::vector<float> out(rows.count * kDim, std::numeric_limits<float>::quiet_NaN());
      attend(cache, 0, 0, rows, {.window = window}, area, out.data(), kDim);

      std::vector<double> expected(out.size());
      for (std::size_t r = 0; r < rows.count; ++r) {
        const std::uint64_t last = rows.position[r];
        const std::uint64_t first = window == 0 || last + 1 < window ? 0 : last + 1 - window;
        std::vector<double> score;
        double top = -1e300;
        for (std::uint64_t j = first; j <= last; ++j) {
          double s = 0;
          for (std::uint64_t c = 0; c < kDim; ++c) {
            s += static_cast<double>(queries[r * kDim + c]) * static_cast<double>(keys[j * kDim + c]);
          }
          score.push_back(s * static_cast<double>(rows.scale[r]));
          top = std::max(top, score.back());
        }
        double total = 0;
        for (std::uint64_t j = first; j <= last; ++j) {
          const double p = std::exp(score[j - first] - top);
          total += p;
          for (std::uint64_t c = 0; c < kDim; ++c) {
            expected[r * kDim + c] += p * static_cast<double>(values[j * kDim + c]);
          }
        }
        for (std::uint64_t c = 0; c < kDim; ++c) expected[r * kDim + c] /= total;
      }
      EXPECT_LT(test::largest_difference(expected, out), 3e-5) << "window " << window << " gain " << gain;
    }
  }
}

}  // namespace
}  // namespace fireq::calib
