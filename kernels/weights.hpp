// Weight layouts on the GPU: prepack row <-> sm90, byte-identical to the CPU's, and dequantisation to FP8
// operands.
#pragma once

#include <cstdint>

#include "kernels/types.hpp"

namespace fireq::kernels {

// w.layout row -> tiles [w.tile_bytes()]; rows that pad N hold code 0 and scale 0x01.
void prepack_sm90(const WeightRef& w, std::uint8_t* tiles, Stream stream);
// w.layout sm90 -> codes [N, Kp/2] and scales [N, Kp/128].
void unpack_sm90(const WeightRef& w, std::uint8_t* codes, std::uint8_t* group_scales, Stream stream);
// The FP8 operands w8 [N, Kp] (without r), from either layout.
void dequantize_to_fp8(const WeightRef& w, std::uint8_t* out8, Stream stream);

}  // namespace fireq::kernels
