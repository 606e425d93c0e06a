// Speed of libquant on one thread, beside a memory copy of the same bytes in the same process:
//   build/release/bin/fireq_bench_libquant
// Bytes per second are bytes of weights read. The tensor (64 MiB of F16) does not fit a cache.
#include <benchmark/benchmark.h>

#include <cstring>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "libquant/activation_quantizer.hpp"
#include "libquant/number_formats.hpp"
#include "libquant/packing.hpp"
#include "libquant/quantized_linear.hpp"
#include "libquant/row_kernels.hpp"

namespace {

using namespace fireq;
using namespace fireq::libquant;

constexpr std::uint64_t kRows = 8192;
constexpr std::uint64_t kCols = 4096;

// Gaussian weights of the size that trained models have, as bytes of the type.
const std::vector<std::byte>& weights(Dtype dtype) {
  static std::vector<std::byte> f16, bf16, f32;
  std::vector<std::byte>& bytes = dtype == Dtype::f16 ? f16 : dtype == Dtype::bf16 ? bf16 : f32;
  if (!bytes.empty()) return bytes;
  bytes.resize(kRows * kCols * dtype_size(dtype));
  std::mt19937 random(20250508);
  std::normal_distribution<float> normal(0.0F, 0.02F);
  std::vector<float> row(kCols);
  std::vector<std::uint16_t> half(kCols);
  for (std::uint64_t r = 0; r < kRows; ++r) {
    for (float& v : row) v = normal(random);
    std::byte* to = bytes.data() + r * kCols * dtype_size(dtype);
    if (dtype == Dtype::f32) {
      std::memcpy(to, row.data(), kCols * sizeof(float));
      continue;
    }
    if (dtype == Dtype::f16) {
      encode_f16(row, half);
    } else {
      encode_bf16(row, half);
    }
    std::memcpy(to, half.data(), kCols * sizeof(std::uint16_t));
  }
  return bytes;
}

void set_bytes(benchmark::State& state, std::size_t per_iteration) {
  state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations()) *
                          static_cast<std::int64_t>(per_iteration));
  state.SetLabel(std::string(simd_target()));
}

void copy(benchmark::State& state) {
  const std::vector<std::byte>& from = weights(Dtype::f16);
  std::vector<std::byte> to(from.size());
  for (auto _ : state) {
    std::memcpy(to.data(), from.data(), from.size());
    benchmark::DoNotOptimize(to.data());
    benchmark::ClobberMemory();
  }
  set_bytes(state, from.size());
}

void quantize(benchmark::State& state, Dtype dtype, const WeightQuantizerOptions& options, bool weighted) {
  const std::vector<std::byte>& w = weights(dtype);
  const std::uint64_t rows = options.search_low == 0 ? kRows : kRows / 16;
  const std::span<const std::byte> bytes = std::span(w).first(rows * kCols * dtype_size(dtype));
  QuantizedLinear q =
      make_quantized_linear(rows, kCols, options.levels, options.row_scale == RowScale::tensor);
  std::vector<float> column_weight;
  if (weighted) column_weight.assign(kCols, 0.5F);
  for (auto _ : state) {
    quantize_rows_raw(bytes, dtype, 0, rows, options, column_weight, q);
    benchmark::DoNotOptimize(q.codes.data());
    benchmark::ClobberMemory();
  }
  set_bytes(state, bytes.size());
  state.counters["weights/s"] =
      benchmark::Counter(static_cast<double>(rows * kCols), benchmark::Counter::kIsIterationInvariantRate);
}

void tensor_scale(benchmark::State& state) {
  const std::vector<std::byte>& w = weights(Dtype::f16);
  for (auto _ : state) {
    TensorScaleSearch search(7.0F * 0x1p-9F);
    search.add_rows_raw(w, Dtype::f16, kRows, kCols);
    benchmark::DoNotOptimize(search.scale());
  }
  set_bytes(state, w.size());
}

QuantizedLinear quantized() {
  WeightQuantizerOptions options;
  QuantizedLinear q = make_quantized_linear(kRows, kCols, options.levels, false);
  quantize_rows_raw(weights(Dtype::f16), Dtype::f16, 0, kRows, options, {}, q);
  return q;
}

void dequantize(benchmark::State& state) {
  const QuantizedLinear q = quantized();
  const ProductTable table(q.levels);
  std::vector<float> row(kCols);
  for (auto _ : state) {
    for (std::uint64_t r = 0; r < kRows; ++r) {
      dequantize_rows(q, table, r, 1, row);
      benchmark::DoNotOptimize(row.data());
    }
  }
  set_bytes(state, q.codes.size());
}

void pack(benchmark::State& state) {
  const QuantizedLinear q = quantized();
  for (auto _ : state) benchmark::DoNotOptimize(pack_sm90(q).data());
  set_bytes(state, q.codes.size());
}

void token(benchmark::State& state) {
  std::vector<float> x(kCols);
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (float& v : x) v = normal(random);
  std::vector<std::uint8_t> x8(kCols);
  for (auto _ : state) benchmark::DoNotOptimize(quantize_token(x, x8));
  set_bytes(state, x.size() * sizeof(float));
}

WeightQuantizerOptions fast(const Levels& levels) {
  WeightQuantizerOptions options;
  options.levels = levels;
  options.rounding = Rounding::product;
  options.search_low = -7;
  options.search_high = 2;
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  const auto add = [](const char* name, auto body) {
    benchmark::RegisterBenchmark(name, body)->Unit(benchmark::kMillisecond)->MinTime(1.0);
  };
  add("memcpy/f16", copy);
  add("rtn/f16", [](benchmark::State& s) { quantize(s, Dtype::f16, {}, false); });
  add("rtn/bf16", [](benchmark::State& s) { quantize(s, Dtype::bf16, {}, false); });
  add("rtn/f32", [](benchmark::State& s) { quantize(s, Dtype::f32, {}, false); });
  for (const RowKernels* table : available_kernels()) {  // what older CPUs would run
    benchmark::RegisterBenchmark(("rtn/f16/" + std::string(table->name)).c_str(),
                                 [table](benchmark::State& s) {
                                   use_kernels(table);
                                   quantize(s, Dtype::f16, {}, false);
                                   use_kernels(nullptr);
                                 })
        ->Unit(benchmark::kMillisecond)
        ->MinTime(0.5);
  }
  add("fast/int4/f16", [](benchmark::State& s) { quantize(s, Dtype::f16, fast(Levels::int4()), true); });
  add("fast/normal/f16", [](benchmark::State& s) { quantize(s, Dtype::f16, fast(Levels::normal()), true); });
  add("tensor_scale/f16", tensor_scale);
  add("dequantize", dequantize);
  add("pack_sm90", pack);
  add("quantize_token/4096", token);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
