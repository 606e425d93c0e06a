// Opens a Hugging Face folder, rounds one linear to 4 bits, and says how far it is from the original: what a
// project that uses the libraries would begin with (docs/library.md shows this file).
#include <cstdio>
#include <span>
#include <vector>

#include "common/error.hpp"
#include "formats/checkpoint.hpp"
#include "libquant/levels.hpp"
#include "libquant/metrics.hpp"
#include "libquant/quantized_linear.hpp"

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: consumer FOLDER TENSOR\n");
    return 2;
  }
  try {
    const fireq::formats::CheckpointReader reader(arguments[1]);
    const fireq::TensorView tensor = reader.tensor(arguments[2]);
    const std::uint64_t rows = tensor.shape.at(0), cols = tensor.shape.at(1);

    const fireq::libquant::WeightQuantizerOptions options;  // integers, a scale for each row
    auto packed = fireq::libquant::make_quantized_linear(rows, cols, options.levels, false);
    fireq::libquant::quantize_rows_raw(tensor.data, tensor.dtype, 0, rows, options, {}, packed);

    std::vector<float> values(rows * cols);
    const fireq::libquant::ProductTable table(packed.levels);
    fireq::libquant::dequantize_rows(packed, table, 0, rows, values);

    // Zeros quantise to zeros: the error against them is the packed weights' own size.
    fireq::libquant::ErrorSums size;
    size.add(values, std::vector<float>(values.size()));
    std::printf("%llu x %llu, %zu bytes of codes, norm^2 %.9g\n", static_cast<unsigned long long>(rows),
                static_cast<unsigned long long>(cols), packed.codes.size(), size.reference_sq);
  } catch (const fireq::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return static_cast<int>(error.kind());
  }
  return 0;
}
