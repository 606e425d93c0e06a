// A linear's check as validate and inspect write it.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "calib/validate.hpp"

namespace fireq::apps {

// Keys name, rows, cols, product_rel_error, subnormal_scales; with a reference rel_error, snr_db, worst_group
// too.
nlohmann::json check_json(const calib::LinearCheck& c);

}  // namespace fireq::apps
