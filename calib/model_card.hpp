// README.md of a FireQ folder: what it is, how it was made, how to use it.
#pragma once

#include <string>

#include "calib/quantize_job.hpp"
#include "formats/fireq_folder.hpp"
#include "formats/model_config.hpp"

namespace fireq::calib {

// Of content alone, no path or date: the same input and recipe give the same text. calibration: null where
// the run had statistics or nothing.
std::string model_card(const formats::ModelConfig& model, const QuantizePlan& plan, const Recipe& recipe,
                       const formats::QuantizationConfig& quantization, const Windows* calibration);

}  // namespace fireq::calib
