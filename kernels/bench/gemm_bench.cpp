// Every configuration of gemm_w4a8 against the roof and against cuBLASLt.
#include <algorithm>
#include <cmath>
#include <map>
#include <memory>

#include "common/error.hpp"
#include "kernels/bench/bench.hpp"
#include "kernels/bench/support.hpp"
#include "kernels/gemm.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::kernels::bench {

namespace {

struct Card {
  double bandwidth = 0;  // bytes a second, measured for reads on such a card
  double fp8_rate = 1.46e15;
};
Card card_of(const std::string& name) {
  if (name.find("H200") != std::string::npos) return {4.40e12, 1.46e15};
  return {3.05e12, 1.46e15};
}

struct Candidate {
  std::string name;
  bool chosen = false;
  std::unique_ptr<Chain> chain;
  std::vector<double> samples;
  unsigned clock = 0;
};

// All memory of one shape: weight copies in three formats, activations, outputs.
class Bench {
 public:
  Bench(const GemmBenchOptions& args, const Print& print) : args_(args), print_(print) {
    result_.device = device_;
    result_.bandwidth = card_.bandwidth;
    result_.fp8_rate = card_.fp8_rate;
  }

  void shape(const Shape& s) {
    const std::size_t tile_bytes = (s.n + 127) / 128 * ((s.k + 127) / 128) * 8320;
    const std::size_t copies = std::clamp<std::size_t>((std::size_t{420} << 20U) / tile_bytes + 1, 2, 96);
    const std::size_t fp8_copies =
        std::clamp<std::size_t>((std::size_t{420} << 20U) / (s.n * s.k) + 1, 2, 96);
    DeviceBuffer<std::uint8_t> tiles(copies * tile_bytes);
    for (std::size_t i = 0; i < copies; ++i)
      fill_tiles(tiles.get() + i * tile_bytes, tile_bytes, static_cast<std::uint32_t>(i + 1));
    DeviceBuffer<std::uint8_t> fp8(fp8_copies * s.n * s.k);
    fill_fp8_normal(fp8.get(), fp8.size(), 5);
    DeviceBuffer<std::uint16_t> bf16;
    if (args_.bf16) {
      bf16 = DeviceBuffer<std::uint16_t>(std::max<std::size_t>(2, fp8_copies / 2) * s.n * s.k);
      fill_bf16_normal(bf16.get(), bf16.size(), 6);
    }
    std::vector<float> row_scales(s.n, 1e-3F);
    DeviceBuffer<float> r(row_scales);
    for (const std::uint64_t m : args_.tokens) {
      DeviceBuffer<std::uint8_t> x8(m * s.k);
      fill_fp8_normal(x8.get(), x8.size(), 9);
      DeviceBuffer<std::uint16_t> x16(m * s.k);
      fill_bf16_normal(x16.get(), x16.size(), 9);
      std::vector<float> token_scales(m, 0.01F);
      DeviceBuffer<float> a(token_scales);
      DeviceBuffer<std::uint16_t> y(m * s.n);

      WeightRef w;
      w.rows = s.n;
      w.cols = s.k;
      w.layout = WeightLayout::sm90;
      w.row_scales = r.get();
      w.levels = kLevels;
      const TokensRef x{x8.get(), a.get(), m, s.k};
      const std::size_t need = gemm_workspace_bytes(device_) + cublas_scratch_bytes(s.n, s.k);
      if (workspace_.size() < need) {
        workspace_ = DeviceBuffer<std::uint8_t>(need);
        init_workspace({workspace_.get(), workspace_.size()}, nullptr);
        cuda_ok(cudaDeviceSynchronize(), "workspace");
      }
      const double flops = 2.0 * static_cast<double>(m) * static_cast<double>(s.n) * static_cast<double>(s.k);
      const double roof_us = 1e6 * std::max(static_cast<double>(s.n) * static_cast<double>(s.k) *
                                                (0.5 + 1.0 / 128) / card_.bandwidth,
                                            flops / card_.fp8_rate);
      const int launches = std::clamp(static_cast<int>(2000 / roof_us), 4, 24);

      std::vector<Candidate> candidates;
      const GemmConfig chosen = choose_gemm(device_, WeightLayout::sm90, m, s.n, s.k).config;
      for (const GemmConfig& config : gemm_configs(device_, WeightLayout::sm90, m)) {
        const std::string name = to_string(config);
        const bool listed =
            std::find(args_.only.begin(), args_.only.end(), name) != args_.only.end() ||
            std::find(args_.only.begin(), args_.only.end(), to_string(config.route)) != args_.only.end();
        if (args_.only.empty()
                ? config.route == Route::portable || (config.route == Route::cublas && m < 1024)
                : !listed)
          continue;
        if (config.route == Route::decode && config.token_tile > 8 && m <= config.token_tile / 2) continue;
        // Grids of more than two rounds.
        if (config.route == Route::decode && (config.cluster > 1 || config.row_tile == 64) &&
            ctas(s, m, config) > 4 * device_.multiprocessors)
          continue;
        if (config.route == Route::prefill &&
            (m < 64 || (m <= config.token_tile / 2 && config.token_tile > 128)))
          continue;
        GemmOptions options;
        options.workspace = {workspace_.get(), workspace_.size()};
        options.programmatic = !args_.serial;
        options.config = config;
        const auto launch = [&, options](int i, cudaStream_t stream) {
          GemmOptions o = options;
          o.stream = stream;
          WeightRef wi = w;
          wi.tiles = tiles.get() + static_cast<std::size_t>(next_++) % copies * tile_bytes;
          if (i < 0) o.profile = profiles_.get() + static_cast<std::size_t>(-i - 1) * kMostCtas;
          gemm_w4a8(x, wi, {y.get(), s.n}, {}, o);
        };
        if (args_.check && config.route != Route::portable) verify(x, w, tiles.get(), y, s, config, options);
        if (args_.profile && (config.route == Route::decode || config.route == Route::prefill) &&
            ctas(s, m, config) <= kMostCtas)
          profile(name, s, m, options, launch);
        candidates.push_back({name, config == chosen, std::make_unique<Chain>(launches, launch), {}, 0});
      }
      std::unique_ptr<CublasGemm> fp8_gemm, bf16_gemm;
      add_peer(candidates, "cublas fp8", true, fp8_gemm, m, s, fp8.get(), fp8_copies, x8.get(), y.get(),
               launches);
      if (args_.bf16)
        add_peer(candidates, "cublas bf16", false, bf16_gemm, m, s, bf16.get(), bf16.size() / (s.n * s.k),
                 x16.get(), y.get(), launches);
      for (int round = 0; round < args_.rounds; ++round)
        for (Candidate& c : candidates) c.chain->run(args_.milliseconds, c.samples, c.clock);
      report(candidates, s, m, roof_us);
    }
  }

