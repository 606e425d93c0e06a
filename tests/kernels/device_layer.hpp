// A random layer on the device, in both layouts.
#pragma once

#include "kernels/device_memory.hpp"
#include "kernels/weights.hpp"
#include "tests/kernels/problem.hpp"

namespace fireq::kernels::testing {

struct DeviceLayer {
  DeviceBuffer<std::uint8_t> codes, group_scales, tiles;
  DeviceBuffer<float> row_scales, bias;
  WeightRef row, sm90;

  explicit DeviceLayer(const Layer& l)
      : codes(l.codes),
        group_scales(l.group_scales),
        tiles(l.ref().tile_bytes()),
        row_scales(l.row_scales),
        bias(l.bias) {
    row = l.ref();
    row.codes = codes.get();
    row.group_scales = group_scales.get();
    row.row_scales = row_scales.get();
    sm90 = row;
    sm90.layout = WeightLayout::sm90;
    sm90.codes = nullptr;
    sm90.group_scales = nullptr;
    sm90.tiles = tiles.get();
    tiles.fill(0xee);
    prepack_sm90(row, tiles.get(), nullptr);
    cuda_ok(cudaDeviceSynchronize(), "prepack");
  }
};

}  // namespace fireq::kernels::testing
