// What needs no GPU: shapes by name, derived figures.
#include <charconv>
#include <map>

#include "common/error.hpp"
#include "kernels/bench/bench.hpp"

namespace fireq::kernels::bench {

double GemmBenchRow::tflops() const {
  return 2e-6 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k) / microseconds;
}

std::vector<Shape> shapes_of(const std::string& word) {
  // qkv, o, gate and up, down.
  static const std::map<std::string, std::vector<Shape>> sets{
      {"llama3-8b", {{6144, 4096}, {4096, 4096}, {28672, 4096}, {4096, 14336}}},
      {"llama2-7b", {{12288, 4096}, {4096, 4096}, {22016, 4096}, {4096, 11008}}},
      {"llama2-13b", {{15360, 5120}, {5120, 5120}, {27648, 5120}, {5120, 13824}}},
      {"llama3-70b", {{10240, 8192}, {8192, 8192}, {57344, 8192}, {8192, 28672}}}};
  if (const auto set = sets.find(word); set != sets.end()) return set->second;
  Shape shape;
  const char* end = word.data() + word.size();
  const auto [cross, first] = std::from_chars(word.data(), end, shape.n);
  if (first == std::errc() && cross != end && *cross == 'x') {
    const auto [last, second] = std::from_chars(cross + 1, end, shape.k);
    if (second == std::errc() && last == end && shape.n != 0 && shape.k != 0 && shape.n <= 1U << 20U &&
        shape.k <= 1U << 20U)
      return {shape};
  }
  throw Error(ErrorKind::usage, "no such shape")
      .expected("NxK, llama3-8b, llama2-7b, llama2-13b or llama3-70b")
      .found(word);
}

}  // namespace fireq::kernels::bench
