// A Llama feed-forward block (RMSNorm, gate and up, SiLU * up, down, residual) with FireQ's kernels, with
// cuBLASLt in FP8 (our quantisers around it) and with cuBLASLt in bf16; and the bandwidth of the row kernels.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>

#include "common/error.hpp"
#include "kernels/activations.hpp"
#include "kernels/bench/bench.hpp"
#include "kernels/bench/bf16_rows.hpp"
#include "kernels/bench/support.hpp"
#include "kernels/gemm.hpp"

namespace fireq::kernels::bench {
namespace {

struct Candidate {
  const char* name;
  std::unique_ptr<Chain> chain;
  std::vector<double> samples;
  unsigned clock = 0;
};

class FfnBench {
 public:
  FfnBench(const FfnBenchOptions& args, const Print& print)
      : args_(args), print_(print), device_(current_device()) {
    const std::uint64_t h = args.hidden, f = args.ffn;
    copies_ = std::max<std::size_t>(2, (std::size_t{420} << 20U) / (3 * h * f / 2) + 1);
    up_bytes_ = (2 * f + 127) / 128 * ((h + 127) / 128) * 8320;
    down_bytes_ = (h + 127) / 128 * ((f + 127) / 128) * 8320;
    up_ = DeviceBuffer<std::uint8_t>(copies_ * up_bytes_);
    down_ = DeviceBuffer<std::uint8_t>(copies_ * down_bytes_);
    fill_tiles(up_.get(), up_.size(), 1);
    fill_tiles(down_.get(), down_.size(), 2);
    up8_ = DeviceBuffer<std::uint8_t>(kWideCopies * 2 * f * h);
    down8_ = DeviceBuffer<std::uint8_t>(kWideCopies * f * h);
    fill_fp8_normal(up8_.get(), up8_.size(), 3);
    fill_fp8_normal(down8_.get(), down8_.size(), 4);
    up16_ = DeviceBuffer<std::uint16_t>(kWideCopies * 2 * f * h);
    down16_ = DeviceBuffer<std::uint16_t>(kWideCopies * f * h);
    fill_bf16_normal(up16_.get(), up16_.size(), 5);
    fill_bf16_normal(down16_.get(), down16_.size(), 6);
    row_scales_ = DeviceBuffer<float>(std::vector<float>(2 * f, 1e-3F));
    norm_ = DeviceBuffer<float>(std::vector<float>(h, 1.0F));
    workspace_ = DeviceBuffer<std::uint8_t>(gemm_workspace_bytes(device_));
    init_workspace({workspace_.get(), workspace_.size()}, nullptr);
  }

