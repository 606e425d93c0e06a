#include "kernels/gpu_session.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "common/checked.hpp"
#include "kernels/activations.hpp"
#include "kernels/cuda/runtime.hpp"
#include "kernels/device_memory.hpp"
#include "kernels/gemm.hpp"
#include "kernels/weights.hpp"

namespace fireq::kernels {

namespace {

constexpr int kPoison = 0xff;  // NaN in bf16, FP8 and FP32; no group scale; codes of no "int4" weight

template <class T>
DeviceBuffer<T> upload(const T* data, std::uint64_t count, const char* what) {
  DeviceBuffer<T> buffer(count);
  check_cuda(cudaMemcpy(buffer.get(), data, count * sizeof(T), cudaMemcpyHostToDevice), what);
  return buffer;
}

void wait(const char* what) {
  check_cuda(cudaGetLastError(), what);
  check_cuda(cudaDeviceSynchronize(), what);
}

// Grows and never shrinks: sizes alternate between the layers' widths.
template <class T>
T* reserve(DeviceBuffer<T>& buffer, std::uint64_t count) {
  if (buffer.size() < count) buffer = DeviceBuffer<T>(count);
  return buffer.get();
}

void require_size(std::uint64_t found, std::uint64_t expected, const char* what) {
  if (found != expected)
    throw Error(ErrorKind::internal, std::string(what) + " of another size")
        .expected(std::to_string(expected))
        .found(std::to_string(found));
}

}  // namespace

struct GpuLinear::Impl {
  WeightRef row, sm90;  // device memory; row.codes null unless kept
  DeviceBuffer<std::uint8_t> codes, group_scales, tiles;
  DeviceBuffer<float> row_scales, bias;

