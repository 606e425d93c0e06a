#include "apps/build_features.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "apps/commands.hpp"
#include "apps/html_report.hpp"

namespace fireq::apps {

std::vector<BuildFeature> build_features() {
#if FIREQ_TOKENIZERS
  constexpr bool kTokenizers = true;
#else
  constexpr bool kTokenizers = false;
#endif
  std::vector<BuildFeature> list{{"tokenizers", kTokenizers},
                                 {"vectorised loops", FIREQ_WITH_HIGHWAY != 0},
                                 {"HTML report", html_report_available()},
                                 {"CUDA kernels", FIREQ_WITH_CUDA != 0}};
#ifdef FIREQ_SANITIZE
  list.push_back({"sanitizers (" FIREQ_SANITIZE ")", true});
#endif
  return list;
}

std::string version_text() {
  std::vector<std::string> with, without;
  for (const BuildFeature& f : build_features()) (f.present ? with : without).push_back(f.name);
  std::string text = fmt::format("fireq {}\nwith: {}", tool_version(), fmt::join(with, ", "));
  if (!without.empty()) text += fmt::format("\nwithout: {}", fmt::join(without, ", "));
  return text;
}

}  // namespace fireq::apps
