#include "apps/device.hpp"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "common/error.hpp"

namespace fireq::apps {
namespace {

using kernels::GpuLinear;
using kernels::GpuSession;

kernels::WeightRef weight_ref(const libquant::QuantizedLinear& q) {
  kernels::WeightRef w;
  w.rows = q.rows;
  w.cols = q.cols;
  w.codes = q.codes.data();
  w.group_scales = q.group_scales.data();
  w.row_scales = q.row_scales.data();
  w.per_tensor = q.row_scales.size() == 1;
  w.levels = q.levels.magnitude;
  return w;
}

class GpuBackend final : public calib::LinearBackend {
 public:
  explicit GpuBackend(GpuSession& gpu) : gpu_(gpu) {}
  void load(std::uint64_t layer, calib::LinearIndex linear, const libquant::QuantizedLinear& weight,
            std::span<const float> bias) override {
    linears_.insert_or_assign({layer, linear}, gpu_.load(weight_ref(weight), bias, false));
  }
  void multiply(std::uint64_t layer, std::span<const calib::LinearIndex> linears,
                std::span<const std::uint16_t> x, std::uint64_t tokens,
                std::span<const std::span<std::uint16_t>> y) override {
    gpu_.set_tokens(x, tokens, x.size() / tokens);
    for (std::size_t i = 0; i < linears.size(); ++i) gpu_.multiply(linears_.at({layer, linears[i]}), y[i]);
  }

 private:
  GpuSession& gpu_;
  std::map<std::pair<std::uint64_t, calib::LinearIndex>, GpuLinear> linears_;
};

class GpuLinearProbe final : public calib::LinearProbe {
 public:
  GpuLinearProbe(GpuSession& gpu, GpuLinear linear) : gpu_(gpu), linear_(std::move(linear)) {}

  std::vector<std::uint8_t> tiles() override { return gpu_.tiles(linear_); }
  Rows unpacked() override {
    GpuSession::Rows rows = gpu_.unpacked(linear_);
    return {std::move(rows.codes), std::move(rows.group_scales)};
  }

  // The kernels that the dispatcher picks for these numbers of tokens; the portable one on both layouts; and
  // the FP8 scratch of the cuBLASLt route.
  void visit_operands(std::span<const std::uint64_t> tokens,
                      const std::function<void(const Operands&)>& visit) override {
    using kernels::GemmConfig;
    using kernels::WeightLayout;
    std::vector<GemmConfig> configs{GemmConfig{}};
    for (const std::uint64_t m : tokens) {
      const GemmConfig config = gpu_.config_for(linear_, m);
      if (std::find(configs.begin(), configs.end(), config) == configs.end()) configs.push_back(config);
    }
    for (const GemmConfig& config : configs)
      visit({to_string(config), gpu_.operands(linear_, WeightLayout::sm90, config)});
    visit({"portable, row layout", gpu_.operands(linear_, WeightLayout::row, GemmConfig{})});
    for (const auto& [layout, name] : {std::pair{WeightLayout::sm90, "dequantised"},
                                       std::pair{WeightLayout::row, "dequantised, row layout"}})
      visit({name, gpu_.dequantized(linear_, layout)});
  }

  Product multiply(std::span<const std::uint16_t> x, std::uint64_t tokens) override {
    Product out;
    gpu_.set_tokens(x, tokens, linear_.cols());
    GpuSession::Tokens quantised = gpu_.tokens();
    out.kernel = to_string(gpu_.config_for(linear_, tokens));
    out.x8 = std::move(quantised.x8);
    out.scale = std::move(quantised.scale);
    out.y.resize(tokens * linear_.rows());
    out.y2.resize(out.y.size());
    gpu_.multiply(linear_, out.y);
    gpu_.multiply(linear_, out.y2);
    return out;
  }

 private:
  GpuSession& gpu_;
  GpuLinear linear_;
};

class GpuProbe final : public calib::DeviceProbe {
 public:
  explicit GpuProbe(GpuSession& gpu) : gpu_(gpu) {}
  std::unique_ptr<calib::LinearProbe> load(const libquant::QuantizedLinear& weight,
                                           std::span<const float> bias) override {
    return std::make_unique<GpuLinearProbe>(gpu_, gpu_.load(weight_ref(weight), bias, true));
  }

 private:
  GpuSession& gpu_;
};

}  // namespace

void add_device_option(CLI::App& app, std::string& device, const std::string& what) {
  app.add_option("--device", device, what)->check(CLI::IsMember({"cpu", "cuda"}))->capture_default_str();
}

std::unique_ptr<GpuSession> open_device(const std::string& device) {
  if (device != "cuda") return nullptr;
  try {
    return std::make_unique<GpuSession>();
  } catch (Error& e) {
    if (e.hint().empty()) e.hint("run without --device cuda to stay on the CPU");
    throw;
  }
}

nlohmann::json device_json(const GpuSession* gpu) {
  if (gpu == nullptr) return {{"kind", "cpu"}};
  const kernels::DeviceInfo& info = gpu->device();
  return {{"kind", "cuda"},
          {"name", info.name},
          {"compute_capability", info.compute_capability},
          {"multiprocessors", info.multiprocessors}};
}

std::unique_ptr<calib::LinearBackend> make_backend(GpuSession& gpu) {
  return std::make_unique<GpuBackend>(gpu);
}
std::unique_ptr<calib::DeviceProbe> make_probe(GpuSession& gpu) {
  return std::make_unique<GpuProbe>(gpu);
}

}  // namespace fireq::apps
