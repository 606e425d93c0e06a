// eval --tasks: zero-shot tasks, scored by likelihood.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "apps/commands.hpp"
#include "calib/forward.hpp"
#include "calib/weights.hpp"

namespace fireq::apps {

struct TaskArguments {
  std::vector<std::string> files;
  std::string bos;            // as --bos: anything but none puts BOS before each sequence
  std::uint64_t context = 0;  // longer sequences lose their beginning
};

// A line and a JSON object for each file: task, items, acc, acc_stderr, gold_nll; of choices acc_norm,
// acc_norm_stderr; with a reference its own acc, and same_choice, the share of items answered alike. `folder`
// has the tokenizer.
nlohmann::json run_tasks(const TaskArguments& arguments, const std::string& folder,
                         const calib::WeightSource& model, const calib::WeightSource* reference,
                         const calib::Precision& precision, int threads, const Report& report,
                         Progress& progress);

}  // namespace fireq::apps
