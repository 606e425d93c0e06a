// Calibration text that the model writes itself: what it has learned of its language, where the text that was
// given has little of it or is of another kind (LLM-QAT, arXiv:2305.17888, takes all of its data this way).
#pragma once

#include <cstdint>

#include "calib/dataset.hpp"
#include "calib/weights.hpp"
#include "common/progress.hpp"

namespace fireq::calib {

// Layers and head are kept in FP32 while it writes, for each position goes through all of them. A model whose
// layers and head take more than this writes none.
inline constexpr std::uint64_t kOwnTextModelBytes = std::uint64_t{4} << 30U;
bool writes_own_text(const formats::ModelConfig& config);

// How many windows the model writes: share of `windows`, rounded to the nearest.
std::uint64_t own_text_windows(const formats::ModelConfig& config, const Windows& windows, double share);

// `windows`, and behind them own_text_windows more of the same length. Each begins like one of `windows`,
// taken evenly from all of them: its first sixteenth, at least one token. The rest is drawn token by token
// from the model's own FP32 prediction. Draws are seeded by the window's number alone: the same ids for any
// number of threads. Throws Error(input) where an activation is not finite.
Windows with_own_text(const WeightSource& model, const Windows& windows, double share, int threads,
                      Progress& progress);

// `windows` with room behind them for those: the shape of what with_own_text returns.
Windows with_room_for_own_text(const formats::ModelConfig& config, const Windows& windows, double share);

struct OwnTextWork {
  std::uint64_t tokens = 0;        // that pass through the model
  std::uint64_t side_by_side = 0;  // windows that are written at once
};
OwnTextWork own_text_work(const formats::ModelConfig& config, const Windows& windows, double share);

// Resident bytes while it writes.
std::uint64_t own_text_bytes(const formats::ModelConfig& config, const Windows& windows, double share);

}  // namespace fireq::calib
