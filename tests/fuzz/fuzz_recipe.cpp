// Recipes: refused as usage errors, or complete and stable when written.
#include <cstddef>
#include <cstdint>
#include <string>

#include "calib/recipe.hpp"
#include "tests/fuzz/fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace fireq::calib;
  const std::string text(reinterpret_cast<const char*>(data), size);
  Recipe recipe;
  if (!fireq::fuzz::accepted([&] { recipe = parse_recipe(text, "recipe.json"); }, fireq::ErrorKind::usage)) {
    return 0;
  }
  const std::string written = recipe_to_json(recipe);
  fireq::fuzz::require(recipe_to_json(parse_recipe(written, "written")) == written, "the recipe changed");
  return 0;
}
