// What the fuzz targets share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "common/error.hpp"

namespace fireq::fuzz {

// Not assert: NDEBUG must not switch a check off.
inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::abort();
}

// True when `parse` returned. The only other outcome that is allowed is an Error of this kind with a message;
// anything else (another exception, an internal error) ends the process, which libFuzzer reports.
template <typename Parse>
bool accepted(Parse&& parse, ErrorKind kind = ErrorKind::input) {
  try {
    parse();
    return true;
  } catch (const Error& error) {
    if (error.kind() != kind) std::fprintf(stderr, "fuzz: wrong kind of error: %s\n", error.what());
    require(error.kind() == kind, "an error of another kind");
    require(!error.message().empty(), "an error without a message");
    require(std::string_view(error.what()).find('\n') == std::string_view::npos, "a message of two lines");
    return false;
  }
}

}  // namespace fireq::fuzz
