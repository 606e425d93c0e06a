// A build without CUDA: the GPU entry points exist and say so.
#include "common/error.hpp"
#include "kernels/activations.hpp"
#include "kernels/bench/bench.hpp"
#include "kernels/gemm.hpp"
#include "kernels/gpu_session.hpp"
#include "kernels/weights.hpp"

namespace fireq::kernels {

namespace {
[[noreturn]] void refuse() {
  throw Error(ErrorKind::environment, "this build has no CUDA kernels")
      .hint("configure with -DFIREQ_WITH_CUDA=ON");
}
}  // namespace

DeviceInfo current_device() {
  refuse();
}
int device_count() noexcept {
  return 0;
}
std::size_t gemm_workspace_bytes(const DeviceInfo&) {
  refuse();
}
std::size_t cublas_scratch_bytes(std::uint64_t, std::uint64_t) {
  refuse();
}
void init_workspace(const Workspace&, Stream) {
  refuse();
}
void gemm_w4a8(const TokensRef&, const WeightRef&, const OutputRef&, const Epilogue&, const GemmOptions&) {
  refuse();
}
void dump_operands(const WeightRef&, const GemmConfig&, std::uint8_t*, const Workspace&, Stream) {
  refuse();
}
void prepack_sm90(const WeightRef&, std::uint8_t*, Stream) {
  refuse();
}
void unpack_sm90(const WeightRef&, std::uint8_t*, std::uint8_t*, Stream) {
  refuse();
}
void dequantize_to_fp8(const WeightRef&, std::uint8_t*, Stream) {
  refuse();
}
void quantize_activations(const Bf16Ref&, std::uint64_t, std::uint64_t, const QuantizedTokens&,
                          const ActivationOptions&) {
  refuse();
}
void rmsnorm_quantize(const NormInput&, std::uint64_t, std::uint64_t, const QuantizedTokens&,
                      const ActivationOptions&) {
  refuse();
}
void silu_mul_quantize(const Bf16Ref&, std::uint64_t, std::uint64_t, const QuantizedTokens&,
                       const ActivationOptions&) {
  refuse();
}

// NOLINTBEGIN(readability-convert-member-functions-to-static): their declarations serve the CUDA build.
struct GpuLinear::Impl {};
GpuLinear::~GpuLinear() = default;
GpuLinear::GpuLinear(GpuLinear&&) noexcept = default;
GpuLinear& GpuLinear::operator=(GpuLinear&&) noexcept = default;
std::uint64_t GpuLinear::rows() const noexcept {
  return 0;
}
std::uint64_t GpuLinear::cols() const noexcept {
  return 0;
}

// Nothing below the constructor is ever reached.
struct GpuSession::Impl {
  DeviceInfo device;
};
GpuSession::GpuSession() {
  refuse();
}
GpuSession::~GpuSession() = default;
const DeviceInfo& GpuSession::device() const noexcept {
  return impl_->device;
}
GpuLinear GpuSession::load(const WeightRef&, std::span<const float>, bool) {
  refuse();
}
void GpuSession::set_tokens(std::span<const std::uint16_t>, std::uint64_t, std::uint64_t) {
  refuse();
}
void GpuSession::multiply(const GpuLinear&, std::span<std::uint16_t>) {
  refuse();
}
GemmConfig GpuSession::config_for(const GpuLinear&, std::uint64_t) const {
  refuse();
}
GpuSession::Tokens GpuSession::tokens() const {
  refuse();
}
std::vector<std::uint8_t> GpuSession::tiles(const GpuLinear&) const {
  refuse();
}
GpuSession::Rows GpuSession::unpacked(const GpuLinear&) const {
  refuse();
}
std::vector<std::uint8_t> GpuSession::operands(const GpuLinear&, WeightLayout, const GemmConfig&) const {
  refuse();
}
std::vector<std::uint8_t> GpuSession::dequantized(const GpuLinear&, WeightLayout) const {
  refuse();
}
// NOLINTEND(readability-convert-member-functions-to-static)

namespace bench {
GemmBenchResult run_gemm_bench(const GemmBenchOptions&, const Print&) {
  refuse();
}
FfnBenchResult run_ffn_bench(const FfnBenchOptions&, const Print&) {
  refuse();
}
}  // namespace bench

}  // namespace fireq::kernels
