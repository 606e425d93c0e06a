// What the calib tests share: random data, definitions written a second time in double, checkpoint folders
// made in a temporary directory.
#pragma once

#include <unistd.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "tests/support/temp_folder.hpp"

namespace fireq::test {

// The same inputs in every run; FIREQ_TEST_SEED=n tries others.
inline std::uint64_t test_seed() {
  static const char* const chosen = std::getenv("FIREQ_TEST_SEED");
  return chosen == nullptr ? 20250801 : std::strtoull(chosen, nullptr, 10);
}

class Random {
 public:
  explicit Random(std::uint64_t salt) : engine_(test_seed() * 1000003U + salt) {}
  float normal(double scale = 1.0) { return static_cast<float>(normal_(engine_) * scale); }
  std::uint64_t below(std::uint64_t n) {
    return std::uniform_int_distribution<std::uint64_t>(0, n - 1)(engine_);
  }
  std::vector<float> normals(std::size_t n, double scale = 1.0) {
    std::vector<float> out(n);
    for (float& v : out) v = normal(scale);
    return out;
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

// The value of an E4M3FN byte (sign 0), from the definition.
inline double e4m3_value(unsigned byte) {
  const unsigned exponent = byte >> 3U;
  const double mantissa = byte & 7U;
  return exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, static_cast<int>(exponent) - 10);
}

// Nearest E4M3FN value, ties to the even code, saturating: a search, not bit tricks.
inline double nearest_e4m3(double x) {
  const double magnitude = std::fabs(x);
  unsigned best = 0;
  for (unsigned byte = 1; byte <= 0x7e; ++byte) {
    const double near = std::fabs(e4m3_value(byte) - magnitude);
    const double held = std::fabs(e4m3_value(best) - magnitude);
    if (near < held || (near == held && byte % 2 == 0)) best = byte;
  }
  return std::copysign(e4m3_value(best), x);
}

inline double nearest_bf16(double x) {  // of a value that a float holds, or nearly
  const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(x));
  const std::uint32_t low = bits & 0xffffU;
  std::uint32_t high = bits >> 16U;
  if (low > 0x8000U || (low == 0x8000U && high % 2 == 1)) ++high;
  return static_cast<double>(std::bit_cast<float>(high << 16U));
}

// Frobenius norm of the difference over that of the reference.
template <typename A, typename B>
double relative_error(const A& reference, const B& value) {
  double sum = 0;
  double error = 0;
  for (std::size_t i = 0; i < reference.size(); ++i) {
    const auto r = static_cast<double>(reference[i]);
    const double e = static_cast<double>(value[i]) - r;
    sum += r * r;
    error += e * e;
  }
  return sum == 0 ? std::sqrt(error) : std::sqrt(error / sum);
}

template <typename A, typename B>
double largest_difference(const A& a, const B& b) {
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double d = std::fabs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    if (!(d <= largest)) largest = d;  // NaN too
  }
  return largest;
}

inline bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

inline std::vector<char> read_bytes(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

template <typename T>
std::vector<T> read_array(const std::filesystem::path& path) {
  const std::vector<char> bytes = read_bytes(path);
  std::vector<T> out(bytes.size() / sizeof(T));
  std::memcpy(out.data(), bytes.data(), out.size() * sizeof(T));
  return out;
}

inline void write_text(const std::filesystem::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

// Tensors of a safetensors file, and the file's bytes written here from the format's description.
struct RawTensor {
  std::string dtype;
  std::vector<std::uint64_t> shape;
  std::vector<std::byte> bytes;
};
using RawTensors = std::map<std::string, RawTensor>;

inline RawTensor f32_tensor(std::vector<std::uint64_t> shape, const std::vector<float>& values) {
  RawTensor out{"F32", std::move(shape), std::vector<std::byte>(values.size() * sizeof(float))};
  std::memcpy(out.bytes.data(), values.data(), out.bytes.size());
  return out;
}

inline void write_safetensors(const std::filesystem::path& path, const RawTensors& tensors) {
  std::string header = "{";
  std::uint64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    if (offset > 0 || header.size() > 1) header += ",";
    header += "\"" + name + R"(":{"dtype":")" + tensor.dtype + R"(","shape":[)";
    for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
      header += (i > 0 ? "," : "") + std::to_string(tensor.shape[i]);
    }
    header += "],\"data_offsets\":[" + std::to_string(offset) + ",";
    offset += tensor.bytes.size();
    header += std::to_string(offset) + "]}";
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  std::ofstream file(path, std::ios::binary);
  const std::uint64_t length = header.size();
  file.write(reinterpret_cast<const char*>(&length), sizeof(length));
  file << header;
  for (const auto& [name, tensor] : tensors) {
    file.write(reinterpret_cast<const char*>(tensor.bytes.data()),
               static_cast<std::streamsize>(tensor.bytes.size()));
  }
}

}  // namespace fireq::test
