// What the profiled variant of a decode or prefill kernel measures in each CTA (docs/kernels/README.md).
#pragma once

#include <cstdint>

namespace fireq::kernels {

enum class Stamp : std::uint8_t {
  started,        // first instruction
  ready,          // barriers and operand table made
  first_weights,  // first weight stage arrived
  first_tokens,   // first token stage arrived: the kernel before has ended
  multiplied,     // last multiply done
  stored,         // whole blocks stored, partial sums published
  reduced,        // shared blocks summed and stored
  count
};
enum class Waited : std::uint8_t { weights, tokens, epilogue, count };

struct CtaProfile {
  std::uint64_t at[static_cast<int>(Stamp::count)];       // nanoseconds
  std::uint64_t waited[static_cast<int>(Waited::count)];  // cycles; epilogue: all that follows multiplies
  std::uint64_t multiprocessor;
  std::uint64_t cycles;  // from started to reduced
};

}  // namespace fireq::kernels
