// The page of `inspect --html`: one file that needs no network.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "calib/inspect.hpp"

namespace fireq::apps {

// False when the build had no plotting library (scripts/fetch-assets).
bool html_report_available() noexcept;

// Profiles for the page's channel plot. Together they hold at most `budget` values: where there are more
// channels, each value is the largest of `step` neighbours.
nlohmann::json profiles_json(const std::vector<calib::ChannelProfile>& profiles,
                             const std::vector<calib::SmoothedChannels>& smoothed, std::size_t budget);

// The page of a document that inspect writes to --json too. Error(usage) when not available.
std::string html_report(std::string_view title, const nlohmann::json& document,
                        const nlohmann::json& profiles);

}  // namespace fireq::apps
