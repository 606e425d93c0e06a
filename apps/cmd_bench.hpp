// `fireq bench`: apart from commands.hpp because the kernels-only build, which has few libraries, makes a
// program of it alone.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>

namespace fireq::apps {

void add_bench(CLI::App& app, std::function<int()>& run);

}  // namespace fireq::apps
