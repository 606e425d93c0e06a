// A device that is the kernels' CPU twin: what the forward pass and the device checks see of a GPU, without
// one. Faults can be planted.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "calib/device_check.hpp"
#include "calib/linear_backend.hpp"
#include "kernels/cpu_twin.hpp"
#include "libquant/packing.hpp"

namespace fireq::test {

struct TwinLinear {
  libquant::QuantizedLinear q;
  std::vector<float> bias;

  kernels::WeightRef ref() const {
    kernels::WeightRef w;
    w.rows = q.rows;
    w.cols = q.cols;
    w.codes = q.codes.data();
    w.group_scales = q.group_scales.data();
    w.row_scales = q.row_scales.data();
    w.per_tensor = q.row_scales.size() == 1 && q.rows != 1;
    w.levels = q.levels.magnitude;
    return w;
  }
};

struct TwinTokens {
  std::vector<std::uint8_t> x8;
  std::vector<float> scale;
};

inline TwinTokens twin_quantize(std::span<const std::uint16_t> x, std::uint64_t tokens, std::uint64_t cols) {
  TwinTokens t{std::vector<std::uint8_t>(tokens * cols), std::vector<float>(tokens)};
  kernels::cpu::quantize_activations({x.data(), cols}, tokens, cols, {t.x8.data(), cols, t.scale.data()});
  return t;
}

inline void twin_multiply(const TwinLinear& l, const TwinTokens& t, std::span<std::uint16_t> y) {
  kernels::Epilogue epilogue;
  if (!l.bias.empty()) epilogue.bias = l.bias.data();
  std::fill(y.begin(), y.end(), std::uint16_t{0x7fc1});
  kernels::cpu::gemm_w4a8({t.x8.data(), t.scale.data(), t.scale.size(), l.q.cols}, l.ref(),
                          {y.data(), l.q.rows}, epilogue, 2);
}

class TwinBackend : public calib::LinearBackend {
 public:
  void load(std::uint64_t layer, calib::LinearIndex linear, const libquant::QuantizedLinear& weight,
            std::span<const float> bias) override {
    ++loads;
    linears_[{layer, linear}] = {weight, {bias.begin(), bias.end()}};
  }
  void multiply(std::uint64_t layer, std::span<const calib::LinearIndex> linears,
                std::span<const std::uint16_t> x, std::uint64_t tokens,
                std::span<const std::span<std::uint16_t>> y) override {
    rows.push_back(tokens);
    const TwinTokens t = twin_quantize(x, tokens, x.size() / tokens);
    for (std::size_t i = 0; i < linears.size(); ++i) {
      twin_multiply(linears_.at({layer, linears[i]}), t, y[i]);
      if (after_multiply) after_multiply(layer, linears[i], y[i]);
    }
  }

  std::uint64_t loads = 0;
  std::vector<std::uint64_t> rows;  // of each multiply
  std::function<void(std::uint64_t, calib::LinearIndex, std::span<std::uint16_t>)> after_multiply;

 private:
  std::map<std::pair<std::uint64_t, std::size_t>, TwinLinear> linears_;
};

// What a planted fault may change before the check sees it.
struct TwinFaults {
  std::function<void(std::vector<std::uint8_t>&)> tiles = {}, operands = {};
  std::function<void(calib::LinearProbe::Rows&)> unpacked = {};
  std::function<void(calib::LinearProbe::Product&)> product = {};
};

class TwinProbe : public calib::DeviceProbe {
 public:
  explicit TwinProbe(TwinFaults f = {}) : faults(std::move(f)) {}
  std::unique_ptr<calib::LinearProbe> load(const libquant::QuantizedLinear& weight,
                                           std::span<const float> bias) override {
    return std::make_unique<Linear>(TwinLinear{weight, {bias.begin(), bias.end()}}, *this);
  }

  TwinFaults faults;
  std::vector<std::uint64_t> multiplied;  // tokens of each product

 private:
  class Linear : public calib::LinearProbe {
   public:
    Linear(TwinLinear l, TwinProbe& owner) : linear_(std::move(l)), owner_(owner) {}
    std::vector<std::uint8_t> tiles() override {
      std::vector<std::uint8_t> out = libquant::pack_sm90(linear_.q);
      if (owner_.faults.tiles) owner_.faults.tiles(out);
      return out;
    }
    Rows unpacked() override {
      libquant::QuantizedLinear q = linear_.q;
      q.codes.clear();
      q.group_scales.clear();
      libquant::unpack_sm90(libquant::pack_sm90(linear_.q), q);
      Rows out{q.codes, q.group_scales};
      if (owner_.faults.unpacked) owner_.faults.unpacked(out);
      return out;
    }
    void visit_operands(std::span<const std::uint64_t> /*tokens*/,
                        const std::function<void(const Operands&)>& visit) override {
      Operands out{"twin", std::vector<std::uint8_t>(linear_.q.rows * linear_.q.padded_cols())};
      kernels::cpu::dequantize_to_fp8(linear_.ref(), out.bytes, 2);
      visit(out);
      out.kernel = "twin again";
      if (owner_.faults.operands) owner_.faults.operands(out.bytes);
      visit(out);
    }
    Product multiply(std::span<const std::uint16_t> x, std::uint64_t tokens) override {
      owner_.multiplied.push_back(tokens);
      const TwinTokens t = twin_quantize(x, tokens, linear_.q.cols);
      Product out{"twin", t.x8, t.scale, std::vector<std::uint16_t>(tokens * linear_.q.rows), {}};
      twin_multiply(linear_, t, out.y);
      out.y2 = out.y;
      if (owner_.faults.product) owner_.faults.product(out);
      return out;
    }

   private:
    TwinLinear linear_;
    TwinProbe& owner_;
  };
};

}  // namespace fireq::test
