// The known name nearest to a word that is none of them, for "did you mean".
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace fireq {

// Bytes to insert, remove or replace to turn a into b.
std::size_t edit_distance(std::string_view a, std::string_view b);

// Edit distance over the length of the longer word, less for a common beginning: 0 the same, 1 nothing in
// common.
double name_distance(std::string_view a, std::string_view b);

// The name of least distance, the first among equals. Names with dots are compared whole and by their last
// part, so that a key given without its section is found too. Empty when there are no names.
std::string nearest_name(std::string_view word, const std::vector<std::string>& names);

}  // namespace fireq
