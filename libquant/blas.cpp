// OpenBLAS is loaded when it is first needed: only recipes that round under curvature do, and its threads,
// which it starts when it is loaded, would spin beside every other run. Of the system's builds (pthread,
// OpenMP, serial) the serial one hands two threads the same work area now and then (0.3.21: its list of areas
// is searched without a lock): with that one calls take turns.
#include "libquant/blas.hpp"

#include <cblas.h>
#include <dlfcn.h>

#include <limits>
#include <mutex>
#include <string>

#include "common/error.hpp"

namespace fireq::libquant::blas {
namespace {

constexpr const char* kLibrary = "libopenblas.so.0";

class OpenBlas {
 public:
  static OpenBlas& instance() {
    static OpenBlas library;
    return library;
  }

  decltype(&cblas_sgemm) sgemm = nullptr;
  decltype(&cblas_dgemm) dgemm = nullptr;
  decltype(&cblas_dtrsm) dtrsm = nullptr;

  std::string description() {
    decltype(&openblas_get_config) config = nullptr;
    decltype(&openblas_get_corename) core = nullptr;
    resolve(config, "openblas_get_config");
    resolve(core, "openblas_get_corename");
    return std::string(config()) + ", loops for " + core();
  }

  // Holds the turn of a build that needs turns.
  std::unique_lock<std::mutex> turn() {
    return takes_turns_ ? std::unique_lock(mutex_) : std::unique_lock<std::mutex>();
  }

 private:
  OpenBlas() {
    handle_ = ::dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);  // kept until the process ends
    if (handle_ == nullptr) {
      const char* why = ::dlerror();
      throw Error(ErrorKind::environment,
                  std::string("OpenBLAS cannot be loaded: ") + (why == nullptr ? "" : why))
          .hint("install libopenblas0-pthread");
    }
    resolve(sgemm, "cblas_sgemm");
    resolve(dgemm, "cblas_dgemm");
    resolve(dtrsm, "cblas_dtrsm");
    decltype(&openblas_set_num_threads) set_threads = nullptr;
    decltype(&openblas_get_parallel) parallel = nullptr;
    resolve(set_threads, "openblas_set_num_threads");
    resolve(parallel, "openblas_get_parallel");
    set_threads(1);
    takes_turns_ = parallel() == OPENBLAS_SEQUENTIAL;
  }

  template <typename Function>
  void resolve(Function& function, const char* name) {
    function = reinterpret_cast<Function>(::dlsym(handle_, name));
    if (function == nullptr)
      throw Error(ErrorKind::environment, std::string("OpenBLAS lacks ") + name).path(kLibrary);
  }

  void* handle_ = nullptr;
  bool takes_turns_ = false;
  std::mutex mutex_;
};

blasint size_of(std::size_t n) {
  if (n > static_cast<std::size_t>(std::numeric_limits<blasint>::max())) {
    throw Error(ErrorKind::internal, "a matrix is too large for this BLAS");
  }
  return static_cast<blasint>(n);
}

CBLAS_TRANSPOSE transposed(Op op) {
  return op == Op::none ? CblasNoTrans : CblasTrans;
}

}  // namespace

std::string description() {
  return OpenBlas::instance().description();
}

void gemm(Op op_a, Op op_b, std::size_t m, std::size_t n, std::size_t k, float alpha, View<const float> a,
          View<const float> b, float beta, View<float> c) {
  OpenBlas& library = OpenBlas::instance();
  const auto turn = library.turn();
  library.sgemm(CblasRowMajor, transposed(op_a), transposed(op_b), size_of(m), size_of(n), size_of(k), alpha,
                a.data, size_of(a.stride), b.data, size_of(b.stride), beta, c.data, size_of(c.stride));
}

void gemm(Op op_a, Op op_b, std::size_t m, std::size_t n, std::size_t k, double alpha, View<const double> a,
          View<const double> b, double beta, View<double> c) {
  OpenBlas& library = OpenBlas::instance();
  const auto turn = library.turn();
  library.dgemm(CblasRowMajor, transposed(op_a), transposed(op_b), size_of(m), size_of(n), size_of(k), alpha,
                a.data, size_of(a.stride), b.data, size_of(b.stride), beta, c.data, size_of(c.stride));
}

void solve_right_upper(Op op_u, std::size_t m, std::size_t n, View<const double> u, View<double> b) {
  OpenBlas& library = OpenBlas::instance();
  const auto turn = library.turn();
  library.dtrsm(CblasRowMajor, CblasRight, CblasUpper, transposed(op_u), CblasNonUnit, size_of(m), size_of(n),
                1.0, u.data, size_of(u.stride), b.data, size_of(b.stride));
}

}  // namespace fireq::libquant::blas
