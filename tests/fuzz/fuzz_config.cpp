// config.json of a model: what is accepted obeys what the forward pass relies on.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>

#include "formats/model_config.hpp"
#include "tests/fuzz/fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using fireq::fuzz::require;
  const std::string text(reinterpret_cast<const char*>(data), size);
  fireq::formats::ModelConfig config;
  if (!fireq::fuzz::accepted([&] { config = fireq::formats::parse_model_config(text, "config.json"); }))
    return 0;
  constexpr std::uint64_t kLargest = (std::uint64_t{1} << 31U) - 1;
  for (const std::uint64_t count : {config.hidden, config.ffn, config.layers, config.heads, config.kv_heads,
                                    config.head_dim, config.vocab, config.context, config.q_rows()}) {
    require(count >= 1 && count <= kLargest, "a count out of range");
  }
  require(config.heads % config.kv_heads == 0, "heads that do not divide");
  require(config.head_dim % 2 == 0, "an odd head_dim");
  require(config.sliding_window.size() == config.layers, "a window for each layer");
  require(std::isfinite(config.rms_eps) && config.rms_eps > 0, "rms_norm_eps");
  require(std::isfinite(config.rope.theta) && config.rope.theta > 0, "rope_theta");
  if (config.head_dim > 4096) return 0;  // allocates in proportion
  require(fireq::formats::rope_inverse_frequencies(config).size() == config.head_dim / 2, "frequencies");
  return 0;
}
