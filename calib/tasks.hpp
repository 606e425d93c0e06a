// Zero-shot tasks: choices by likelihood, and last words, from JSONL files as lm-evaluation-harness users
// have them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "calib/forward.hpp"
#include "calib/weights.hpp"
#include "common/progress.hpp"

namespace fireq::calib {

// A context and its possible continuations. One continuation: a last word, right when the model would write
// it itself.
struct TaskItem {
  std::string context;
  std::vector<std::string> choices;  // each with the space that parts it from the context
  std::size_t gold = 0;
};

// A JSON object a line. Choices: the context under "query", "question", "context", "ctx" or "input"; a list
// of strings under "choices", "endings" or "options" (or ARC's {"text", "label"}); the right one under
// "gold", "label", "answer" or "answerKey", as an index, a letter or one of ARC's labels. Last word: "text"
// alone. Error(input) names the file, the line, and the key.
std::vector<TaskItem> load_task_items(const std::string& path);

// Ids of a context and a continuation; the last `scored` of them are the continuation's.
struct TaskSequence {
  std::vector<std::int32_t> ids;
  std::uint64_t scored = 0;
};
struct SequenceScore {
  double log_likelihood = 0;  // of the continuation, nats
  bool greedy = false;        // each of its tokens is the model's first choice
};
// Sequences of any lengths; a sequence has a token before its first scored one. The order of the results is
// theirs.
std::vector<SequenceScore> score_sequences(const WeightSource& model, std::span<const TaskSequence> sequences,
                                           const Precision& precision, int threads, Progress& progress);

struct TaskSummary {
  std::uint64_t items = 0;
  // Share of items whose gold continuation is the likeliest (last words: written greedily), and its standard
  // error.
  double accuracy = 0, accuracy_stderr = 0;
  // The same by log-likelihood per character of the continuation; choices only.
  std::optional<double> accuracy_norm, accuracy_norm_stderr;
  double gold_nll = 0;  // mean negative log-likelihood of the gold continuations, nats
  std::vector<std::size_t>
      chosen;  // per item, by log-likelihood; for a last word 0, or 1 when it is not written
};
// `scores` in the order of the items and their choices.
TaskSummary summarize_tasks(std::span<const TaskItem> items, std::span<const SequenceScore> scores);

}  // namespace fireq::calib
