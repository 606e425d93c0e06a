// The one WeightSource: a checkpoint folder, original or FireQ. Not for use outside calib.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "calib/int4_weights.hpp"
#include "calib/weights.hpp"

namespace fireq::calib {

class FolderWeights final : public WeightSource {
 public:
  FolderWeights(const std::string& folder, formats::CheckpointReader::Output output);

  const formats::ModelConfig& config() const noexcept override { return config_; }
  const formats::CheckpointReader& reader() const noexcept override { return reader_; }
  bool packed() const noexcept override { return quantization_.has_value(); }
  LayerWeights load_layer(std::uint64_t layer, int threads) const override;
  LayerWeights load_unquantized(std::uint64_t layer, int threads) const override;
  void embed(std::span<const std::int32_t> ids, std::span<float> out) const override;
  std::vector<float> final_norm() const override;
  void head_rows(std::uint64_t begin, std::uint64_t count, std::span<float> out) const override;
  libquant::QuantizedLinear quantized(std::uint64_t layer, std::size_t linear) const override;
  const formats::QuantizationConfig* quantization() const noexcept override {
    return quantization_ ? &*quantization_ : nullptr;
  }
  const formats::Int4Scheme* imported() const noexcept override {
    return import_ ? &import_->scheme() : nullptr;
  }

 private:
  static constexpr const char* kEmbedding = "model.embed_tokens.weight";
  static constexpr const char* kFinalNorm = "model.norm.weight";
  static constexpr const char* kHead = "lm_head.weight";

  struct Source {
    std::string name;
    std::uint64_t begin = 0;  // first row
    std::uint64_t rows = 0;   // of the whole tensor
  };

  void check_tensors() const;
  void check_tensor(const std::string& name, std::vector<std::uint64_t> shape) const;
  Source source_of(std::uint64_t layer, std::size_t linear) const;
  bool is_packed(const std::string& module) const;  // in 4 bits
  bool is_fp8(const std::string& module) const;
  bool is_imported(const std::string& module) const { return import_ && import_->holds(module); }
  std::vector<float> values(const std::string& name, std::uint64_t begin, std::uint64_t count,
                            int threads) const;
  std::vector<float> vector(const std::string& name) const;
  LayerWeights load(std::uint64_t layer, bool operands, int threads) const;
  LinearWeights load_linear(std::uint64_t layer, std::size_t linear, bool operands, int threads) const;
  // weight and row_scale of a packed linear (weights_packed.cpp).
  void load_operands(std::uint64_t layer, std::size_t linear, int threads, LinearWeights& out) const;
  void load_fp8(const std::string& module, int threads, LinearWeights& out) const;

  formats::CheckpointReader reader_;
  formats::ModelConfig config_;
  std::optional<formats::QuantizationConfig> quantization_;
  std::optional<Int4Weights> import_;  // quantised by another program
  std::optional<Int4Table> import_head_;
};

}  // namespace fireq::calib
