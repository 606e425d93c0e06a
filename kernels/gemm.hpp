// y = x8 w8^T on the GPU, straight from the packed bytes of a checkpoint: one entry for every number of
// tokens. Errors: Error(usage) for operands that break the rules of types.hpp, Error(environment) for a
// failing CUDA call or a build without CUDA.
#pragma once

#include <optional>
#include <string>

#include "kernels/gemm_config.hpp"
#include "kernels/profile.hpp"
#include "kernels/types.hpp"

namespace fireq::kernels {

// Device memory that launches on one stream share; kernels leave it as init_workspace made it. Two streams
// need two.
struct Workspace {
  void* data = nullptr;  // 256-byte aligned
  std::size_t bytes = 0;
};

struct GemmOptions {
  Stream stream = nullptr;
  Workspace workspace;
  // Programmatic dependent launch: the kernel may start before the one launched before it on the stream has
  // ended. It reads weights (tiles, row scales, bias) at once, so the kernel before must not write those;
  // activations, residual and output wait.
  bool programmatic = false;
  std::optional<GemmConfig> config;  // instead of the heuristic's choice
  // For benches: device memory, one entry a CTA of the launch; runs the kernel's profiled
  // variant. Route::decode and Route::prefill only.
  CtaProfile* profile = nullptr;
};

// Bytes of workspace that any gemm_w4a8 on this device may need, without the scratch of Route::cublas.
std::size_t gemm_workspace_bytes(const DeviceInfo& device);
// Scratch of Route::cublas for an [N, K] weight, placed behind gemm_workspace_bytes in the same workspace.
std::size_t cublas_scratch_bytes(std::uint64_t rows, std::uint64_t cols);
void init_workspace(const Workspace& workspace, Stream stream);

void gemm_w4a8(const TokensRef& x, const WeightRef& w, const OutputRef& y, const Epilogue& epilogue,
               const GemmOptions& options);

// Writes the operands that a configuration's kernel multiplies, as it holds them in registers, to out8 [N,
// Kp]: what `validate` compares bit by bit with the definition. Only for Route::decode, Route::prefill and
// Route::portable.
void dump_operands(const WeightRef& w, const GemmConfig& config, std::uint8_t* out8,
                   const Workspace& workspace, Stream stream);

}  // namespace fireq::kernels
