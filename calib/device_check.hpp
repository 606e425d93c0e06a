// Checks what a device does with the linears of a FireQ folder against the definition (docs/numerics.md): the
// tiles that it prepacks, the operands that its kernels multiply, its activation quantiser, its products. The
// device is behind an interface; nothing here depends on a GPU.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "calib/weights.hpp"
#include "common/progress.hpp"
#include "formats/statistics.hpp"
#include "libquant/quantized_linear.hpp"

namespace fireq::calib {

// One linear as a device holds it, laid open. Buffers are poisoned on the device before they are written.
class LinearProbe {
 public:
  LinearProbe() = default;
  LinearProbe(const LinearProbe&) = delete;
  LinearProbe& operator=(const LinearProbe&) = delete;
  virtual ~LinearProbe() = default;

  virtual std::vector<std::uint8_t> tiles() = 0;  // made on the device from the row layout
  struct Rows {
    std::vector<std::uint8_t> codes, group_scales;
  };
  virtual Rows unpacked() = 0;  // made on the device from those tiles

  // The FP8 operands [N, Kp] as the kernels that run these numbers of tokens hold them, each kernel once, and
  // as other routes of the device make them. visit is called once for each.
  struct Operands {
    std::string kernel;
    std::vector<std::uint8_t> bytes;
  };
  virtual void visit_operands(std::span<const std::uint64_t> tokens,
                              const std::function<void(const Operands&)>& visit) = 0;

  struct Product {
    std::string kernel;
    std::vector<std::uint8_t> x8;   // [tokens, K], the device's own quantisation of x
    std::vector<float> scale;       // [tokens]
    std::vector<std::uint16_t> y;   // [tokens, N], bf16
    std::vector<std::uint16_t> y2;  // of a second run
  };
  virtual Product multiply(std::span<const std::uint16_t> x, std::uint64_t tokens) = 0;
};

class DeviceProbe {
 public:
  DeviceProbe() = default;
  DeviceProbe(const DeviceProbe&) = delete;
  DeviceProbe& operator=(const DeviceProbe&) = delete;
  virtual ~DeviceProbe() = default;
  // bias: empty or [N]. The probe copies both.
  virtual std::unique_ptr<LinearProbe> load(const libquant::QuantizedLinear& weight,
                                            std::span<const float> bias) = 0;
};

struct DeviceCheckOptions {
  std::vector<std::uint64_t> tokens{1, 7, 64, 333};
  // Of a product against double, relative Frobenius: bf16 outputs alone make 1.65e-3, FP8 accumulation adds
  // to it (docs/kernels/README.md). Half as much again with under 1024 outputs, whose roundings, up to 2^-8
  // each, do not average out.
  double tolerance = 2.6e-3;
  // Channel widths of the calibration-like activations (folder's calibration.h5, before folding); null: log-
  // normal widths with outliers.
  const formats::CalibrationStatistics* statistics = nullptr;
  std::uint64_t seed = 0;
  int threads = 0;
};

struct DeviceLinearCheck {
  std::string name;
  std::uint64_t rows = 0, cols = 0;
  std::uint64_t wrong_tile_bytes = 0;      // prepacked, against the CPU's (layout sm90: the folder's) bytes
  std::uint64_t wrong_unpacked_bytes = 0;  // codes and scales after prepack and unpack
  std::uint64_t wrong_token_values = 0;    // FP8 bytes and scales of the device's quantiser
  std::uint64_t unwritten_outputs = 0;     // NaN
  std::uint64_t outputs_that_vary = 0;     // between two runs
  struct Operands {
    std::string kernel;
    std::uint64_t wrong = 0;               // bytes
    std::uint64_t row = 0, col = 0;        // of the first wrong one
    std::uint8_t expected = 0, found = 0;  // there
  };
  std::vector<Operands> operands;
  struct Product {
    std::uint64_t tokens = 0;
    std::string activations;  // "random" or "calibration-like"
    std::string kernel;
    double relative_error = 0;  // Frobenius, against double
    double limit = 0;
  };
  std::vector<Product> products;

  std::uint64_t wrong_operands() const;  // of all kernels together
  const Product& worst_product() const;  // by error over limit
  // What does not hold, in words: empty when all does.
  std::vector<std::string> failures() const;
};

// Every quantised linear of a packed model, in the order of the layers.
std::vector<DeviceLinearCheck> check_device_linears(const WeightSource& packed, DeviceProbe& device,
                                                    const DeviceCheckOptions& options, Progress& progress);

}  // namespace fireq::calib
