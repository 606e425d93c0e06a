// Completion scripts and the manual page, made from the command line's own description.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace fireq::apps {

// `shell` is bash, zsh or fish.
std::string completion_script(const CLI::App& app, const std::string& shell);

// A page for man(1), section 1, in roff.
std::string manual_page(const CLI::App& app, const std::string& version);

}  // namespace fireq::apps
