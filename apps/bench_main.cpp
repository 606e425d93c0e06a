// `fireq bench` as a program of its own: what the kernels-only build makes.
#include <cstdio>
#include <exception>

#include "apps/cmd_bench.hpp"
#include "common/error.hpp"

int main(int argc, char** argv) {
  CLI::App app{"fireq-bench: the GPU benches of fireq", "fireq-bench"};
  app.require_subcommand(1);
  std::function<int()> run;
  fireq::apps::add_bench(app, run);
  CLI11_PARSE(app, argc, argv);
  try {
    return run();
  } catch (const fireq::Error& e) {
    std::fprintf(stderr, "fireq-bench: error: %s\n", e.what());
    return static_cast<int>(e.kind());
  } catch (const std::exception& e) {
    std::fprintf(stderr, "fireq-bench: internal error: %s\n", e.what());
    return static_cast<int>(fireq::ErrorKind::internal);
  }
}
