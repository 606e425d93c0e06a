// Time and error of quantising one synthetic linear by curvature, stage by stage, for sizes of real models:
//   build/release/bin/fireq_bench_curvature [--threads N] [--tokens N] [ROWSxCOLS ...]
// Inputs are low-rank plus noise with a few large channels, so that the curvature is far from diagonal.
// Processor seconds stand beside wall seconds: they hold on a machine that is busy with other work.
#include <fmt/core.h>
#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "libquant/curvature.hpp"
#include "libquant/curvature_quantizer.hpp"

namespace {

using namespace fireq::libquant;

double processor_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

struct Stage {
  double wall = 0, processor = 0;

  template <class Body>
  auto time(const Body& body) {
    const double before = processor_seconds();
    const auto start = std::chrono::steady_clock::now();
    struct Add {
      Stage& stage;
      double before = 0;
      std::chrono::steady_clock::time_point start;
      ~Add() {
        stage.wall += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        stage.processor += processor_seconds() - before;
      }
    } add{*this, before, start};
    return body();
  }
};

// Calibration tokens, a part at a time: 64 directions shared by all channels, noise, and 1 % of channels
// thirty times as large.
class Tokens {
 public:
  explicit Tokens(std::uint64_t cols) : cols_(cols), directions_(64 * cols), size_(cols, 1.0F) {
    for (float& v : directions_) v = normal_(random_);
    for (std::uint64_t i = 0; i < cols / 100; ++i) size_[random_() % cols] = 30;
  }

  void next(std::vector<float>& x_q, std::vector<float>& x_f, std::uint64_t count) {
    for (std::uint64_t t = 0; t < count; ++t) {
      float* f = x_f.data() + t * cols_;
      for (std::uint64_t c = 0; c < cols_; ++c) f[c] = noise();
      for (int d = 0; d < 64; ++d) {
        const float a = normal_(random_) / 4;
        const float* direction = directions_.data() + static_cast<std::size_t>(d) * cols_;
        for (std::uint64_t c = 0; c < cols_; ++c) f[c] += a * direction[c];
      }
      for (std::uint64_t c = 0; c < cols_; ++c) f[c] *= size_[c];
      for (std::uint64_t c = 0; c < cols_; ++c) x_q[t * cols_ + c] = f[c] * (1.0F + 0.03F * noise());
    }
  }

 private:
  // Cheap noise of variance 1: drawing takes none of the time that is measured, but all of the waiting.
  float noise() {
    state_ = state_ * 6364136223846793005ULL + 1442695040888963407ULL;
    return (static_cast<float>(state_ >> 40U) / 16777216.0F - 0.5F) * 3.4641016F;
  }

  std::uint64_t cols_;
  std::mt19937 random_{11};
  std::normal_distribution<float> normal_;
  std::vector<float> directions_, size_;
  std::uint64_t state_ = 3;
};

void measure(std::uint64_t rows, std::uint64_t cols, std::uint64_t tokens, int threads) {
  Stage sums_stage, factor_stage, target_stage, round_stage;
  std::vector<float> w(rows * cols);
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0.0F, 0.02F);
  for (float& v : w) v = normal(random);

  Curvature sums(cols);
  constexpr std::uint64_t kPart = 512;
  Tokens source(cols);
  std::vector<float> x_q(kPart * cols), x_f(kPart * cols);
  for (std::uint64_t done = 0; done < tokens; done += kPart) {
    const std::uint64_t count = std::min(kPart, tokens - done);
    source.next(x_q, x_f, count);
    sums_stage.time([&] { sums.add(x_q.data(), x_f.data(), cols, count, threads); });
  }
  target_stage.time([&] {
    const TargetSolver solver(sums, 0.1, threads);
    solver.compensate(w, rows, {}, threads);
  });
  const CurvatureFactor factor = factor_stage.time([&] { return factor_curvature(sums, 0.01, threads); });
  QuantizedLinear q = make_quantized_linear(rows, cols, Levels::normal(), false);
  const CurvatureError error =
      round_stage.time([&] { return quantize_with_curvature(w, factor, {}, threads, q); });
  fmt::print("{:>6} x {:<6}", rows, cols);
  for (const Stage& s : {sums_stage, target_stage, factor_stage, round_stage})
    fmt::print("  {:7.3f} {:7.3f}", s.wall, s.processor);
  fmt::print("  {:.3f}  {:.3f}\n", std::sqrt(error.greedy / error.reference),
             std::sqrt(error.final / error.reference));
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) try {
  CLI::App app("Time of quantising by curvature, stage by stage");
  int threads = 2;
  std::uint64_t tokens = 8192;
  std::vector<std::string> shapes = {"576x576", "576x1536", "2048x2048", "4096x4096", "4096x14336"};
  app.add_option("--threads", threads)->check(CLI::Range(1, 4096))->capture_default_str();
  app.add_option("--tokens", tokens)->check(CLI::Range(1, 1 << 20))->capture_default_str();
  app.add_option("shapes", shapes, "ROWSxCOLS")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  fmt::print("{} tokens, {} threads; wall and processor seconds of each stage; relative output error\n",
             tokens, threads);
  fmt::print("{:<15}  {:>15}  {:>15}  {:>15}  {:>15}  {}\n", "rows x cols", "second moments", "target",
             "factor", "rounding", "greedy, final");
  for (const std::string& shape : shapes) {
    const std::size_t x = shape.find('x');
    if (x == std::string::npos) throw CLI::ValidationError("shapes", shape + " is not ROWSxCOLS");
    measure(std::stoull(shape.substr(0, x)), std::stoull(shape.substr(x + 1)), tokens, threads);
  }
  return 0;
} catch (const std::exception& e) {
  fmt::print(stderr, "{}\n", e.what());
  return 2;
}
