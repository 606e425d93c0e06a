#include "common/nearest.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

namespace fireq {
namespace {

std::string_view last_part(std::string_view name) {
  const std::size_t dot = name.rfind('.');
  return dot == std::string_view::npos ? name : name.substr(dot + 1);
}

}  // namespace

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t above = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0U : 1U)});
      diagonal = above;
    }
  }
  return row.back();
}

double name_distance(std::string_view a, std::string_view b) {
  if (a.empty() && b.empty()) return 0;
  // A common beginning counts for more: "evaluate" is meant for "eval", not for "validate".
  const std::size_t most = std::min({a.size(), b.size(), std::size_t{4}});
  std::size_t prefix = 0;
  while (prefix < most && a[prefix] == b[prefix]) ++prefix;
  return static_cast<double>(edit_distance(a, b)) / static_cast<double>(std::max(a.size(), b.size())) *
         (1 - 0.1 * static_cast<double>(prefix));
}

std::string nearest_name(std::string_view word, const std::vector<std::string>& names) {
  std::string best;
  // The nearer of the two ways to compare counts; among equals the whole name decides.
  constexpr double kFar = std::numeric_limits<double>::infinity();
  std::pair<double, double> best_distance{kFar, kFar};
  for (const std::string& name : names) {
    const double whole = name_distance(word, name);
    const double part = name_distance(last_part(word), last_part(name));
    const std::pair<double, double> distance{std::min(whole, part), whole};
    if (distance < best_distance) {
      best_distance = distance;
      best = name;
    }
  }
  return best;
}

}  // namespace fireq
