#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <csignal>
#include <exception>
#include <new>
#include <system_error>

#include "apps/build_features.hpp"
#include "apps/cmd_bench.hpp"
#include "apps/commands.hpp"
#include "apps/shell_files.hpp"
#include "common/error.hpp"
#include "common/nearest.hpp"
#include "common/progress.hpp"

namespace {

using fireq::ErrorKind;

// First Ctrl-C: finish the unit at hand and stop; second: stop now.
void on_interrupt(int /*signal*/) {
  if (fireq::interrupt_flag().exchange(true)) _exit(static_cast<int>(ErrorKind::interrupted));
}

void install_signal_handlers() {
  struct sigaction action = {};
  action.sa_handler = on_interrupt;
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);  // a closed pipe is a write error like any other
  std::signal(SIGXFSZ, SIG_IGN);  // a file-size limit too
}

int fail(ErrorKind kind, const std::string& line) {
  fmt::print(stderr, "fireq: {} {}\n",
             fireq::apps::coloured(STDERR_FILENO, fireq::apps::Colour::red, "error:"), line);
  return static_cast<int>(kind);
}

int run_command(const fireq::apps::Runner& run) {
  try {
    return run();
  } catch (const fireq::Error& e) {
    return fail(e.kind(), e.what());
  } catch (const std::bad_alloc&) {
    return fail(ErrorKind::environment,
                "out of memory; use a machine with more memory, or fewer calibration samples");
  } catch (const std::exception& e) {
    return fail(ErrorKind::internal,
                std::string("internal error: ") + e.what() + "; please report it with the command line");
  }
}

// The first word decides: the library would only say that a subcommand is missing.
void require_known_subcommand(const CLI::App& app, int argc, const char* const* argv) {
  if (argc < 2 || argv[1][0] == '-') return;
  const std::string word = argv[1];
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands({})) names.push_back(command->get_name());
  if (std::find(names.begin(), names.end(), word) != names.end()) return;
  throw fireq::Error(ErrorKind::usage, fmt::format("there is no subcommand '{}'", word))
      .expected(fmt::format("{}", fmt::join(names, ", ")))
      .hint(fmt::format("did you mean '{}'? See fireq --help", fireq::nearest_name(word, names)));
}

// `fireq completion SHELL` and `fireq manual` print what an installation puts into the system's folders.
void add_shell_files(CLI::App& app, fireq::apps::Runner& runner) {
  const auto shell = std::make_shared<std::string>();
  CLI::App* completion = app.add_subcommand("completion", "Print a completion script for a shell");
  completion->add_option("shell", *shell, "bash, zsh or fish")
      ->required()
      ->check(CLI::IsMember({"bash", "zsh", "fish"}));
  completion->footer(
      "Examples:\n"
      "  source <(fireq completion bash)\n"
      "  fireq completion fish > ~/.config/fish/completions/fireq.fish");
  completion->callback([&app, &runner, shell] {
    runner = [&app, shell] {
      fmt::print("{}", fireq::apps::completion_script(app, *shell));
      return 0;
    };
  });
  CLI::App* manual = app.add_subcommand("manual", "Print the manual page, for man(1)");
  manual->footer("Examples:\n  fireq manual > fireq.1 && man ./fireq.1");
  manual->callback([&app, &runner] {
    runner = [&app] {
      fmt::print("{}", fireq::apps::manual_page(app, fireq::apps::tool_version()));
      return 0;
    };
  });
}

}  // namespace

int main(int argc, char** argv) {
  install_signal_handlers();
  CLI::App app{"fireq: INT4 weights, FP8 activations and an INT4 KV cache for Llama-family checkpoints",
               "fireq"};
  app.set_version_flag("--version", fireq::apps::version_text());
  app.require_subcommand(1);
  app.footer(
      "Exit codes: 0 success, 1 compared and out of tolerance, 2 usage, 3 bad input, 4 environment, 5 "
      "internal, 130 interrupted.");
  fireq::apps::Runner run;
  fireq::apps::add_quantize(app, run);
  fireq::apps::add_calibrate(app, run);
  fireq::apps::add_eval(app, run);
  fireq::apps::add_inspect(app, run);
  fireq::apps::add_validate(app, run);
  fireq::apps::add_export(app, run);
  fireq::apps::add_diff(app, run);
  fireq::apps::add_generate(app, run);
  fireq::apps::add_bench(app, run);
  fireq::apps::add_doctor(app, run);
  add_shell_files(app, run);
  try {
    require_known_subcommand(app, argc, argv);
    app.parse(argc, argv);
  } catch (const CLI::Success& e) {
    return app.exit(e);  // --help, --version
  } catch (const CLI::ParseError& e) {
    return fail(ErrorKind::usage, std::string(e.what()) + "; see fireq --help");
  } catch (const fireq::Error& e) {
    return fail(e.kind(), e.what());
  }
  return run_command(run);
}
