#include "apps/tasks.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "calib/tasks.hpp"
#include "common/error.hpp"

namespace fireq::apps {
namespace {

#ifdef FIREQ_TOKENIZERS

// Context and continuation are encoded together, as they would stand in a text; the continuation's tokens are
// those after as many as the context alone makes.
calib::TaskSequence sequence_of(const formats::Tokenizer& tokenizer, const std::string& context,
                                const std::string& choice, std::optional<std::int32_t> bos,
                                std::uint64_t limit) {
  // Spaces at the context's end belong to the continuation's first token.
  const std::size_t last = context.find_last_not_of(" \t\n\r");
  const std::string head = context.substr(0, last == std::string::npos ? 0 : last + 1);
  const std::vector<std::int32_t> before = tokenizer.encode(head, false);
  std::vector<std::int32_t> ids = tokenizer.encode(context + choice, false);
  calib::TaskSequence sequence;
  sequence.scored = ids.size() > before.size() ? ids.size() - before.size() : 1;
  if (bos) ids.insert(ids.begin(), *bos);
  if (ids.size() > limit) ids.erase(ids.begin(), ids.end() - static_cast<std::ptrdiff_t>(limit));
  sequence.scored = std::min<std::uint64_t>(sequence.scored, ids.size() - 1);  // a token before the first one
  sequence.ids = std::move(ids);
  return sequence;
}

#endif

}  // namespace

nlohmann::json run_tasks(const TaskArguments& arguments, const std::string& folder,
                         const calib::WeightSource& model, const calib::WeightSource* reference,
                         const calib::Precision& precision, int threads, const Report& report,
                         Progress& progress) {
#ifdef FIREQ_TOKENIZERS
  const auto tokenizer = formats::open_tokenizer(folder);
  const bool with_bos =
      arguments.bos.empty() ? tokenizer->default_bos != formats::BosMode::none : arguments.bos != "none";
  const std::optional<std::int32_t> bos = with_bos ? tokenizer->bos_id : std::nullopt;
  nlohmann::json list = nlohmann::json::array();
  for (const std::string& file : arguments.files) {
    const std::vector<calib::TaskItem> items = calib::load_task_items(file);
    std::vector<calib::TaskSequence> sequences;
    for (std::size_t i = 0; i < items.size(); ++i) {
      for (const std::string& choice : items[i].choices) {
        sequences.push_back(sequence_of(*tokenizer, items[i].context, choice, bos, arguments.context));
        const calib::TaskSequence& s = sequences.back();
        if (s.ids.size() < 2) {
          throw Error(ErrorKind::input, fmt::format("item {} has no token before its continuation", i))
              .path(file)
              .hint("give it a context, or --bos head");
        }
        const auto outside = std::find_if(s.ids.begin(), s.ids.end(), [&](std::int32_t id) {
          return std::cmp_less(id, 0) || std::cmp_greater_equal(id, model.config().vocab);
        });
        if (outside != s.ids.end()) {
          throw Error(ErrorKind::input,
                      "tokenizer and model do not belong together: token id is outside the embedding")
              .path(folder)
              .expected("below " + std::to_string(model.config().vocab))
              .found(std::to_string(*outside));
        }
      }
    }
    const auto summary = [&](const calib::WeightSource& source, const calib::Precision& how) {
      return calib::summarize_tasks(items, calib::score_sequences(source, sequences, how, threads, progress));
    };
    const calib::TaskSummary result = summary(model, precision);
    nlohmann::json entry = {{"task", file},
                            {"items", result.items},
                            {"acc", result.accuracy},
                            {"acc_stderr", result.accuracy_stderr},
                            {"gold_nll", result.gold_nll}};
    std::string line = fmt::format("{}: {} items, acc {:.4f} +- {:.4f}", file, result.items, result.accuracy,
                                   result.accuracy_stderr);
    if (result.accuracy_norm) {
      entry["acc_norm"] = *result.accuracy_norm;
      entry["acc_norm_stderr"] = *result.accuracy_norm_stderr;
      line += fmt::format(", by length {:.4f}", *result.accuracy_norm);
    }
    line += fmt::format(", nll of the right one {:.4f}", result.gold_nll);
    if (reference != nullptr) {
      const calib::TaskSummary other = summary(*reference, {});
      std::uint64_t same = 0;
      for (std::size_t i = 0; i < items.size(); ++i) same += result.chosen[i] == other.chosen[i] ? 1U : 0U;
      const double share = static_cast<double>(same) / static_cast<double>(items.size());
      entry["reference"] = {{"acc", other.accuracy}, {"gold_nll", other.gold_nll}};
      entry["same_choice"] = share;
      line += fmt::format("; reference {:.4f}, {:.2f} % answered alike", other.accuracy, 100 * share);
    }
    report.line(line);
    list.push_back(std::move(entry));
  }
  return list;
#else
  (void)arguments, (void)model, (void)reference, (void)precision, (void)threads, (void)report, (void)progress;
  throw Error(ErrorKind::environment, "this build has no tokenizers").path(folder);
#endif
}

}  // namespace fireq::apps
