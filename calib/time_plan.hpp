// How long a run will take on this machine, before it begins. The work of every stage is counted in
// multiply-adds, weights loaded and weights rounded; what one of each takes is measured on the model's first
// layer, in about the time of reading two layers. An estimate: it knows nothing of other programs, of a disk
// that is slower than the first layer's pages, nor of memory that is short.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "calib/plan.hpp"
#include "calib/quantize_job.hpp"
#include "calib/weights.hpp"

namespace fireq::calib {

struct StageTime {
  std::string stage;  // as progress names it
  double seconds = 0;
};

struct TimePlan {
  std::vector<StageTime> stages;  // in the run's order, those that are there
  double measuring = 0;           // seconds that measuring the rates took
  double total() const noexcept;
};

// Of quantize_model with these options, with `goal` planned before it where one is given, and the text check.
// nullopt where the first layer cannot be read or run: the run itself will say why.
std::optional<TimePlan> plan_time(const WeightSource& source, const QuantizeOptions& options,
                                  const PrecisionGoal& goal);

}  // namespace fireq::calib
