// What the machine has, as the kernel tells it: processor, memory, disk (Linux).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace fireq::apps {

struct Machine {
  std::string cpu;                    // model name; empty when the kernel does not say
  std::vector<std::string> features;  // of those that matter here, as /proc/cpuinfo spells them
  std::uint64_t processors = 0;       // in the machine
  std::optional<double> cpu_quota;    // processors' worth of time that the control group may use

  std::uint64_t memory_total = 0, memory_available = 0;  // bytes
  std::optional<std::uint64_t> memory_limit;  // of the control group; memory_available is within it

  std::string folder;
  std::uint64_t disk_free = 0;  // bytes that this user may write in `folder`
  bool writable = false;
};

// `root`: what stands before /proc and /sys, empty for this machine. What cannot be read stays zero or empty.
Machine read_machine(const std::string& root, const std::string& folder);

}  // namespace fireq::apps
