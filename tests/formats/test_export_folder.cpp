// config.json and the record of an exported folder.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "common/error.hpp"
#include "formats/export_folder.hpp"
#include "tests/formats/support.hpp"

namespace fireq::formats {
namespace {

using nlohmann::json;
using test::TempFolder;

TEST(ExportFolder, PlainConfigIsTheSourcesWithAnotherType) {
  const json source = {
      {"model_type", "llama"}, {"x", {1, {{"y", nullptr}}}}, {"quantization_config", {{"a", 1}}}};
  json expected = source;
  expected.erase("quantization_config");
  for (const auto& [dtype, name] : {std::pair{Dtype::bf16, "bfloat16"}, std::pair{Dtype::f16, "float16"},
                                    std::pair{Dtype::f32, "float32"}}) {
    expected["torch_dtype"] = name;
    EXPECT_EQ(json::parse(plain_config_json(source.dump(), dtype)), expected);
  }
  // The key that the source has, or both.
  json newer = source;
  newer["dtype"] = "float16";
  EXPECT_EQ(json::parse(plain_config_json(newer.dump(), Dtype::bf16)).at("dtype"), "bfloat16");
  EXPECT_FALSE(json::parse(plain_config_json(newer.dump(), Dtype::bf16)).contains("torch_dtype"));
  newer["torch_dtype"] = "float16";
  EXPECT_EQ(json::parse(plain_config_json(newer.dump(), Dtype::f32)).at("dtype"), "float32");
  EXPECT_EQ(json::parse(plain_config_json(newer.dump(), Dtype::f32)).at("torch_dtype"), "float32");
  EXPECT_THROW(plain_config_json("[]", Dtype::bf16), Error);
  EXPECT_THROW(plain_config_json("{", Dtype::bf16), Error);
  EXPECT_THROW(plain_config_json("{}", Dtype::i32), Error);
}

TEST(ExportFolder, IgnoreNamesTheHeadAndThePlainLinears) {
  const auto ignored = [](const std::vector<std::string>& names) {
    return json::parse(compressed_tensors_config_json("{}", names)).at("quantization_config").at("ignore");
  };
  EXPECT_EQ(ignored({}), json::array({"lm_head"}));
  EXPECT_EQ(ignored({"a.b", "c"}), json::array({"lm_head", "a.b", "c"}));
  EXPECT_EQ(json::parse(compressed_tensors_config_json("{}", {})).at("torch_dtype"), "bfloat16");
}

TEST(ExportFolder, OnlyARecordMakesAFolderAnExport) {
  const TempFolder folder;
  const std::string path = folder / std::string(kExportFile);
  EXPECT_FALSE(is_export_folder(folder.path()));
  EXPECT_FALSE(is_export_folder(folder / "none"));
  for (const char* text : {"", "{", "[]", "{}", "null", R"({"format": "x"})"}) {
    test::write_bytes(path, text);
    EXPECT_FALSE(is_export_folder(folder.path())) << text;
  }
  ExportRecord record;
  record.format = "hf-dequantized";
  record.recipe_json = R"({"preset":"rtn"})";
  record.source_fingerprint = "abc";
  record.tool_version = "1.2.3";
  record.left_out = {"this", "that"};
  test::write_bytes(path, make_export_record(record));
  EXPECT_TRUE(is_export_folder(folder.path()));
  const json written = json::parse(make_export_record(record));
  EXPECT_EQ(written.at("recipe"), (json{{"preset", "rtn"}}));
  EXPECT_EQ(written.at("left_out"), (json{"this", "that"}));
  EXPECT_EQ(written.at("dtype"), "bfloat16");
}

}  // namespace
}  // namespace fireq::formats