  GemmBenchResult result() { return std::move(result_); }

 private:
  static constexpr std::size_t kMostCtas = 512, kProfiled = 6;

  std::size_t ctas(const Shape& s, std::uint64_t m, const GemmConfig& config) const {
    return config.route == Route::decode
               ? std::size_t{decode_token_tiles(m)} *
                     decode_plan(s.n, s.k, config, device_.multiprocessors).workers
               : std::size_t{2} * prefill_plan(s.n, s.k, m, config, device_.multiprocessors).workers;
  }

  void profile(const std::string& name, const Shape& s, std::uint64_t m, const GemmOptions&,
               const std::function<void(int, cudaStream_t)>& launch) {
    if (profiles_.size() == 0) profiles_ = DeviceBuffer<CtaProfile>(kMostCtas * kProfiled);
    std::vector<CtaProfile> all;
    for (int warm = 0; warm < 2; ++warm) {
      profiles_.fill(0);
      cuda_ok(cudaDeviceSynchronize(), "profile");
      // As a graph: launches one by one would wait for the processor.
      Chain(static_cast<int>(kProfiled), [&](int i, cudaStream_t stream) { launch(-i - 1, stream); }).once();
      cuda_ok(cudaDeviceSynchronize(), "profile");
      all = profiles_.download();
    }
    const auto part = [&](std::size_t i) {
      return std::vector<CtaProfile>(all.begin() + static_cast<std::ptrdiff_t>(i * kMostCtas),
                                     all.begin() + static_cast<std::ptrdiff_t>((i + 1) * kMostCtas));
    };
    print_("  profile " + shape_text(s, m) + " " + name + ":" +
           describe_profile(part(kProfiled - 3), part(kProfiled - 2)));
  }

  // The configuration's output against the portable kernel's, on the first copy of the weights.
  void verify(const TokensRef& x, WeightRef w, const std::uint8_t* tiles,
              const DeviceBuffer<std::uint16_t>& y, const Shape& s, const GemmConfig& config,
              GemmOptions options) {
    w.tiles = tiles;
    options.programmatic = false;
    cuda_ok(cudaMemset(y.get(), 0xff, y.size() * 2), "poison");
    gemm_w4a8(x, w, {y.get(), s.n}, {}, options);
    cuda_ok(cudaDeviceSynchronize(), to_string(config).c_str());
    const std::uint64_t tokens = std::min<std::uint64_t>(x.tokens, 64);
    std::vector<std::uint16_t> got(tokens * s.n), want(tokens * s.n);
    cuda_ok(cudaMemcpy(got.data(), y.get(), got.size() * 2, cudaMemcpyDeviceToHost), "download");
    const TokensRef few{x.x8, x.scale, tokens, x.pitch};
    options.config = GemmConfig{Route::portable, 0, 1};
    gemm_w4a8(few, w, {y.get(), s.n}, {}, options);
    cuda_ok(cudaDeviceSynchronize(), "portable");
    cuda_ok(cudaMemcpy(want.data(), y.get(), want.size() * 2, cudaMemcpyDeviceToHost), "download");
    double error = 0, norm = 0;
    for (std::size_t i = 0; i < few.tokens * s.n; ++i) {
      const double d = libquant::decode_bf16(got[i]) - static_cast<double>(libquant::decode_bf16(want[i]));
      error += d * d;
      norm += static_cast<double>(libquant::decode_bf16(want[i])) * libquant::decode_bf16(want[i]);
    }
    error_[to_string(config)] = std::sqrt(error / norm);
    if (!(std::sqrt(error / norm) < 5e-3)) {
      ++result_.wrong;
      char text[96];
      std::snprintf(text, sizeof(text), ": %.3e from the portable kernel", std::sqrt(error / norm));
      print_("WRONG " + shape_text(s, x.tokens) + " " + to_string(config) + text);
    }
  }

