// quantization_config of a FireQ folder: what is accepted is written again to the same meaning.
#include <cstddef>
#include <cstdint>
#include <string>

#include "formats/fireq_folder.hpp"
#include "tests/fuzz/fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace fireq::formats;
  using fireq::fuzz::require;
  const std::string text(reinterpret_cast<const char*>(data), size);
  QuantizationConfig config;
  if (!fireq::fuzz::accepted([&] { config = parse_quantization_config(text, "config.json"); })) return 0;
  for (std::size_t i = 0; i < config.levels.size(); ++i) {
    require(config.levels[i] >= 0 && config.levels[i] <= 448, "a magnitude out of range");
    require(i == 0 || config.levels[i] > config.levels[i - 1], "magnitudes that do not increase");
  }
  const std::string written = make_config_json(text, config);
  const QuantizationConfig again = parse_quantization_config(written, "written");
  require(again.levels == config.levels && again.layout == config.layout && again.ignore == config.ignore &&
              again.fp8 == config.fp8 && again.kv_cache == config.kv_cache &&
              again.recipe_json == config.recipe_json && again.row_scale_per_row == config.row_scale_per_row,
          "a field changed on the way");
  require(make_config_json(text, again) == written, "the text changed on the way");
  return 0;
}
