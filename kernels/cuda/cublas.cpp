// The route through cuBLASLt: operands dequantised to FP8 scratch, then an FP8 matmul whose outer-vector
// scales are a and r themselves, so that it computes the definition's product.
#include <cublasLt.h>

#include <array>
#include <cmath>

#include "kernels/cuda/kernels.hpp"
#include "kernels/cuda/runtime.hpp"
#include "kernels/weights.hpp"

namespace fireq::kernels {

namespace {

constexpr std::size_t kLibraryWorkspace = std::size_t{32} << 20U;

void check_cublas(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw Error(ErrorKind::environment, std::string("cuBLASLt: ") + what)
      .found(cublasLtGetStatusString(status));
}

cublasLtHandle_t handle() {
  static thread_local cublasLtHandle_t h = [] {
    cublasLtHandle_t made = nullptr;
    check_cublas(cublasLtCreate(&made), "create");
    return made;
  }();
  return h;
}

struct Descriptor {
  cublasLtMatmulDesc_t value = nullptr;
  Descriptor() {
    check_cublas(cublasLtMatmulDescCreate(&value, CUBLAS_COMPUTE_32F, CUDA_R_32F), "operation");
  }
  ~Descriptor() { cublasLtMatmulDescDestroy(value); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  template <class T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& v, const char* what) {
    check_cublas(cublasLtMatmulDescSetAttribute(value, attribute, &v, sizeof(v)), what);
  }
};
struct Layout {
  cublasLtMatrixLayout_t value = nullptr;
  Layout(cudaDataType_t type, std::uint64_t rows, std::uint64_t cols, std::uint64_t ld) {
    check_cublas(cublasLtMatrixLayoutCreate(&value, type, rows, cols, static_cast<std::int64_t>(ld)),
                 "layout");
  }
  ~Layout() { cublasLtMatrixLayoutDestroy(value); }
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;
};
struct Preference {
  cublasLtMatmulPreference_t value = nullptr;
  explicit Preference(std::size_t bytes) {
    check_cublas(cublasLtMatmulPreferenceCreate(&value), "preference");
    check_cublas(cublasLtMatmulPreferenceSetAttribute(value, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                                      sizeof(bytes)),
                 "preference");
  }
  ~Preference() { cublasLtMatmulPreferenceDestroy(value); }
  Preference(const Preference&) = delete;
  Preference& operator=(const Preference&) = delete;
};

}  // namespace

std::size_t cublas_scratch_bytes(std::uint64_t rows, std::uint64_t cols) {
  const std::size_t operands = static_cast<std::size_t>(rows) * ((cols + 127) / 128 * 128);
  const std::size_t vectors = static_cast<std::size_t>(rows) * sizeof(float);  // r, when it is one number
  return (operands + 255) / 256 * 256 + (vectors + 255) / 256 * 256 + kLibraryWorkspace;
}

void launch_cublas(const GemmProblem& problem, void* scratch, std::size_t scratch_bytes,
                   const GemmOptions& options) {
  const WeightRef& w = problem.w;
  const TokensRef& x = problem.x;
  if (w.rows % 8 != 0 || w.cols % 16 != 0 || w.per_tensor || problem.epilogue.bias != nullptr ||
      problem.epilogue.residual != nullptr)
    throw Error(ErrorKind::usage,
                "the cuBLASLt route takes N % 8 == 0, K % 16 == 0, row scales and a plain epilogue")
        .found(std::to_string(w.rows) + " x " + std::to_string(w.cols));
  auto* base = static_cast<std::uint8_t*>(scratch);
  const std::size_t operands = (static_cast<std::size_t>(w.rows) * w.padded_cols() + 255) / 256 * 256;
  const std::size_t vectors = (static_cast<std::size_t>(w.rows) * sizeof(float) + 255) / 256 * 256;
  void* library = base + operands + vectors;
  const std::size_t library_bytes = scratch_bytes - operands - vectors;
  dequantize_to_fp8(w, base, options.stream);

  // Column-major: D[N, M] = W[K, N]^T x X[K, M].
  Descriptor op;
  op.set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T, "transpose");
  op.set(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N, "transpose");
  op.set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, std::int8_t{0}, "accumulation");
  op.set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F, "row scales");
  op.set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F, "token scales");
  op.set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, w.row_scales, "row scales");
  op.set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, x.scale, "token scales");
  const Layout a(CUDA_R_8F_E4M3, w.cols, w.rows, w.padded_cols());
  const Layout b(CUDA_R_8F_E4M3, w.cols, x.tokens, x.pitch);
  const Layout d(CUDA_R_16BF, w.rows, x.tokens, problem.y.pitch);
  const Preference preference(library_bytes);
  cublasLtMatmulHeuristicResult_t best{};
  int found = 0;
  check_cublas(cublasLtMatmulAlgoGetHeuristic(handle(), op.value, a.value, b.value, d.value, d.value,
                                              preference.value, 1, &best, &found),
               "algorithm search");
  if (found == 0) throw Error(ErrorKind::environment, "cuBLASLt has no algorithm for this FP8 product");
  const float one = 1.0F;
  const float zero = 0.0F;
  check_cublas(
      cublasLtMatmul(handle(), op.value, &one, base, a.value, x.x8, b.value, &zero, problem.y.data, d.value,
                     problem.y.data, d.value, &best.algo, library, library_bytes, as_stream(options.stream)),
      "matmul");
}

}  // namespace fireq::kernels
