#include "apps/cmd_bench.hpp"

#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>

#include "common/error.hpp"
#include "kernels/bench/bench.hpp"

namespace fireq::apps {
namespace {

namespace bench = kernels::bench;

struct Output {
  std::string json, csv;  // paths; empty: none
};

void print(const std::string& line) {
  std::puts(line.c_str());
  std::fflush(stdout);
}

void write(const std::string& path, const std::string& text) {
  if (path.empty()) return;
  std::ofstream file(path);
  file << text;
  if (!file.flush()) throw Error(ErrorKind::environment, "cannot write the results").path(path);
}

nlohmann::json device_json(const kernels::DeviceInfo& device) {
  return {{"name", device.name},
          {"multiprocessors", device.multiprocessors},
          {"compute_capability", device.compute_capability}};
}

int run_gemm(const bench::GemmBenchOptions& options, const Output& output) {
  const bench::GemmBenchResult result = bench::run_gemm_bench(options, print);
  nlohmann::json rows = nlohmann::json::array();
  std::string csv = "n,k,m,config,chosen,us,roof_us,roof_fraction,tflops,speed_over_fp8,spread,clock_mhz\n";
  for (const bench::GemmBenchRow& r : result.rows) {
    rows.push_back({{"n", r.n},
                    {"k", r.k},
                    {"m", r.m},
                    {"config", r.config},
                    {"chosen", r.chosen},
                    {"us", r.microseconds},
                    {"roof_us", r.roof_microseconds},
                    {"roof_fraction", r.roof_fraction()},
                    {"tflops", r.tflops()},
                    {"speed_over_fp8", r.speed_over_fp8},
                    {"spread", r.spread},
                    {"clock_mhz", r.clock_mhz},
                    {"difference_to_portable", r.difference}});
    char line[256];
    std::snprintf(line, sizeof(line), "%llu,%llu,%llu,%s,%d,%.3f,%.3f,%.4f,%.1f,%.3f,%.4f,%u\n",
                  static_cast<unsigned long long>(r.n), static_cast<unsigned long long>(r.k),
                  static_cast<unsigned long long>(r.m), r.config.c_str(), r.chosen ? 1 : 0, r.microseconds,
                  r.roof_microseconds, r.roof_fraction(), r.tflops(), r.speed_over_fp8, r.spread,
                  r.clock_mhz);
    csv += line;
  }
  const nlohmann::json top{{"device", device_json(result.device)},
                           {"roof_bandwidth", result.bandwidth},
                           {"roof_fp8_rate", result.fp8_rate},
                           {"programmatic", !options.serial},
                           {"results", rows}};
  write(output.json, top.dump(1) + "\n");
  write(output.csv, csv);
  return result.wrong == 0 ? 0 : 1;
}

int run_ffn(const bench::FfnBenchOptions& options, const Output& output) {
  const bench::FfnBenchResult result = bench::run_ffn_bench(options, print);
  nlohmann::json blocks = nlohmann::json::array();
  nlohmann::json rows = nlohmann::json::array();
  for (const bench::FfnBenchRow& b : result.blocks)
    blocks.push_back({{"m", b.m}, {"fireq_us", b.fireq}, {"fp8_us", b.fp8}, {"bf16_us", b.bf16}});
  for (const bench::RowKernelRow& r : result.row_kernels)
    rows.push_back(
        {{"name", r.name}, {"m", r.m}, {"us", r.microseconds}, {"bytes_per_second", r.bytes_per_second}});
  const nlohmann::json top{{"device", device_json(result.device)},
                           {"hidden", options.hidden},
                           {"ffn", options.ffn},
                           {"blocks", blocks},
                           {"row_kernels", rows}};
  write(output.json, top.dump(1) + "\n");
  return 0;
}

void add_output(CLI::App& app, Output& output) {
  app.add_option("--json", output.json, "write the results here as JSON");
}

void add_gemm(CLI::App& parent, std::function<int()>& run) {
  struct Arguments {
    bench::GemmBenchOptions bench;
    Output output;
    std::vector<std::string> shapes{"llama3-8b"};
  };
  auto arguments = std::make_shared<Arguments>();
  Arguments& a = *arguments;
  a.bench.tokens = {1, 16, 64, 128, 1024, 8192};
  CLI::App* app = parent.add_subcommand("gemm", "packed linear layers against the roof and cuBLASLt FP8");
  app->add_option("--shapes", a.shapes, "NxK, llama3-8b, llama2-7b, llama2-13b, llama3-70b")->delimiter(',');
  app->add_option("--m", a.bench.tokens, "numbers of tokens")->delimiter(',')->check(CLI::PositiveNumber);
  app->add_option("--only", a.bench.only, "configurations or routes")->delimiter(',');
  app->add_option("--ms", a.bench.milliseconds, "milliseconds a candidate and round")
      ->check(CLI::PositiveNumber);
  app->add_option("--rounds", a.bench.rounds, "interleaved rounds")->check(CLI::PositiveNumber);
  app->add_flag("--bf16", a.bench.bf16, "cuBLASLt bf16 as another peer");
  app->add_flag("!--no-check", a.bench.check, "do not compare outputs with the portable kernel");
  app->add_flag("--serial", a.bench.serial, "no programmatic dependent launch");
  app->add_flag("--profile", a.bench.profile, "also where a launch's time goes, stage by stage");
  app->add_flag("--best", a.bench.best, "print only the fastest and the chosen configuration");
  app->add_option("--csv", a.output.csv, "write the results here as CSV");
  add_output(*app, a.output);
  app->callback([arguments, &run] {
    run = [arguments] {
      for (const std::string& word : arguments->shapes) {
        const std::vector<bench::Shape> more = bench::shapes_of(word);
        arguments->bench.shapes.insert(arguments->bench.shapes.end(), more.begin(), more.end());
      }
      return run_gemm(arguments->bench, arguments->output);
    };
  });
}

void add_ffn(CLI::App& parent, std::function<int()>& run) {
  struct Arguments {
    bench::FfnBenchOptions bench;
    Output output;
  };
  auto arguments = std::make_shared<Arguments>();
  Arguments& a = *arguments;
  a.bench.tokens = {1, 16, 64, 128, 1024, 4096, 16384};
  CLI::App* app =
      parent.add_subcommand("ffn", "a feed-forward block against the same with cuBLASLt in FP8 and bf16");
  app->add_option("--hidden", a.bench.hidden, "width of the residual stream, at most 4096");
  app->add_option("--ffn", a.bench.ffn, "width between up and down");
  app->add_option("--m", a.bench.tokens, "numbers of tokens")->delimiter(',')->check(CLI::PositiveNumber);
  app->add_option("--ms", a.bench.milliseconds, "milliseconds a candidate and round")
      ->check(CLI::PositiveNumber);
  app->add_option("--rounds", a.bench.rounds, "interleaved rounds")->check(CLI::PositiveNumber);
  add_output(*app, a.output);
  app->callback(
      [arguments, &run] { run = [arguments] { return run_ffn(arguments->bench, arguments->output); }; });
}

}  // namespace

void add_bench(CLI::App& app, std::function<int()>& run) {
  CLI::App* bench =
      app.add_subcommand("bench", "Speed of the GPU kernels (needs a build with CUDA, and a GPU)");
  bench->require_subcommand(1);
  add_gemm(*bench, run);
  add_ffn(*bench, run);
}

}  // namespace fireq::apps