  void block(std::uint64_t m) {
    const std::uint64_t h = args_.hidden, f = args_.ffn;
    DeviceBuffer<std::uint16_t> x(m * h), y(m * h), gate_up(m * 2 * f), inner16(m * f), normed16(m * h);
    DeviceBuffer<std::uint8_t> x8(m * h), inner8(m * f);
    DeviceBuffer<float> a(m), a2(m);
    fill_bf16_normal(x.get(), x.size(), 7);
    fill_bf16_normal(gate_up.get(), gate_up.size(), 8);
    const double flops = 6.0 * static_cast<double>(m) * static_cast<double>(h) * static_cast<double>(f);
    const int launches = std::clamp(static_cast<int>(1e-3 * 1.4e15 * 2 / flops), 3, 12);

    NormInput norm;
    norm.x = {x.get(), h};
    norm.weight = norm_.get();
    const QuantizedTokens q{x8.get(), h, a.get()}, q2{inner8.get(), f, a2.get()};
    std::vector<Candidate> candidates;
    const auto fireq_block = [&](int, cudaStream_t stream) {
      const std::size_t copy = static_cast<std::size_t>(next_++) % copies_;
      GemmOptions o;
      o.stream = stream;
      o.workspace = {workspace_.get(), workspace_.size()};
      o.programmatic = true;
      WeightRef w;
      w.layout = WeightLayout::sm90;
      w.row_scales = row_scales_.get();
      w.levels = kLevels;
      rmsnorm_quantize(norm, m, h, q, {stream, true});
      w.rows = 2 * f;
      w.cols = h;
      w.tiles = up_.get() + copy * up_bytes_;
      gemm_w4a8({x8.get(), a.get(), m, h}, w, {gate_up.get(), 2 * f}, {}, o);
      silu_mul_quantize({gate_up.get(), 2 * f}, m, f, q2, {stream, true});
      w.rows = h;
      w.cols = f;
      w.tiles = down_.get() + copy * down_bytes_;
      Epilogue residual;
      residual.residual = x.get();
      residual.residual_pitch = h;
      gemm_w4a8({inner8.get(), a2.get(), m, f}, w, {y.get(), h}, residual, o);
    };
    candidates.push_back({"fireq", std::make_unique<Chain>(launches, fireq_block), {}, 0});

    CublasGemm up8(true, m, 2 * f, h), down8(true, m, h, f), up16(false, m, 2 * f, h), down16(false, m, h, f);
    const int best_up8 = up8.fastest(up8_.get(), x8.get(), gate_up.get());
    const int best_down8 = down8.fastest(down8_.get(), inner8.get(), y.get());
    const int best_up16 = up16.fastest(up16_.get(), x.get(), gate_up.get());
    const int best_down16 = down16.fastest(down16_.get(), inner16.get(), y.get());
    candidates.push_back(
        {"cublas fp8",
         std::make_unique<Chain>(
             launches,
             [&](int, cudaStream_t stream) {
               const std::size_t copy = static_cast<std::size_t>(next_++) % kWideCopies;
               rmsnorm_quantize(norm, m, h, q, {stream, true});
               up8.run(best_up8, up8_.get() + copy * 2 * f * h, x8.get(), gate_up.get(), stream);
               silu_mul_quantize({gate_up.get(), 2 * f}, m, f, q2, {stream, false});
               down8.run(best_down8, down8_.get() + copy * f * h, inner8.get(), y.get(), stream, x.get());
             }),
         {},
         0});
    candidates.push_back(
        {"cublas bf16",
         std::make_unique<Chain>(
             launches,
             [&](int, cudaStream_t stream) {
               const std::size_t copy = static_cast<std::size_t>(next_++) % kWideCopies;
               const auto tokens = static_cast<std::uint32_t>(m);
               rmsnorm_bf16(x.get(), norm_.get(), normed16.get(), tokens, static_cast<std::uint32_t>(h),
                            stream);
               up16.run(best_up16, up16_.get() + copy * 2 * f * h, normed16.get(), gate_up.get(), stream);
               silu_mul_bf16(gate_up.get(), inner16.get(), tokens, static_cast<std::uint32_t>(f), stream);
               down16.run(best_down16, down16_.get() + copy * f * h, inner16.get(), y.get(), stream, x.get());
             }),
         {},
         0});
    for (int round = 0; round < args_.rounds; ++round)
      for (Candidate& c : candidates) c.chain->run(args_.milliseconds, c.samples, c.clock);
    double time[3];
    for (int i = 0; i < 3; ++i)
      time[i] = summarize(candidates[static_cast<std::size_t>(i)].samples, 0).microseconds;
    char line[192];
    std::snprintf(line, sizeof(line),
                  "ffn %llux%llu M %6llu: fireq %9.2f us, cublas fp8 %9.2f us (x%.2f), cublas bf16 %9.2f us "
                  "(x%.2f), %u MHz",
                  static_cast<unsigned long long>(h), static_cast<unsigned long long>(f),
                  static_cast<unsigned long long>(m), time[0], time[1], time[1] / time[0], time[2],
                  time[2] / time[0], candidates[0].clock);
    print_(line);
    result_.blocks.push_back({m, time[0], time[1], time[2], candidates[0].clock});
  }

