#include "kernels/bench/support.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <map>
#include <random>

#include "libquant/number_formats.hpp"

namespace fireq::kernels::bench {

namespace {

void cublas_ok(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw Error(ErrorKind::environment, std::string("cuBLASLt: ") + what)
        .found(cublasLtGetStatusString(status));
}

// Copies a host block over device memory again and again, starting `step` elements further each time.
template <class T>
void tile_over(T* data, std::size_t count, const std::vector<T>& block, std::size_t unit,
               std::uint32_t seed) {
  std::size_t done = 0;
  std::size_t offset = (seed * 7919ULL) % (block.size() / unit) * unit;
  while (done < count) {
    const std::size_t part = std::min(count - done, block.size() - offset);
    cuda_ok(cudaMemcpy(data + done, block.data() + offset, part * sizeof(T), cudaMemcpyHostToDevice), "fill");
    done += part;
    offset = 0;
  }
}

}  // namespace

void fill_tiles(std::uint8_t* tiles, std::size_t bytes, std::uint32_t seed) {
  static const std::vector<std::uint8_t> block = [] {
    std::vector<std::uint8_t> b(std::size_t{3001} * 8320);
    std::mt19937 rng(1);
    std::uniform_int_distribution<unsigned> scale(0x38, 0x50);
    for (std::size_t i = 0; i < b.size(); ++i)
      b[i] = static_cast<std::uint8_t>(i % 4160 < 4096 ? rng() : scale(rng));
    return b;
  }();
  tile_over(tiles, bytes, block, 8320, seed);
}

void fill_fp8_normal(std::uint8_t* data, std::size_t count, std::uint32_t seed) {
  static const std::vector<std::uint8_t> block = [] {
    std::vector<std::uint8_t> table(4096);
    std::mt19937 rng(2);
    std::normal_distribution<double> normal;
    for (auto& t : table) t = libquant::encode_e4m3_from_double(110 * normal(rng));
    std::vector<std::uint8_t> b(std::size_t{16} << 20U);
    for (auto& v : b) v = table[rng() % table.size()];
    return b;
  }();
  tile_over(data, count, block, 16, seed);
}

void fill_bf16_normal(std::uint16_t* data, std::size_t count, std::uint32_t seed) {
  static const std::vector<std::uint16_t> block = [] {
    std::vector<std::uint16_t> table(65536);
    std::mt19937 rng(3);
    std::normal_distribution<float> normal;
    for (auto& t : table) t = libquant::encode_bf16(normal(rng));
    std::vector<std::uint16_t> b(std::size_t{8} << 20U);
    for (auto& v : b) v = table[rng() % table.size()];
    return b;
  }();
  tile_over(data, count, block, 16, seed);
}

unsigned sm_clock_mhz() {
  using Init = int (*)();
  using ByIndex = int (*)(unsigned, void**);
  using ClockInfo = int (*)(void*, int, unsigned*);
  static void* const device = []() -> void* {
    void* library = dlopen("libnvidia-ml.so.1", RTLD_NOW);
    if (library == nullptr) return nullptr;
    const auto init = reinterpret_cast<Init>(dlsym(library, "nvmlInit_v2"));
    const auto by_index = reinterpret_cast<ByIndex>(dlsym(library, "nvmlDeviceGetHandleByIndex_v2"));
    void* d = nullptr;
    if (init == nullptr || by_index == nullptr || init() != 0 || by_index(0, &d) != 0) return nullptr;
    return d;
  }();
  if (device == nullptr) return 0;
  static const auto clock =
      reinterpret_cast<ClockInfo>(dlsym(dlopen("libnvidia-ml.so.1", RTLD_NOW), "nvmlDeviceGetClockInfo"));
  unsigned mhz = 0;
  return clock != nullptr && clock(device, 1, &mhz) == 0 ? mhz : 0;  // 1: the SM clock
}

std::string describe_profile(const std::vector<CtaProfile>& before, const std::vector<CtaProfile>& last) {
  static constexpr std::array<const char*, static_cast<std::size_t>(Stamp::count)> kStamps{
      "started", "ready", "weights", "tokens", "multiplied", "stored", "reduced"};
  std::uint64_t end = 0;
  for (const CtaProfile& c : before) end = std::max(end, c.at[static_cast<int>(Stamp::reduced)]);
  std::string line;
  double ctas = 0;
  for (const CtaProfile& c : last) ctas += c.at[0] != 0 ? 1 : 0;
  char text[96];
  for (std::size_t s = 0; s < kStamps.size(); ++s) {
    double sum = 0, least = 1e30, most = -1e30;
    for (const CtaProfile& c : last) {  // a kernel leaves out stages that it does not have
      if (c.at[0] == 0 || c.at[s] == 0) continue;
      const double us = (static_cast<double>(c.at[s]) - static_cast<double>(end)) * 1e-3;
      sum += us;
      least = std::min(least, us);
      most = std::max(most, us);
    }
    if (most < least) continue;
    std::snprintf(text, sizeof(text), " %s %.1f/%.1f/%.1f", kStamps[s], least, sum / ctas, most);
    line += text;
  }
  for (int w = 0; w < static_cast<int>(Waited::count); ++w) {
    double sum = 0;
    for (const CtaProfile& c : last) sum += static_cast<double>(c.waited[w]);
    std::snprintf(text, sizeof(text), " wait%d %.0f", w, sum / ctas);
    line += text;
  }
  std::map<std::uint64_t, int> ctas_of;
  for (const CtaProfile& c : last)
    if (c.at[0] != 0) ++ctas_of[c.multiprocessor];
  int crowded = 0;
  for (const auto& [sm, count] : ctas_of) crowded += count > 1 ? 1 : 0;
  std::snprintf(text, sizeof(text), " multiprocessors %zu, %d with more than one CTA,", ctas_of.size(),
                crowded);
  line += text;
  double cycles = 0, ns = 0;
  for (const CtaProfile& c : last) {
    cycles += static_cast<double>(c.cycles);
    ns += static_cast<double>(c.at[static_cast<int>(Stamp::reduced)] - c.at[0]);
  }
  std::snprintf(text, sizeof(text), " clock %.0f MHz", ns > 0 ? 1e3 * cycles / ns : 0.0);
  return line + text;
}

Chain::Chain(int launches, const std::function<void(int, cudaStream_t)>& body) : launches_(launches) {
  cuda_ok(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
  cuda_ok(cudaEventCreate(&begin_), "event");
  cuda_ok(cudaEventCreate(&end_), "event");
  body(0, stream_);  // first use outside the capture: lazy loading, library handles
  cuda_ok(cudaStreamSynchronize(stream_), "first launch");
  cudaGraph_t graph = nullptr;
  cuda_ok(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < launches; ++i) body(i, stream_);
  cuda_ok(cudaStreamEndCapture(stream_, &graph), "capture");
  cuda_ok(cudaGraphInstantiate(&exec_, graph, 0), "instantiate");
  cuda_ok(cudaGraphDestroy(graph), "graph");
  cuda_ok(cudaGraphUpload(exec_, stream_), "upload");
}

Chain::~Chain() {
  cudaStreamSynchronize(stream_);
  cudaGraphExecDestroy(exec_);
  cudaEventDestroy(begin_);
  cudaEventDestroy(end_);
  cudaStreamDestroy(stream_);
}

double Chain::once() {
  cuda_ok(cudaEventRecord(begin_, stream_), "event");
  cuda_ok(cudaGraphLaunch(exec_, stream_), "replay");
  cuda_ok(cudaEventRecord(end_, stream_), "event");
  cuda_ok(cudaEventSynchronize(end_), "replay");
  float ms = 0;
  cuda_ok(cudaEventElapsedTime(&ms, begin_, end_), "event");
  return 1000.0 * static_cast<double>(ms) / launches_;
}

void Chain::run(double milliseconds, std::vector<double>& samples, unsigned& clock_mhz) {
  once();
  const double per_replay = once() * launches_ / 1000.0;
  const int replays = std::max(3, static_cast<int>(milliseconds / per_replay));
  for (int i = 0; i < replays; ++i) samples.push_back(once());
  clock_mhz = sm_clock_mhz();
}

Timing summarize(std::vector<double> samples, unsigned clock_mhz) {
  if (samples.empty()) return {std::nan(""), 0, 0};
  std::sort(samples.begin(), samples.end());
  const auto at = [&](double q) {
    return samples[static_cast<std::size_t>(q * static_cast<double>(samples.size() - 1))];
  };
  return {at(0.5), (at(0.9) - at(0.1)) / at(0.5), clock_mhz};
}

CublasGemm::CublasGemm(bool fp8, std::uint64_t m, std::uint64_t n, std::uint64_t k)
    : workspace_(std::size_t{64} << 20U) {
  const cudaDataType_t type = fp8 ? CUDA_R_8F_E4M3 : CUDA_R_16BF;
  cublas_ok(cublasLtCreate(&handle_), "create");
  cublas_ok(cublasLtMatmulDescCreate(&op_, CUBLAS_COMPUTE_32F, CUDA_R_32F), "operation");
  const cublasOperation_t transposed = CUBLAS_OP_T;
  cublas_ok(cublasLtMatmulDescSetAttribute(op_, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed)),
            "transpose");
  if (fp8) {
    const std::int8_t fast = 1;
    cublas_ok(cublasLtMatmulDescSetAttribute(op_, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof(fast)),
              "accumulation");
  }
  cublas_ok(cublasLtMatrixLayoutCreate(&a_, type, k, n, static_cast<std::int64_t>(k)), "layout");
  cublas_ok(cublasLtMatrixLayoutCreate(&b_, type, k, m, static_cast<std::int64_t>(k)), "layout");
  cublas_ok(cublasLtMatrixLayoutCreate(&d_, CUDA_R_16BF, n, m, static_cast<std::int64_t>(n)), "layout");
  cublasLtMatmulPreference_t preference = nullptr;
  cublas_ok(cublasLtMatmulPreferenceCreate(&preference), "preference");
  const std::size_t bytes = workspace_.size();
  cublas_ok(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                                 sizeof(bytes)),
            "preference");
  found_.resize(8);
  int count = 0;
  if (cublasLtMatmulAlgoGetHeuristic(handle_, op_, a_, b_, d_, d_, preference, 8, found_.data(), &count) !=
      CUBLAS_STATUS_SUCCESS)
    count = 0;
  found_.resize(static_cast<std::size_t>(count));
  cublasLtMatmulPreferenceDestroy(preference);
}