  const WeightRef& weight(WeightLayout layout) const {
    if (layout == WeightLayout::sm90) return sm90;
    if (row.codes == nullptr) throw Error(ErrorKind::internal, "the row layout was not kept on the GPU");
    return row;
  }
};

GpuLinear::GpuLinear(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
GpuLinear::~GpuLinear() = default;
GpuLinear::GpuLinear(GpuLinear&&) noexcept = default;
GpuLinear& GpuLinear::operator=(GpuLinear&&) noexcept = default;
std::uint64_t GpuLinear::rows() const noexcept {
  return impl_->sm90.rows;
}
std::uint64_t GpuLinear::cols() const noexcept {
  return impl_->sm90.cols;
}

struct GpuSession::Impl {
  DeviceInfo device;
  DeviceBuffer<std::uint8_t> workspace_memory;
  Workspace workspace;
  DeviceBuffer<std::uint16_t> x, y;
  DeviceBuffer<std::uint8_t> x8;
  DeviceBuffer<float> scale;
  std::uint64_t token_count = 0, width = 0, pitch = 0;  // of what set_tokens() brought
};

GpuSession::GpuSession() : impl_(std::make_unique<Impl>()) {
  if (device_count() == 0)
    throw Error(ErrorKind::environment, "no CUDA device was found")
        .expected("an NVIDIA GPU of compute capability 8.0 or higher, and its driver");
  impl_->device = current_device();
  if (impl_->device.compute_capability < 80)
    throw Error(ErrorKind::environment, "the GPU is too old for the kernels")
        .expected("compute capability 8.0 or higher")
        .found(impl_->device.name + ", " + std::to_string(impl_->device.compute_capability / 10) + "." +
               std::to_string(impl_->device.compute_capability % 10));
  impl_->workspace_memory = DeviceBuffer<std::uint8_t>(gemm_workspace_bytes(impl_->device));
  impl_->workspace = {impl_->workspace_memory.get(), impl_->workspace_memory.size()};
  init_workspace(impl_->workspace, nullptr);
  wait("workspace");
}
GpuSession::~GpuSession() = default;

const DeviceInfo& GpuSession::device() const noexcept {
  return impl_->device;
}

GpuLinear GpuSession::load(const WeightRef& weight, std::span<const float> bias, bool keep_rows) {
  if (weight.layout != WeightLayout::row) throw Error(ErrorKind::internal, "weights are loaded by rows");
  if (!bias.empty()) require_size(bias.size(), weight.rows, "a bias");
  auto linear = std::make_unique<GpuLinear::Impl>();
  linear->codes =
      upload(weight.codes, checked_mul(weight.rows, weight.padded_cols() / 2, "codes"), "weight codes");
  linear->group_scales =
      upload(weight.group_scales, checked_mul(weight.rows, weight.groups(), "scales"), "group scales");
  linear->row_scales = upload(weight.row_scales, weight.per_tensor ? 1 : weight.rows, "row scales");
  if (!bias.empty()) linear->bias = upload(bias.data(), bias.size(), "bias");
  linear->tiles = DeviceBuffer<std::uint8_t>(weight.tile_bytes());
  linear->tiles.fill(kPoison);

  linear->row = weight;
  linear->row.codes = linear->codes.get();
  linear->row.group_scales = linear->group_scales.get();
  linear->row.row_scales = linear->row_scales.get();
  linear->sm90 = linear->row;
  linear->sm90.layout = WeightLayout::sm90;
  linear->sm90.codes = nullptr;
  linear->sm90.group_scales = nullptr;
  linear->sm90.tiles = linear->tiles.get();
  prepack_sm90(linear->row, linear->tiles.get(), nullptr);
  wait("prepack");
  if (!keep_rows) {
    linear->row.codes = nullptr;
    linear->row.group_scales = nullptr;
    linear->codes = {};
    linear->group_scales = {};
  }
  return GpuLinear(std::move(linear));
}

void GpuSession::set_tokens(std::span<const std::uint16_t> x, std::uint64_t tokens, std::uint64_t cols) {
  Impl& s = *impl_;
  require_size(x.size(), checked_mul(tokens, cols, "activations"), "activations");
  s.token_count = tokens;
  s.width = cols;
  s.pitch = checked_round_up(cols, 16, "activations");
  std::uint16_t* from = reserve(s.x, x.size());
  std::uint8_t* x8 = reserve(s.x8, checked_mul(tokens, s.pitch, "activations"));
  float* scale = reserve(s.scale, tokens);
  check_cuda(cudaMemcpy(from, x.data(), x.size_bytes(), cudaMemcpyHostToDevice), "activations");
  s.x8.fill(kPoison);
  s.scale.fill(kPoison);
  quantize_activations({from, cols}, tokens, cols, {x8, s.pitch, scale}, {});
  wait("activation quantiser");
}

GemmConfig GpuSession::config_for(const GpuLinear& linear, std::uint64_t tokens) const {
  const WeightRef& w = linear.impl_->sm90;
  const GemmConfig config = choose_gemm(impl_->device, w.layout, tokens, w.rows, w.cols).config;
  // The cuBLASLt route has rules of its own on shapes, scales and bias; here every layer must run.
  return config.route == Route::cublas ? GemmConfig{} : config;
}

void GpuSession::multiply(const GpuLinear& linear, std::span<std::uint16_t> y) {
  Impl& s = *impl_;
  const GpuLinear::Impl& l = *linear.impl_;
  require_size(l.sm90.cols, s.width, "activations");
  require_size(y.size(), checked_mul(s.token_count, l.sm90.rows, "outputs"), "outputs");
  std::uint16_t* out = reserve(s.y, y.size());
  s.y.fill(kPoison);
  Epilogue epilogue;
  epilogue.bias = l.bias.get();
  GemmOptions options;
  options.workspace = s.workspace;
  options.config = config_for(linear, s.token_count);
  gemm_w4a8({s.x8.get(), s.scale.get(), s.token_count, s.pitch}, l.sm90, {out, l.sm90.rows}, epilogue,
            options);
  wait("GEMM");
  check_cuda(cudaMemcpy(y.data(), out, y.size_bytes(), cudaMemcpyDeviceToHost), "outputs");
}

GpuSession::Tokens GpuSession::tokens() const {
  const Impl& s = *impl_;
  Tokens out;
  out.x8.resize(s.token_count * s.width);
  out.scale.resize(s.token_count);
  check_cuda(cudaMemcpy2D(out.x8.data(), s.width, s.x8.get(), s.pitch, s.width, s.token_count,
                          cudaMemcpyDeviceToHost),
             "quantised activations");
  check_cuda(
      cudaMemcpy(out.scale.data(), s.scale.get(), s.token_count * sizeof(float), cudaMemcpyDeviceToHost),
      "token scales");
  return out;
}

std::vector<std::uint8_t> GpuSession::tiles(const GpuLinear& linear) const {
  return linear.impl_->tiles.download();
}

GpuSession::Rows GpuSession::unpacked(const GpuLinear& linear) const {
  const WeightRef& w = linear.impl_->sm90;
  DeviceBuffer<std::uint8_t> codes(w.rows * (w.padded_cols() / 2));
  DeviceBuffer<std::uint8_t> scales(w.rows * w.groups());
  codes.fill(kPoison);
  scales.fill(kPoison);
  unpack_sm90(w, codes.get(), scales.get(), nullptr);
  wait("unpack");
  return {codes.download(), scales.download()};
}

std::vector<std::uint8_t> GpuSession::operands(const GpuLinear& linear, WeightLayout layout,
                                               const GemmConfig& config) const {
  const WeightRef& w = linear.impl_->weight(layout);
  DeviceBuffer<std::uint8_t> out(checked_mul(w.rows, w.padded_cols(), "operands"));
  out.fill(kPoison);
  dump_operands(w, config, out.get(), impl_->workspace, nullptr);
  wait("operand dump");
  return out.download();
}

std::vector<std::uint8_t> GpuSession::dequantized(const GpuLinear& linear, WeightLayout layout) const {
  const WeightRef& w = linear.impl_->weight(layout);
  DeviceBuffer<std::uint8_t> out(checked_mul(w.rows, w.padded_cols(), "operands"));
  out.fill(kPoison);
  dequantize_to_fp8(w, out.get(), nullptr);
  wait("dequantise");
  return out.download();
}

}  // namespace fireq::kernels