  // Bandwidth: bytes read and written once over time, of 4.4 TB/s.
  void rows(std::uint64_t m) {
    const std::uint64_t h = args_.hidden, f = args_.ffn;
    DeviceBuffer<std::uint16_t> x(m * 2 * f), sum(m * h);
    DeviceBuffer<std::uint8_t> x8(m * f);
    DeviceBuffer<float> a(m);
    fill_bf16_normal(x.get(), x.size(), 7);
    NormInput norm;
    norm.x = {x.get(), h};
    norm.weight = norm_.get();
    NormInput added = norm;
    added.addend = {x.get() + m * h, h};
    added.sum = sum.get();
    const std::uint64_t narrow = m * h, wide = m * f;
    row("quantise", m, narrow * 3, [&](int, cudaStream_t s) {
      quantize_activations({x.get(), h}, m, h, {x8.get(), h, a.get()}, {s, true});
    });
    row("quantise, wide", m, wide * 3, [&](int, cudaStream_t s) {
      quantize_activations({x.get(), f}, m, f, {x8.get(), f, a.get()}, {s, true});
    });
    row("norm and quantise", m, narrow * 3, [&](int, cudaStream_t s) {
      rmsnorm_quantize(norm, m, h, {x8.get(), h, a.get()}, {s, true});
    });
    row("add, norm, quantise", m, narrow * 7, [&](int, cudaStream_t s) {
      rmsnorm_quantize(added, m, h, {x8.get(), h, a.get()}, {s, true});
    });
    row("silu * up, quantise", m, wide * 5, [&](int, cudaStream_t s) {
      silu_mul_quantize({x.get(), 2 * f}, m, f, {x8.get(), f, a.get()}, {s, true});
    });
  }

  FfnBenchResult result() {
    result_.device = device_;
    return std::move(result_);
  }

 private:
  void row(const char* name, std::uint64_t m, std::uint64_t bytes,
           const std::function<void(int, cudaStream_t)>& body) {
    Chain chain(8, body);
    std::vector<double> samples;
    unsigned clock = 0;
    chain.run(args_.milliseconds, samples, clock);
    const double us = summarize(samples, clock).microseconds;
    const double rate = static_cast<double>(bytes) / us * 1e-6;
    char line[128];
    std::snprintf(line, sizeof(line), "rows %-20s M %6llu: %8.2f us, %.2f TB/s (%.2f of 4.4)", name,
                  static_cast<unsigned long long>(m), us, rate, rate / 4.4);
    print_(line);
    result_.row_kernels.push_back({name, m, us, rate * 1e12});
  }

  static constexpr std::size_t kWideCopies = 3;
  const FfnBenchOptions& args_;
  const Print& print_;
  DeviceInfo device_;
  std::size_t copies_ = 0, up_bytes_ = 0, down_bytes_ = 0, next_ = 0;
  DeviceBuffer<std::uint8_t> up_, down_, up8_, down8_, workspace_;
  DeviceBuffer<std::uint16_t> up16_, down16_;
  DeviceBuffer<float> row_scales_, norm_;
  FfnBenchResult result_;
};

}  // namespace

FfnBenchResult run_ffn_bench(const FfnBenchOptions& options, const Print& print) {
  if (options.hidden == 0 || options.hidden > 4096 || options.hidden % 16 != 0 || options.ffn % 16 != 0 ||
      options.ffn == 0)
    throw Error(ErrorKind::usage, "sizes of the feed-forward block")
        .expected("multiples of 16, hidden at most 4096");
  FfnBench bench(options, print);
  for (const std::uint64_t m : options.tokens) bench.block(m);
  for (const std::uint64_t m : {1024U, 16384U}) bench.rows(m);
  return bench.result();
}

}  // namespace fireq::kernels::bench
