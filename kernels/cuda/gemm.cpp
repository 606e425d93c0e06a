// The one entry: checks operands, asks the heuristic, launches.
#include "kernels/gemm.hpp"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/kernels.hpp"
#include "kernels/cuda/runtime.hpp"

namespace fireq::kernels {

namespace {

void check_aligned(const void* p, std::uintptr_t bytes, const char* what) {
  if (p == nullptr || reinterpret_cast<std::uintptr_t>(p) % bytes != 0)
    throw Error(ErrorKind::usage,
                std::string(what) + " must be " + std::to_string(bytes) + "-byte aligned memory");
}

void check_weight(const WeightRef& w) {
  constexpr std::uint64_t kMost = std::uint64_t{1} << 30U;
  if (w.rows == 0 || w.cols == 0 || w.rows > kMost || w.cols > kMost || w.row_tiles() * w.groups() > kMost)
    throw Error(ErrorKind::usage, "the weight's shape is empty or too large for the kernels")
        .found(std::to_string(w.rows) + " x " + std::to_string(w.cols));
  if (w.layout == WeightLayout::sm90) {
    check_aligned(w.tiles, 16, "weight tiles");
  } else {
    check_aligned(w.codes, 4, "weight codes");
    check_aligned(w.group_scales, 1, "group scales");
  }
  check_aligned(w.row_scales, 4, "row scales");
  for (const float level : w.levels)
    if (!(level >= 0.0F && level <= 448.0F)) throw Error(ErrorKind::usage, "levels must lie in 0 .. 448");
}

void check_operands(const GemmProblem& problem) {
  const TokensRef& x = problem.x;
  check_weight(problem.w);
  if (x.tokens == 0 || x.tokens > std::uint64_t{1} << 21U)
    throw Error(ErrorKind::usage, "number of tokens")
        .expected("1 .. 2097152")
        .found(std::to_string(x.tokens));
  if (x.pitch < problem.w.cols || x.pitch % 16 != 0)
    throw Error(ErrorKind::usage, "pitch of the activations")
        .expected("a multiple of 16, at least " + std::to_string(problem.w.cols))
        .found(std::to_string(x.pitch));
  check_aligned(x.x8, 16, "activations");
  check_aligned(x.scale, 4, "token scales");
  check_aligned(problem.y.data, 2, "output");
  if (problem.y.pitch < problem.w.rows ||
      (problem.epilogue.residual != nullptr && problem.epilogue.residual_pitch < problem.w.rows))
    throw Error(ErrorKind::usage, "pitch of the output or residual").expected("at least N");
}

void check_workspace(const Workspace& workspace, std::size_t need) {
  check_aligned(workspace.data, 256, "workspace");
  if (workspace.bytes < need)
    throw Error(ErrorKind::usage, "workspace too small")
        .expected(std::to_string(need) + " bytes")
        .found(std::to_string(workspace.bytes));
}

// Properties do not change while a process runs; a query costs tens of microseconds.
const DeviceInfo& cached_device() {
  thread_local int cached = -1;
  thread_local DeviceInfo info;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "device query");
  if (device != cached) {
    info = current_device();
    cached = device;
  }
  return info;
}

void run(const GemmProblem& problem, const GemmOptions& options) {
  const DeviceInfo& device = cached_device();
  const WeightRef& w = problem.w;
  const GemmConfig config = options.config
                                ? *options.config
                                : choose_gemm(device, w.layout, problem.x.tokens, w.rows, w.cols).config;
  const bool hopper = config.route == Route::decode || config.route == Route::prefill;
  if (hopper && (device.compute_capability != 90 || w.layout != WeightLayout::sm90))
    throw Error(ErrorKind::usage, to_string(config) + " needs an sm_90 device and the sm90 layout");
  switch (config.route) {
    case Route::portable:
      return launch_portable(problem, options);
    case Route::decode:
      if (problem.x.tokens >
          (config.token_tile == 64 && one_block_a_cluster(config) ? kMostDecodeTokens : config.token_tile))
        throw Error(ErrorKind::usage, "more tokens than the configuration's tile")
            .expected(to_string(config))
            .found(std::to_string(problem.x.tokens));
      check_workspace(options.workspace, decode_workspace_bytes(device.multiprocessors));
      return launch_decode(problem, config, device.multiprocessors, options);
    case Route::prefill:
      check_workspace(options.workspace, prefill_workspace_bytes(device.multiprocessors));
      return launch_prefill(problem, config, device.multiprocessors, options);
    case Route::cublas: {
      const std::size_t base = gemm_workspace_bytes(device);
      check_workspace(options.workspace, base + cublas_scratch_bytes(w.rows, w.cols));
      return launch_cublas(problem, static_cast<std::byte*>(options.workspace.data) + base,
                           options.workspace.bytes - base, options);
    }
  }
}

}  // namespace

std::size_t gemm_workspace_bytes(const DeviceInfo& device) {
  const std::size_t most = std::max(decode_workspace_bytes(device.multiprocessors),
                                    prefill_workspace_bytes(device.multiprocessors));
  return (most + 255) / 256 * 256;
}

void init_workspace(const Workspace& workspace, Stream stream) {
  check_cuda(cudaMemsetAsync(workspace.data, 0xff, workspace.bytes, as_stream(stream)), "workspace");
}

void gemm_w4a8(const TokensRef& x, const WeightRef& w, const OutputRef& y, const Epilogue& epilogue,
               const GemmOptions& options) {
  const GemmProblem problem{x, w, y, epilogue};
  check_operands(problem);
  run(problem, options);
}

void dump_operands(const WeightRef& w, const GemmConfig& config, std::uint8_t* out8,
                   const Workspace& workspace, Stream stream) {
  check_weight(w);
  check_aligned(out8, 4, "operand dump");
  if (config.route == Route::cublas)
    throw Error(ErrorKind::usage, "the cuBLASLt route has no fragments to dump");
  // One token of zeros: the kernels run as always, their product is thrown away.
  const std::size_t row_bytes = w.padded_cols();
  const std::size_t bytes = row_bytes + 256 + w.rows * 2;
  void* memory = nullptr;
  check_cuda(cudaMallocAsync(&memory, bytes, as_stream(stream)), "operand dump");
  auto* base = static_cast<std::uint8_t*>(memory);
  check_cuda(cudaMemsetAsync(memory, 0, bytes, as_stream(stream)), "operand dump");
  const TokensRef x{base, reinterpret_cast<const float*>(base + row_bytes), 1, row_bytes};
  const OutputRef y{reinterpret_cast<std::uint16_t*>(base + row_bytes + 256), w.rows};
  const Epilogue epilogue;
  GemmOptions options;
  options.stream = stream;
  options.workspace = workspace;
  options.config = config;
  run(GemmProblem{x, w, y, epilogue, out8}, options);
  check_cuda(cudaFreeAsync(memory, as_stream(stream)), "operand dump");
}

}  // namespace fireq::kernels
