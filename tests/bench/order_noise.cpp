// How far rounding noise moves a perplexity: every output of the packed linears is disturbed by normal noise
// of a share of its row's root mean square before it is rounded to bf16, as another order of summation would,
// and the same windows are scored again.
//   order_noise FIREQ_FOLDER ids.u32 CTX TOKENS [SHARE ...]
// Prints the change of the mean nll for three seeds, with its standard error over windows.
#include <cmath>
#include <cstdio>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "calib/evaluate.hpp"
#include "common/error.hpp"
#include "libquant/activation_quantizer.hpp"
#include "libquant/number_formats.hpp"

namespace fireq::calib {
namespace {

// The forward pass's own product with noise on top.
class NoisyBackend final : public LinearBackend {
 public:
  NoisyBackend(double share, std::uint64_t seed) : share_(static_cast<float>(share)), random_(seed) {}

  void load(std::uint64_t layer, LinearIndex linear, const libquant::QuantizedLinear& weight,
            std::span<const float> bias) override {
    std::vector<float> operands(weight.rows * weight.cols);
    libquant::operand_rows(weight, libquant::ProductTable(weight.levels), 0, weight.rows, operands);
    LinearPanels& to = linears_[{layer, linear}];
    to.weight = Panels(operands, weight.rows, weight.cols, 0);
    to.row_scale = weight.row_scales;
    to.bias.assign(bias.begin(), bias.end());
  }

  void multiply(std::uint64_t layer, std::span<const LinearIndex> linears, std::span<const std::uint16_t> x,
                std::uint64_t tokens, std::span<const std::span<std::uint16_t>> y) override {
    const std::uint64_t cols = x.size() / tokens;
    std::vector<float> values(x.size());
    std::vector<float> scale(tokens);
    libquant::decode_bf16(x, values);
    for (std::uint64_t m = 0; m < tokens; ++m)
      scale[m] = libquant::quantize_token_in_place(std::span(values).subspan(m * cols, cols));
    for (std::size_t i = 0; i < linears.size(); ++i) {
      const LinearPanels& linear = linears_.at({layer, linears[i]});
      const std::uint64_t rows = linear.weight.rows();
      std::vector<float> out(tokens * rows);
      apply_linear(linear, values.data(), cols, tokens, scale.data(), false, out.data(), rows, 0);
      for (std::uint64_t m = 0; m < tokens; ++m) disturb(std::span(out).subspan(m * rows, rows));
      libquant::encode_bf16(out, y[i]);
    }
  }

 private:
  void disturb(std::span<float> row) {
    double squares = 0;
    for (const float v : row) squares += static_cast<double>(v) * v;
    const float width = share_ * static_cast<float>(std::sqrt(squares / static_cast<double>(row.size())));
    for (float& v : row) v += width * normal_(random_);
  }

  float share_;
  std::mt19937_64 random_;
  std::normal_distribution<float> normal_;
  std::map<std::pair<std::uint64_t, LinearIndex>, LinearPanels> linears_;
};

void print_change(const std::vector<double>& before, const std::vector<double>& after) {
  const auto n = static_cast<double>(before.size());
  double sum = 0;
  double squares = 0;
  for (std::size_t w = 0; w < before.size(); ++w) {
    const double d = after[w] - before[w];
    sum += d;
    squares += d * d;
  }
  const double mean = sum / n;
  std::printf("  %+.5f +- %.5f", mean, std::sqrt((squares / n - mean * mean) / (n - 1)));
}

void run(const std::vector<std::string>& args) {
  const auto model = open_weights(args[0]);
  std::vector<std::int32_t> ids = load_tokens(args[1], model->config().vocab);
  ids.resize(std::min<std::size_t>(ids.size(), std::stoull(args[3])));
  const Windows windows = make_evaluation_windows(ids, std::stoull(args[2]), Bos::none, {});
  std::vector<double> shares{1e-6, 1e-3};
  if (args.size() > 4) shares.clear();
  for (std::size_t i = 4; i < args.size(); ++i) shares.push_back(std::stod(args[i]));
  Progress silent;
  for (const bool cache : {true, false}) {
    EvaluationOptions options;
    options.precision = {
        .fp8_activations = true, .int4_k = cache, .int4_v = cache, .fp8_q = true, .fp8_p = true};
    const EvaluationResult plain = evaluate(*model, windows, options, silent);
    std::printf("%s cache: perplexity %.4f, %llu tokens\n", cache ? "INT4" : "fp", plain.ppl,
                static_cast<unsigned long long>(plain.scored));
    for (const double share : shares) {
      std::printf("  noise %g:", share);
      for (std::uint64_t seed = 0; seed < 3; ++seed) {
        NoisyBackend backend(share, seed);
        options.backend = &backend;
        print_change(plain.window_nll, evaluate(*model, windows, options, silent).window_nll);
        options.backend = nullptr;
        std::fflush(stdout);
      }
      std::printf("\n");
    }
  }
}

}  // namespace
}  // namespace fireq::calib

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "order_noise FIREQ_FOLDER ids.u32 CTX TOKENS [SHARE ...]\n");
    return 2;
  }
  try {
    fireq::calib::run({argv + 1, argv + argc});
  } catch (const std::exception& e) {
    std::fprintf(stderr, "order_noise: %s\n", e.what());
    return 3;
  }
  return 0;
}
