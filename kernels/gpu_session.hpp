// Linear layers on a GPU for callers whose data lies in host memory: weights are uploaded and prepacked once,
// tokens travel with each call. The way in for `validate` and `eval`; what counts in microseconds uses
// gemm.hpp itself. Every function returns when the GPU is done. Errors: Error(environment) in a build without
// CUDA, without a GPU and for failing CUDA calls; Error(usage) for operands that break the rules of
// types.hpp.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/gemm_config.hpp"
#include "kernels/types.hpp"

namespace fireq::kernels {

// A weight on the GPU in the sm90 layout, with its row scales and bias.
class GpuLinear {
 public:
  ~GpuLinear();
  GpuLinear(GpuLinear&&) noexcept;
  GpuLinear& operator=(GpuLinear&&) noexcept;
  GpuLinear(const GpuLinear&) = delete;
  GpuLinear& operator=(const GpuLinear&) = delete;

  std::uint64_t rows() const noexcept;
  std::uint64_t cols() const noexcept;

 private:
  friend class GpuSession;
  struct Impl;
  explicit GpuLinear(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// One GPU (the current one) with the memory that launches share. Not for two threads at a time.
class GpuSession {
 public:
  GpuSession();
  ~GpuSession();
  GpuSession(const GpuSession&) = delete;
  GpuSession& operator=(const GpuSession&) = delete;

  const DeviceInfo& device() const noexcept;

  // weight: row layout, host memory. bias: empty or [N]. keep_rows: the row layout stays on the GPU too, for
  // what operands() and dequantized() read from it.
  GpuLinear load(const WeightRef& weight, std::span<const float> bias, bool keep_rows);

  // x [tokens, cols], bf16: uploaded and quantised per token. What the following multiply() take.
  void set_tokens(std::span<const std::uint16_t> x, std::uint64_t tokens, std::uint64_t cols);
  // y [tokens, N], bf16: their product, row scales and bias applied. The output is all NaN before the launch.
  void multiply(const GpuLinear& linear, std::span<std::uint16_t> y);
  // The kernel that multiply() runs for this many tokens.
  GemmConfig config_for(const GpuLinear& linear, std::uint64_t tokens) const;

  // For checks: what lies on the GPU. Buffers are poisoned before they are written.
  struct Tokens {
    std::vector<std::uint8_t> x8;  // [tokens, cols]
    std::vector<float> scale;      // [tokens]
  };
  Tokens tokens() const;
  std::vector<std::uint8_t> tiles(const GpuLinear& linear) const;  // as the GPU prepacked them
  struct Rows {
    std::vector<std::uint8_t> codes, group_scales;  // [N, Kp/2], [N, Kp/128]
  };
  Rows unpacked(const GpuLinear& linear) const;  // the row layout that the GPU makes of the tiles
  // The FP8 operands [N, Kp] as a kernel holds them (dump_operands), and as dequantize_to_fp8 writes them.
  std::vector<std::uint8_t> operands(const GpuLinear& linear, WeightLayout layout,
                                     const GemmConfig& config) const;
  std::vector<std::uint8_t> dequantized(const GpuLinear& linear, WeightLayout layout) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fireq::kernels
