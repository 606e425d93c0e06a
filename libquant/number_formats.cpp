#include "libquant/number_formats.hpp"
