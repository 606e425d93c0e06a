#include "apps/linear_check_json.hpp"

#include <cmath>
#include <nlohmann/json.hpp>

#include "calib/recipe.hpp"

namespace fireq::apps {

nlohmann::json check_json(const calib::LinearCheck& c) {
  nlohmann::json j = {{"name", c.name},
                      {"rows", c.rows},
                      {"cols", c.cols},
                      {"precision", calib::precision_name(c.precision)},
                      {"product_rel_error", c.product_relative_error},
                      {"subnormal_scales", c.subnormal_scales}};
  if (c.relative_error) {
    j["rel_error"] = *c.relative_error;
    j["snr_db"] = nullptr;  // infinite without an error
    if (std::isfinite(*c.snr_db)) j["snr_db"] = *c.snr_db;
    j["worst_group"] = {{"row", c.worst_group->row},
                        {"group", c.worst_group->group},
                        {"rel_error", c.worst_group->relative_error}};
  }
  return j;
}

}  // namespace fireq::apps
