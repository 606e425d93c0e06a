// fireq doctor: what this machine and this build can run, and what to do about the rest.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <string_view>

#include "apps/build_features.hpp"
#include "apps/commands.hpp"
#include "apps/gpu_driver.hpp"
#include "apps/machine.hpp"
#include "calib/quantize_job.hpp"
#include "calib/simd.hpp"
#include "common/error.hpp"
#include "common/parallel.hpp"
#include "libquant/blas.hpp"
#include "libquant/row_kernels.hpp"

namespace fireq::apps {
namespace {

using nlohmann::json;

struct Arguments {
  CommonOptions common;
  std::string root;
};

// Well-known shapes, from their config.json files; the context does not matter here.
struct KnownModel {
  const char* name;
  std::uint64_t hidden, ffn, layers, heads, kv_heads, head_dim, vocab;
  bool tied;
};
constexpr std::array<KnownModel, 6> kModels{
    {{"SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49152, true},
     {"Llama-3.2-1B", 2048, 8192, 16, 32, 8, 64, 128256, true},
     {"Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128256, false},
     {"Qwen3-32B", 5120, 25600, 64, 64, 8, 128, 151936, false},
     {"Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128, 128256, false},
     {"Llama-3.1-405B", 16384, 53248, 126, 128, 8, 128, 128256, false}}};

struct ModelNeeds {
  std::string name;
  std::uint64_t fast = 0, best = 0;  // resident memory
  std::uint64_t output = 0;          // bytes of the FireQ folder's tensors
  std::uint64_t disk = 0;            // while it is written: staged layers and finished shards
};

ModelNeeds needs_of(const KnownModel& m) {
  formats::ModelConfig config;
  config.hidden = m.hidden;
  config.ffn = m.ffn;
  config.layers = m.layers;
  config.heads = m.heads;
  config.kv_heads = m.kv_heads;
  config.head_dim = m.head_dim;
  config.vocab = m.vocab;
  const CalibrationArguments defaults;
  calib::Windows windows;
  windows.count = defaults.samples;
  windows.length = defaults.length;
  windows.ids.resize(windows.count * windows.length);
  ModelNeeds needs;
  needs.name = m.name;
  needs.fast = calib::plan_memory(config, calib::preset_recipe("fast"), &windows).peak;
  needs.best = calib::plan_memory(config, calib::preset_recipe("best"), &windows).peak;
  std::uint64_t packed = 0;
  for (std::size_t i = 0; i < calib::kLinears; ++i) {
    const auto [rows, cols] = formats::linear_shape(config, i);
    const std::uint64_t groups = (cols + libquant::kGroupSize - 1) / libquant::kGroupSize;
    packed += m.layers * rows * (groups * (libquant::kGroupSize / 2 + 1) + sizeof(float));
  }
  needs.output = packed + (m.tied ? 1 : 2) * m.vocab * m.hidden * sizeof(std::uint16_t);
  needs.disk = needs.output + packed;
  return needs;
}

// Which kernels of this source run on a GPU. Machine code of "80" runs on 8.0 and later 8.x, "90a" on 9.0
// only (docs.nvidia.com/cuda/cuda-compiler-driver-nvcc, "GPU Feature List").
struct Kernels {
  bool portable = false, hopper = false, cublas = false;
  bool any() const { return portable || hopper; }
};
Kernels kernels_for(int capability) {
  Kernels out;
  std::string_view list = FIREQ_CUDA_ARCHITECTURES;
  while (!list.empty()) {
    const std::string_view entry = list.substr(0, list.find(','));
    list.remove_prefix(std::min(entry.size() + 1, list.size()));
    int number = 0;
    std::size_t digits = 0;
    while (digits < entry.size() && entry[digits] >= '0' && entry[digits] <= '9')
      number = 10 * number + (entry[digits++] - '0');
    const bool exact = digits < entry.size() && entry[digits] == 'a';
    const bool real = entry.ends_with("-real");
    out.portable = out.portable || capability == number ||
                   (!exact && capability > number && (!real || capability / 10 == number / 10));
  }
  out.hopper = capability == 90;
  out.cublas = out.portable && capability >= 89;
  return out;
}

std::string capability_text(int capability) {
  return fmt::format("{}.{}", capability / 10, capability % 10);
}

std::string kernels_text(const Kernels& k) {
  std::vector<std::string> names;
  if (k.hopper) names.emplace_back("Hopper (decode, prefill)");
  if (k.portable) names.emplace_back("portable");
  if (k.cublas) names.emplace_back("cuBLASLt FP8");
  return names.empty() ? "none of these kernels" : fmt::format("{}", fmt::join(names, ", "));
}

struct Verdict {
  enum class State : std::uint8_t { yes, partly, no };
  std::string what;
  State state = State::yes;
  std::string detail, todo;
  bool required = false;  // `no` is a broken installation
};

class Doctor {
 public:
  explicit Doctor(const Arguments& a)
      : machine_(read_machine(a.root, ".")), gpu_(probe_gpu_driver()), features_(build_features()) {
    for (const KnownModel& m : kModels) models_.push_back(needs_of(m));
    try {
      blas_ = libquant::blas::description();
    } catch (const Error& e) {
      blas_problem_ = e.message();
    }
    judge();
  }

  json to_json() const;
  void print(const Report& report) const;
  const std::vector<Verdict>& verdicts() const { return verdicts_; }

 private:
  void judge();
  void judge_memory(const char* what, std::uint64_t ModelNeeds::*bytes);
  void judge_gpu();
  bool has(std::string_view feature) const {
    return std::any_of(features_.begin(), features_.end(),
                       [&](const BuildFeature& f) { return f.present && f.name == feature; });
  }

  Machine machine_;
  GpuDriver gpu_;
  std::vector<BuildFeature> features_;
  std::vector<ModelNeeds> models_;
  std::string blas_, blas_problem_;
  std::vector<Verdict> verdicts_;
};

// The largest known model whose run fits into the memory that is free now.
void Doctor::judge_memory(const char* what, std::uint64_t ModelNeeds::*bytes) {
  const ModelNeeds *largest = nullptr, *next = nullptr;
  for (const ModelNeeds& m : models_) {
    if (m.*bytes <= machine_.memory_available) {
      largest = &m;
    } else if (next == nullptr) {
      next = &m;
    }
  }
  Verdict v{what, Verdict::State::yes, {}, {}};
  v.state = largest == nullptr ? Verdict::State::no : next != nullptr ? Verdict::State::partly : v.state;
  v.detail = largest == nullptr
                 ? "not even a small model fits into memory"
                 : fmt::format("models up to {} (needs {} of {} free)", largest->name,
                               bytes_text(largest->*bytes), bytes_text(machine_.memory_available));
  if (next != nullptr)
    v.todo = fmt::format("{} needs {} of free memory", next->name, bytes_text(next->*bytes));
  verdicts_.push_back(std::move(v));
}

void Doctor::judge_gpu() {
  Verdict v{"--device cuda", Verdict::State::no, {}, {}};
  const auto served = std::find_if(gpu_.devices.begin(), gpu_.devices.end(),
                                   [](const GpuInfo& g) { return kernels_for(g.compute_capability).any(); });
  if (!gpu_.found) {
    v.detail = "no NVIDIA driver";
    v.todo = "install one, or stay on the CPU: nothing else needs it";
  } else if (gpu_.devices.empty()) {
    v.detail = gpu_.problem.empty() ? "the driver finds no GPU" : gpu_.problem;
    v.todo = "check nvidia-smi, and that this process may use the device";
  } else if (served == gpu_.devices.end()) {
    v.detail = fmt::format("no kernels for {} (compute capability {})", gpu_.devices.front().name,
                           capability_text(gpu_.devices.front().compute_capability));
    v.todo = "compute capability 8.0 or higher; build with -DFIREQ_CUDA_ARCHITECTURES for this GPU";
  } else if (!has("CUDA kernels")) {
    v.detail =
        fmt::format("{} would run: {}", served->name, kernels_text(kernels_for(served->compute_capability)));
    v.todo = "this build has no CUDA kernels: configure with -DFIREQ_WITH_CUDA=ON";
  } else {
    v.state = Verdict::State::yes;
    v.detail = fmt::format("{}: {}", served->name, kernels_text(kernels_for(served->compute_capability)));
    if (served != gpu_.devices.begin()) {
      v.state = Verdict::State::partly;
      v.todo =
          fmt::format("the first GPU is used: set CUDA_VISIBLE_DEVICES={}", served - gpu_.devices.begin());
    }
  }
  verdicts_.push_back(std::move(v));
}

void Doctor::judge() {
  using State = Verdict::State;
  judge_memory("quantize (rtn, paper, fast)", &ModelNeeds::fast);
  if (blas_problem_.empty()) {
    judge_memory("quantize (best)", &ModelNeeds::best);
  } else {
    verdicts_.push_back({"quantize (best)", State::no, blas_problem_, "install libopenblas0-pthread", true});
  }
  // One layer at a time, as quantize: docs/forward-pass.md, "Memory".
  Verdict cpu{"eval, generate, validate", State::yes, "on the CPU, the same models as preset fast", {}};
  if (std::string_view(calib::simd::kernels().target) == "plain") {
    cpu.state = State::partly;
    cpu.detail += ", slowly: plain loops";
    cpu.todo = has("vectorised loops") ? "a processor with AVX2 is several times as fast"
                                       : "configure with -DFIREQ_WITH_HIGHWAY=ON (libhwy-dev)";
  }
  verdicts_.push_back(std::move(cpu));
  judge_gpu();
  const bool tokenizers = has("tokenizers"), html = has("HTML report");
  verdicts_.push_back(
      {"text (--text, generate)", tokenizers ? State::yes : State::no,
       tokenizers ? "tokenizers are built in" : "this build has no tokenizers",
       tokenizers ? "" : "use --tokens ids.u32, or configure with -DFIREQ_WITH_TOKENIZERS=ON"});
  verdicts_.push_back({"inspect --html", html ? State::yes : State::no,
                       html ? "plotly.js is built in" : "this build has no HTML report",
                       html ? "" : "run scripts/fetch-assets, then build again"});
  Verdict disk{"output in this folder", State::yes, {}, {}};
  const auto fits = std::find_if(models_.rbegin(), models_.rend(),
                                 [&](const ModelNeeds& m) { return m.disk <= machine_.disk_free; });
  if (!machine_.writable) {
    disk.state = State::no;
    disk.detail = "the folder cannot be written";
    disk.todo = "name an output elsewhere with -o";
  } else {
    disk.state = fits == models_.rbegin() ? State::yes : fits == models_.rend() ? State::no : State::partly;
    disk.detail = fits == models_.rend()
                      ? fmt::format("{} free: not enough for a small model", bytes_text(machine_.disk_free))
                      : fmt::format("models up to {} (needs {} of {} free)", fits->name,
                                    bytes_text(fits->disk), bytes_text(machine_.disk_free));
    if (fits != models_.rbegin()) disk.todo = "free space, or name an output on another disk with -o";
  }
  verdicts_.push_back(std::move(disk));
}

json Doctor::to_json() const {
  json build = json::object();
  for (const BuildFeature& f : features_) build[f.name] = f.present;
  json devices = json::array();
  for (const GpuInfo& g : gpu_.devices) {
    const Kernels k = kernels_for(g.compute_capability);
    devices.push_back({{"name", g.name},
                       {"compute_capability", capability_text(g.compute_capability)},
                       {"multiprocessors", g.multiprocessors},
                       {"memory", g.memory},
                       {"kernels", {{"hopper", k.hopper}, {"portable", k.portable}, {"cublas", k.cublas}}}});
  }
  json models = json::array();
  for (const ModelNeeds& m : models_) {
    models.push_back({{"name", m.name},
                      {"fast", {{"memory", m.fast}, {"fits", m.fast <= machine_.memory_available}}},
                      {"best", {{"memory", m.best}, {"fits", m.best <= machine_.memory_available}}},
                      {"output", m.output},
                      {"disk", {{"needs", m.disk}, {"fits", m.disk <= machine_.disk_free}}}});
  }
  static constexpr std::array<const char*, 3> kStates{"yes", "partly", "no"};
  json verdicts = json::array();
  for (const Verdict& v : verdicts_) {
    verdicts.push_back({{"what", v.what},
                        {"verdict", kStates[static_cast<std::size_t>(v.state)]},
                        {"detail", v.detail},
                        {"todo", v.todo}});
  }
  json quota = nullptr, limit = nullptr;
  if (machine_.cpu_quota) quota = *machine_.cpu_quota;
  if (machine_.memory_limit) limit = *machine_.memory_limit;
  return {
      {"version", tool_version()},
      {"build", build},
      {"cpu",
       {{"name", machine_.cpu},
        {"features", machine_.features},
        {"processors", machine_.processors},
        {"usable", resolve_threads(0)},
        {"quota", quota},
        {"loops", {{"forward", calib::simd::kernels().target}, {"quantiser", libquant::kernels().name}}}}},
      {"memory",
       {{"total", machine_.memory_total}, {"available", machine_.memory_available}, {"limit", limit}}},
      {"disk", {{"free", machine_.disk_free}, {"writable", machine_.writable}}},
      {"gpu",
       {{"driver_found", gpu_.found},
        {"driver_version", gpu_.version},
        {"cuda_version", fmt::format("{}.{}", gpu_.cuda_version / 1000, gpu_.cuda_version % 1000 / 10)},
        {"problem", gpu_.problem},
        {"devices", devices}}},
      {"libraries", {{"openblas", blas_}, {"openblas_problem", blas_problem_}}},
      {"models", models},
      {"verdicts", verdicts}};
}

void Doctor::print(const Report& report) const {
  const auto row = [&](const char* name, const std::string& text) {
    report.line(fmt::format("{:<10} {}", name, text));
  };
  std::vector<std::string> with, without;
  for (const BuildFeature& f : features_) (f.present ? with : without).push_back(f.name);
  row("fireq", fmt::format("{}, with {}{}", tool_version(), fmt::join(with, ", "),
                           without.empty() ? "" : fmt::format("; without {}", fmt::join(without, ", "))));
  std::string cores = fmt::format("{} processors, {} usable", machine_.processors, resolve_threads(0));
  if (machine_.cpu_quota) cores += fmt::format(", {:.1f} by the control group's quota", *machine_.cpu_quota);
  row("processor", (machine_.cpu.empty() ? "" : machine_.cpu + ", ") + cores);
  row("", fmt::format("{}; loops run {} (forward pass) and {} (quantiser)",
                      machine_.features.empty() ? "no features known here"
                                                : fmt::format("{}", fmt::join(machine_.features, " ")),
                      calib::simd::kernels().target, libquant::kernels().name));
  std::string memory =
      fmt::format("{}, {} free", bytes_text(machine_.memory_total), bytes_text(machine_.memory_available));
  if (machine_.memory_limit)
    memory += fmt::format(" within the control group's {}", bytes_text(*machine_.memory_limit));
  row("memory", memory);
  row("disk", fmt::format("{} free in this folder{}", bytes_text(machine_.disk_free),
                          machine_.writable ? "" : ", which cannot be written"));
  if (!gpu_.found) {
    row("GPU", "no driver (" + gpu_.problem + ")");
  } else {
    row("driver",
        fmt::format("{}, CUDA {}.{}{}", gpu_.version.empty() ? "version unknown (no NVML)" : gpu_.version,
                    gpu_.cuda_version / 1000, gpu_.cuda_version % 1000 / 10,
                    gpu_.problem.empty() ? "" : "; " + gpu_.problem));
    for (const GpuInfo& g : gpu_.devices) {
      row("GPU", fmt::format("{}, compute capability {}, {} multiprocessors, {}; {}", g.name,
                             capability_text(g.compute_capability), g.multiprocessors, bytes_text(g.memory),
                             kernels_text(kernels_for(g.compute_capability))));
    }
  }
  row("BLAS", blas_problem_.empty() ? blas_ : blas_problem_);
  report.line("");
  for (const Verdict& v : verdicts_) {
    static constexpr std::array<std::pair<const char*, Colour>, 3> kMarks{
        {{"yes", Colour::green}, {"partly", Colour::yellow}, {"no", Colour::red}}};
    const auto& [word, colour] = kMarks[static_cast<std::size_t>(v.state)];
    report.line(fmt::format("{} {:<28} {}{}", coloured(STDOUT_FILENO, colour, fmt::format("{:<6}", word)),
                            v.what, v.detail, v.todo.empty() ? "" : "; " + v.todo));
  }
}

int run(const Arguments& a) {
  const Doctor doctor(a);
  const ConsoleProgress progress(a.common.quiet);
  const Report report(a.common, progress);
  doctor.print(report);
  report.json(doctor.to_json());
  for (const Verdict& v : doctor.verdicts()) {
    if (v.required && v.state == Verdict::State::no)
      throw Error(ErrorKind::environment, v.what + " cannot run: " + v.detail).hint(v.todo);
  }
  return 0;
}

}  // namespace

void add_doctor(CLI::App& app, Runner& runner) {
  auto a = std::make_shared<Arguments>();
  CLI::App* cmd =
      app.add_subcommand("doctor", "What this machine and this build can run, and what they lack");
  // For tests: another machine's files.
  cmd->add_option("--root", a->root, "Read proc/ and sys/ below this folder")->type_name("DIR")->group("");
  add_common_options(*cmd, a->common);
  cmd->footer(
      "Sizes are those of the memory model that quantize --dry-run prints, calibrated on 10 x 2048 tokens.\n"
      "Exit code 4 when a library that this program needs is broken; a lack is no failure.\n"
      "Examples:\n"
      "  fireq doctor\n"
      "  fireq doctor --json machine.json");
  cmd->callback([a, &runner] { runner = [a] { return run(*a); }; });
}

}  // namespace fireq::apps
