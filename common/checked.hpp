// Arithmetic on sizes that come from files: every result is exact or an Error of kind input. The only helper
// of its kind; a size read from a file passes through here before it is used.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "common/error.hpp"

namespace fireq {

[[noreturn]] void throw_size_overflow(std::string_view what);

inline std::uint64_t checked_add(std::uint64_t a, std::uint64_t b, std::string_view what) {
  std::uint64_t r = 0;
  if (__builtin_add_overflow(a, b, &r)) throw_size_overflow(what);
  return r;
}

inline std::uint64_t checked_sub(std::uint64_t a, std::uint64_t b, std::string_view what) {
  if (b > a) throw_size_overflow(what);
  return a - b;
}

inline std::uint64_t checked_mul(std::uint64_t a, std::uint64_t b, std::string_view what) {
  std::uint64_t r = 0;
  if (__builtin_mul_overflow(a, b, &r)) throw_size_overflow(what);
  return r;
}

// Product of a shape; 1 for rank 0.
inline std::uint64_t checked_elements(std::span<const std::uint64_t> shape, std::string_view what) {
  std::uint64_t n = 1;
  for (const std::uint64_t d : shape) n = checked_mul(n, d, what);
  return n;
}

// value rounded up to a multiple of step (step > 0).
inline std::uint64_t checked_round_up(std::uint64_t value, std::uint64_t step, std::string_view what) {
  return checked_mul(checked_add(value, step - 1, what) / step, step, what);
}

}  // namespace fireq
