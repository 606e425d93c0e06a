// What this build of fireq has and lacks.
#pragma once

#include <string>
#include <vector>

namespace fireq::apps {

struct BuildFeature {
  std::string name;  // "tokenizers"
  bool present = false;
};
std::vector<BuildFeature> build_features();

std::string version_text();  // of --version: the version, then "with: ..." and "without: ..."

}  // namespace fireq::apps