CublasGemm::~CublasGemm() {
  cublasLtMatrixLayoutDestroy(a_);
  cublasLtMatrixLayoutDestroy(b_);
  cublasLtMatrixLayoutDestroy(d_);
  cublasLtMatmulDescDestroy(op_);
  cublasLtDestroy(handle_);
}

int CublasGemm::fastest(const void* w, const void* x, void* d) {
  int best = 0;
  double least = 1e30;
  for (int algorithm = 0; algorithm < algorithms(); ++algorithm) {
    try {
      Chain chain(4, [&](int, cudaStream_t stream) { run(algorithm, w, x, d, stream); });
      chain.once();
      const double t = std::min(chain.once(), chain.once());
      if (t < least) {
        least = t;
        best = algorithm;
      }
    } catch (const Error&) {
      cudaGetLastError();  // an algorithm that does not run is not a candidate
    }
  }
  return best;
}

void CublasGemm::run(int algorithm, const void* w, const void* x, void* d, cudaStream_t stream,
                     const void* addend) {
  const float one = 1.0F;
  const float beta = addend != nullptr ? 1.0F : 0.0F;
  cublas_ok(cublasLtMatmul(handle_, op_, &one, w, a_, x, b_, &beta, addend != nullptr ? addend : d, d_, d, d_,
                           &found_[static_cast<std::size_t>(algorithm)].algo, workspace_.get(),
                           workspace_.size(), stream),
            "matmul");
}

}  // namespace fireq::kernels::bench
