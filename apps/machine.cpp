#include "apps/machine.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string_view>
#include <system_error>

namespace fireq::apps {
namespace {

// Files of /proc and /sys have no size; they are read to their end. Empty when absent.
std::string kernel_text(const std::string& path) {
  const std::ifstream file(path);
  std::ostringstream text;
  if (file) text << file.rdbuf();
  return text.str();
}

// The value of "key : value", of the first such line.
std::string field(const std::string& text, std::string_view key) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos || !line.starts_with(key)) continue;
    if (line.find_last_not_of(" \t", colon - 1) + 1 != key.size()) continue;
    const std::size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? std::string() : line.substr(begin);
  }
  return {};
}

std::optional<std::uint64_t> leading_number(std::string_view text) {
  std::uint64_t value = 0;
  const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (ec != std::errc() || end == text.data()) return std::nullopt;
  return value;
}

void read_cpu(const std::string& root, Machine& out) {
  const std::string text = kernel_text(root + "/proc/cpuinfo");
  out.cpu = field(text, "model name");
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);)
    out.processors += line.starts_with("processor") ? 1U : 0U;
  // x86 says "flags", ARM "Features".
  const std::string flags = field(text, "flags").empty() ? field(text, "Features") : field(text, "flags");
  static constexpr std::array<const char*, 15> kKnown{
      "sse4_2",   "avx",         "f16c",        "fma",      "avx2",  "avx512f", "avx512bw", "avx512dq",
      "avx512vl", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve",     "sve2"};
  for (const char* name : kKnown) {
    std::istringstream words(flags);
    for (std::string word; words >> word;) {
      if (word != name) continue;
      out.features.push_back(word);
      break;
    }
  }
}

// The control group's limits: the tightest from its own folder up to the top (version 2), or version 1's
// file.
void read_control_group(const std::string& root, Machine& out) {
  std::string group;
  std::istringstream lines(kernel_text(root + "/proc/self/cgroup"));
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("0::")) group = line.substr(3);
  }
  std::uint64_t used = 0;
  const auto tighten = [&](const std::string& limit, const std::string& usage) {
    const auto bytes = leading_number(kernel_text(limit));
    // Version 1 writes a huge number for "no limit".
    if (!bytes || *bytes >= (std::uint64_t{1} << 60U)) return;
    if (out.memory_limit && *out.memory_limit <= *bytes) return;
    out.memory_limit = bytes;
    used = leading_number(kernel_text(usage)).value_or(0);
  };
  const std::string top = root + "/sys/fs/cgroup";
  for (;;) {
    const std::string folder = top + (group == "/" ? "" : group);
    tighten(folder + "/memory.max", folder + "/memory.current");
    std::istringstream words(kernel_text(folder + "/cpu.max"));
    double quota = 0, period = 0;
    if (words >> quota >> period && quota > 0 && period > 0)
      out.cpu_quota = std::min(out.cpu_quota.value_or(quota / period), quota / period);
    if (group.empty() || group == "/") break;
    group.erase(group.rfind('/'));
  }
  tighten(top + "/memory/memory.limit_in_bytes", top + "/memory/memory.usage_in_bytes");
  if (out.memory_limit)
    out.memory_available =
        std::min(out.memory_available, *out.memory_limit > used ? *out.memory_limit - used : 0);
}

}  // namespace

Machine read_machine(const std::string& root, const std::string& folder) {
  Machine out;
  read_cpu(root, out);
  const std::string memory = kernel_text(root + "/proc/meminfo");
  constexpr std::uint64_t kUnit = 1024;  // "kB" there
  out.memory_total = leading_number(field(memory, "MemTotal")).value_or(0) * kUnit;
  out.memory_available = leading_number(field(memory, "MemAvailable")).value_or(0) * kUnit;
  read_control_group(root, out);
  out.folder = folder;
  std::error_code code;
  const std::filesystem::space_info space = std::filesystem::space(folder, code);
  if (!code) out.disk_free = space.available;
  out.writable = ::access(folder.c_str(), W_OK) == 0;
  return out;
}

}  // namespace fireq::apps
