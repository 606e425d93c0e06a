// Writes the fuzzers' first inputs: make_seeds OUT DATA -> OUT/fuzz_TARGET/NAME. Well-formed ones, so that
// the fuzzers begin behind the first checks, and some of the known attacks.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "calib/recipe.hpp"
#include "formats/fireq_folder.hpp"
#include "formats/safetensors.hpp"
#include "formats/statistics.hpp"
#include "formats/statistics_file.hpp"

namespace {

namespace stdfs = std::filesystem;
using namespace fireq::formats;

class Seeds {
 public:
  explicit Seeds(std::string folder) : folder_(std::move(folder)) {}

  void put(const std::string& target, const std::string& name, std::string_view bytes) const {
    const stdfs::path path = stdfs::path(folder_) / ("fuzz_" + target) / name;
    stdfs::create_directories(path.parent_path());
    std::ofstream out(path, std::ios::binary);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    out.close();
    if (!out) throw std::runtime_error("cannot write " + path.string());
  }

 private:
  std::string folder_;
};

std::string read(const stdfs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

void safetensors(const Seeds& seeds) {
  const std::string head = make_safetensors_head(
      std::vector<TensorPlan>{
          {"a", fireq::Dtype::f32, {2, 3}}, {"b", fireq::Dtype::u8, {}}, {"c", fireq::Dtype::bf16, {0, 9}}},
      {{"format", "pt"}});
  seeds.put("safetensors", "file", head + std::string(25, 'x'));
  seeds.put("safetensors", "empty", std::string(8, '\0'));
  // As text behind two bytes of data length (fuzz_safetensors.cpp).
  const auto text = [&](const char* name, unsigned char data, const std::string& header) {
    seeds.put("safetensors", name, std::string(1, static_cast<char>(data)) + std::string(1, '\0') + header);
  };
  text("text", 25, head.substr(8));
  text(
      "twins", 2,
      R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\u0061":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})");
  text("overflow", 0, R"({"a":{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,0]}})");
  text(
      "overlap", 3,
      R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})");
  text("number", 8, R"({"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,-8]}})");
}

void json_files(const Seeds& seeds, const stdfs::path& data) {
  seeds.put(
      "index", "two",
      R"({"metadata":{"total_size":3},"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}})");
  seeds.put("index", "up", R"({"weight_map":{"a":"../x.safetensors"}})");
  seeds.put("index", "absolute", R"({"weight_map":{"a":"/x.safetensors"}})");
  seeds.put("index", "case", R"({"weight_map":{"a":"x.safetensors","b":"X.safetensors"}})");
  for (const auto& entry : stdfs::directory_iterator(data / "tiny")) {
    seeds.put("config", entry.path().filename().string(), read(entry.path() / "config.json"));
  }
  QuantizationConfig config;
  config.recipe_json = R"({"preset":"rtn"})";
  config.source_fingerprint = std::string(32, 'a');
  config.tool_version = "0.1.0";
  seeds.put("quantization_config", "plain", make_config_json("{}", config));
  const auto imported = [&](const char* name, const std::string& quantization) {
    seeds.put("int4_scheme", name, R"({"quantization_config":)" + quantization + "}");
  };
  imported("gptq", R"({"quant_method":"gptq","bits":4,"group_size":128,"desc_act":true,"sym":false,)"
                   R"("checkpoint_format":"gptq_v2","pack_dtype":"int32"})");
  imported("awq", R"({"quant_method":"awq","bits":4,"group_size":-1,"zero_point":true,"version":"gemm"})");
  imported("compressed",
           R"({"quant_method":"compressed-tensors","format":"pack-quantized","config_groups":{"group_0":)"
           R"({"targets":["Linear"],"weights":{"num_bits":4,"type":"int","symmetric":false,)"
           R"("strategy":"group","group_size":64,"actorder":"group"}}},"sparsity_config":{}})");
  config.calibration_fingerprint = std::string(32, 'b');
  config.levels = {0, 0.25F, 1, 2, 3, 4, 5, 448};
  config.layout = WeightLayout::sm90;
  config.kv_cache = config.row_scale_per_row = false;
  config.ignore = {"lm_head"};
  config.fp8 = {"model.embed_tokens"};
  seeds.put("quantization_config", "all", make_config_json(R"({"hidden_size":64})", config));
  for (const char* preset : {"paper", "rtn", "fast"}) {
    seeds.put("recipe", preset, fireq::calib::recipe_to_json(fireq::calib::preset_recipe(preset)));
  }
  seeds.put("recipe", "modules", R"({"ignore":["*.0.*","re:.*up"],"head":"fp8","overrides":[{"match":"*",
      "precision":"fp8","weights":{"search":[-1,1]}}]})");
  seeds.put("recipe", "levels",
            R"({"preset":"rtn","weights":{"levels":[0,1,2,3,4,5,6,7],"search":[-7,2]} /* x */})");
}

void statistics(const Seeds& seeds) {
  CalibrationStatistics all;
  all.meta = {"m", std::string(32, '1'), 1, 1, 7, 1, 2};
  all.layers.resize(1);
  SiteStatistics& site = all.layers[0].site(Site::v);
  site.count = 1;
  site.absmax = {1, 2};
  site.abssum = site.sumsq = site.sum1 = site.sum3 = site.sum4 = {1, 2};
  site.histogram.assign(kHistogramBins, 0);
  site.histogram[17] = 2;
  all.layers[0].k_pair_radius = {3};
  const std::string file = statistics_file_bytes(all, "seed");
  seeds.put("statistics", "file", file);
  // As values and a table of three times their length (fuzz_statistics.cpp): the histogram, zeros elsewhere.
  std::string table =
      R"({"meta":{"format_version":1,"head_dim":2,"kv_heads":1,"layers":1,"model_fingerprint":"m","seed":7,)"
      R"("text_fingerprint":"1","tokens":1,"windows":1},"layers":[{"v":{"channels":2,"absmax":512,"absmean":520,)"
      R"("abssum":536,"sumsq":552,"sum1":568,"sum3":584,"sum4":600,"histogram":616,"count":936},"k_pair_radius":944}]})";
  std::string values(436, '\0');
  values[104] = 2;  // histogram
  values[424] = 1;  // count
  table.resize(3 * values.size(), ' ');
  seeds.put("statistics", "values", values + table);
  all.layers.clear();
  seeds.put("statistics", "none", statistics_file_bytes(all, "seed"));
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  try {
    const Seeds seeds(arguments[1]);
    safetensors(seeds);
    json_files(seeds, arguments[2]);
    statistics(seeds);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "make_seeds: %s\n", error.what());
    return 1;
  }
  return 0;
}
