// --device: where the quantised linears of a FireQ folder run. Adapts the GPU kernels to what calib asks of a
// device.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "calib/device_check.hpp"
#include "calib/linear_backend.hpp"
#include "kernels/gpu_session.hpp"

namespace fireq::apps {

void add_device_option(CLI::App& app, std::string& device, const std::string& what);

// The GPU for --device cuda, null for cpu. Error(environment) in a build without CUDA or without a GPU.
std::unique_ptr<kernels::GpuSession> open_device(const std::string& device);
// {"kind": "cpu"}, or {"kind": "cuda", "name": ..., "compute_capability": ..., "multiprocessors": ...}.
nlohmann::json device_json(const kernels::GpuSession* gpu);

// Both keep a reference to the session.
std::unique_ptr<calib::LinearBackend> make_backend(kernels::GpuSession& gpu);
std::unique_ptr<calib::DeviceProbe> make_probe(kernels::GpuSession& gpu);

}  // namespace fireq::apps
