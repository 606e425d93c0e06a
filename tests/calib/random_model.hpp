// A random model on disk for tests: a Hugging Face folder of any family and shape, values drawn from a seed.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "tests/support/temp_folder.hpp"

namespace fireq::testing_support {

struct RandomModel {
  std::string model_type = "llama";  // llama, mistral, qwen2, qwen3
  std::uint64_t hidden = 48, ffn = 80, layers = 2, heads = 4, kv_heads = 2, head_dim = 12, vocab = 96,
                context = 256;
  std::uint64_t sliding_window = 0;  // mistral
  bool tied = false;
  bool attention_bias = false;  // llama: q, k, v, o
  bool mlp_bias = false;
  std::string dtype = "F32";  // F32, F16, BF16
  std::uint64_t seed = 1;
};

// Writes config.json and model.safetensors below `folder`. Some input channels are outliers, as in real
// models.
void write_random_model(const std::filesystem::path& folder, const RandomModel& model);

}  // namespace fireq::testing_support
