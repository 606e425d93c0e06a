#include "common/checked.hpp"

#include <string>

namespace fireq {

void throw_size_overflow(std::string_view what) {
  throw Error(ErrorKind::input, "size overflows 64 bits: " + std::string(what))
      .hint("the file is damaged or was made to do harm");
}

}  // namespace fireq