  void add_peer(std::vector<Candidate>& candidates, const std::string& name, bool fp8,
                std::unique_ptr<CublasGemm>& gemm, std::uint64_t m, const Shape& s, const void* weights,
                std::size_t copies, const void* x, void* y, int launches) {
    gemm = std::make_unique<CublasGemm>(fp8, m, s.n, s.k);
    const std::size_t bytes = s.n * s.k * (fp8 ? 1 : 2);
    double best = 1e30;
    Candidate chosen{name, false, nullptr, {}, 0};
    for (int algorithm = 0; algorithm < gemm->algorithms(); ++algorithm) {
      try {
        auto chain = std::make_unique<Chain>(launches, [&, algorithm](int i, cudaStream_t stream) {
          const auto* w =
              static_cast<const std::uint8_t*>(weights) + static_cast<std::size_t>(i) % copies * bytes;
          gemm->run(algorithm, w, x, y, stream);
        });
        chain->once();
        const double t = std::min(chain->once(), chain->once());
        if (t < best) {
          best = t;
          chosen.chain = std::move(chain);
        }
      } catch (const Error&) {
        cudaGetLastError();  // an algorithm that does not run is not a candidate
      }
    }
    if (chosen.chain) candidates.push_back(std::move(chosen));
  }

  void report(std::vector<Candidate>& candidates, const Shape& s, std::uint64_t m, double roof_us) {
    double fp8 = std::nan("");
    for (const Candidate& c : candidates)
      if (c.name == "cublas fp8") fp8 = summarize(c.samples, 0).microseconds;
    std::vector<GemmBenchRow> rows;
    for (const Candidate& c : candidates) {
      const Timing t = summarize(c.samples, c.clock);
      GemmBenchRow row;
      row.n = s.n;
      row.k = s.k;
      row.m = m;
      row.config = c.name;
      row.chosen = c.chosen;
      row.microseconds = t.microseconds;
      row.roof_microseconds = roof_us;
      row.spread = t.spread;
      row.speed_over_fp8 = fp8 / t.microseconds;
      row.difference = error_.contains(c.name) ? error_[c.name] : 0.0;
      row.clock_mhz = t.clock_mhz;
      rows.push_back(row);
    }
    const auto ours = [](const GemmBenchRow& r) { return !r.config.starts_with("cublas "); };
    double fastest = 1e30;
    for (const GemmBenchRow& r : rows)
      if (ours(r)) fastest = std::min(fastest, r.microseconds);
    for (const GemmBenchRow& r : rows) {
      result_.rows.push_back(r);
      if (args_.best && ours(r) && !r.chosen && r.microseconds > fastest) continue;
      char line[256];
      std::snprintf(
          line, sizeof(line),
          "%s %-20s %9.2f us  roof %7.2f (%.3f, +%.1f)  %6.0f TFLOPS  x%.2f fp8  spread %.3f  %4u MHz "
          " e %.1e%s",
          shape_text(s, m).c_str(), r.config.c_str(), r.microseconds, roof_us, r.roof_fraction(),
          r.microseconds - roof_us, r.tflops(), r.speed_over_fp8, r.spread, r.clock_mhz, r.difference,
          r.chosen ? "  chosen" : "");
      print_(line);
    }
    error_.clear();
  }

 private:
  static std::string shape_text(const Shape& s, std::uint64_t m) {
    char text[64];
    std::snprintf(text, sizeof(text), "%6llux%-6llu %6llu", static_cast<unsigned long long>(s.n),
                  static_cast<unsigned long long>(s.k), static_cast<unsigned long long>(m));
    return text;
  }

  const GemmBenchOptions& args_;
  const Print& print_;
  DeviceInfo device_ = current_device();
  Card card_ = card_of(device_.name);
  DeviceBuffer<std::uint8_t> workspace_;
  DeviceBuffer<CtaProfile> profiles_;
  std::size_t next_ = 0;  // weight copy of the next launch
  std::map<std::string, double> error_;
  GemmBenchResult result_;
};

}  // namespace

GemmBenchResult run_gemm_bench(const GemmBenchOptions& options, const Print& print) {
  Bench bench(options, print);
  for (const Shape& s : options.shapes) bench.shape(s);
  return bench.result();
}

}  // namespace fireq::kernels::bench
