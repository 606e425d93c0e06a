#include "calib/tasks.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "calib/model_runner.hpp"
#include "calib/scoring.hpp"
#include "common/error.hpp"
#include "formats/file_system.hpp"
#include "formats/tokenizer.hpp"

namespace fireq::calib {
namespace {

constexpr std::uint64_t kLargestTaskFile = std::uint64_t{1} << 30U;
constexpr std::uint64_t kResidentBytes = std::uint64_t{1} << 30U;  // as evaluate(): larger models stream
constexpr std::uint64_t kChunkTokens = 8192;
constexpr const char* kSpaces = " \t\n\r";

class Line {
 public:
  Line(nlohmann::json object, std::string path, std::size_t number)
      : object_(std::move(object)), path_(std::move(path)), number_(number) {}

  // The first of these keys that is there.
  const nlohmann::json* find(std::span<const char* const> keys) const {
    for (const char* key : keys) {
      const auto found = object_.find(key);
      if (found != object_.end()) return &*found;
    }
    return nullptr;
  }
  [[noreturn]] void fail(const std::string& problem, const std::string& expected) const {
    throw Error(ErrorKind::input, "line " + std::to_string(number_) + ": " + problem)
        .path(path_)
        .expected(expected);
  }
  std::string text(const nlohmann::json& value, const char* what) const {
    if (!value.is_string()) fail(std::string(what) + " is no text", "a string");
    return value.get<std::string>();
  }

 private:
  nlohmann::json object_;
  std::string path_;
  std::size_t number_;
};

constexpr std::array<const char*, 5> kContextKeys{"query", "question", "context", "ctx", "input"};
constexpr std::array<const char*, 3> kChoiceKeys{"choices", "endings", "options"};
constexpr std::array<const char*, 4> kGoldKeys{"gold", "label", "answer", "answerKey"};
constexpr std::array<const char*, 1> kTextKey{"text"};

bool has_space_between(const std::string& context, const std::string& next) {
  const auto is_space = [](char c) { return std::string_view(kSpaces).find(c) != std::string_view::npos; };
  return context.empty() || next.empty() || is_space(context.back()) || is_space(next.front());
}

// An index, a label of the choices, or a letter.
std::size_t gold_of(const Line& line, const nlohmann::json& value, std::size_t choices,
                    const std::vector<std::string>& labels) {
  std::optional<std::size_t> index;
  if (value.is_number_integer()) {
    const auto number = value.get<std::int64_t>();
    if (number >= 0) index = static_cast<std::size_t>(number);
  } else if (value.is_string()) {
    const auto text = value.get<std::string>();
    const auto label = std::find(labels.begin(), labels.end(), text);
    if (label != labels.end()) {
      index = static_cast<std::size_t>(label - labels.begin());
    } else if (text.size() == 1 && text[0] >= 'A' && text[0] <= 'Z') {
      index = static_cast<std::size_t>(text[0] - 'A');
    } else if (text.size() == 1 && text[0] >= '0' && text[0] <= '9') {
      index = static_cast<std::size_t>(text[0] - '0');
    }
  }
  if (!index || *index >= choices)
    line.fail("the right choice is none of them",
              "an index below " + std::to_string(choices) + ", or a letter");
  return *index;
}

TaskItem choices_item(const Line& line, const nlohmann::json& context, const nlohmann::json& listed) {
  TaskItem item;
  item.context = line.text(context, "the context");
  std::vector<std::string> labels;
  const nlohmann::json* texts = &listed;
  if (listed.is_object()) {
    if (!listed.contains("text") || !listed.contains("label") || !listed["label"].is_array())
      line.fail("choices lack a key", R"("text" and "label")");
    texts = &listed["text"];
    for (const nlohmann::json& label : listed["label"]) labels.push_back(line.text(label, "a label"));
  }
  if (!texts->is_array() || texts->size() < 2) line.fail("choices are missing", "a list of two or more");
  for (const nlohmann::json& choice : *texts) {
    std::string text = line.text(choice, "a choice");
    if (text.find_first_not_of(kSpaces) == std::string::npos) line.fail("a choice is empty", "some text");
    item.choices.push_back(has_space_between(item.context, text) ? text : " " + text);
  }
  const nlohmann::json* gold = line.find(kGoldKeys);
  if (gold == nullptr)
    line.fail("the right choice is missing", R"("gold", "label", "answer" or "answerKey")");
  item.gold = gold_of(line, *gold, item.choices.size(), labels);
  return item;
}

TaskItem last_word_item(const Line& line, std::string text) {
  const std::size_t end = text.find_last_not_of(kSpaces);
  if (end != std::string::npos) text.resize(end + 1);
  const std::size_t space = text.find_last_of(kSpaces);
  if (end == std::string::npos || space == std::string::npos ||
      text.find_last_not_of(kSpaces, space) == std::string::npos)
    line.fail("the text has no last word to guess", "two words");
  return {text.substr(0, space), {text.substr(space)}, 0};
}

// Batches of sequences of about one length, padded behind: what follows a token does not change it.
struct Chunk {
  std::vector<std::size_t> members;
  std::uint64_t length = 0;
};

std::vector<Chunk> chunks_of(std::span<const TaskSequence> sequences) {
  std::vector<std::size_t> order(sequences.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return sequences[a].ids.size() < sequences[b].ids.size();
  });
  std::vector<Chunk> chunks;
  for (const std::size_t i : order) {
    const std::uint64_t length = sequences[i].ids.size();
    if (chunks.empty() || (chunks.back().members.size() + 1) * length > kChunkTokens) chunks.emplace_back();
    chunks.back().members.push_back(i);
    chunks.back().length = length;  // sorted: the longest so far
  }
  return chunks;
}

double share_stderr(double share, std::uint64_t count) {
  return count < 2 ? 0 : std::sqrt(share * (1 - share) / static_cast<double>(count - 1));
}

// Code points of valid UTF-8.
double characters(const std::string& text) {
  return static_cast<double>(std::count_if(
      text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0U) != 0x80U; }));
}

}  // namespace

std::vector<TaskItem> load_task_items(const std::string& path) {
  const std::string text = formats::read_text_file(path, kLargestTaskFile);
  formats::check_utf8(text, path);
  std::vector<TaskItem> items;
  std::size_t number = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view row = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (row.find_first_not_of(kSpaces) == std::string_view::npos) continue;
    nlohmann::json object = nlohmann::json::parse(row, nullptr, false);
    if (!object.is_object()) Line({}, path, number).fail("not a JSON object", "one a line");
    const Line line(std::move(object), path, number);
    const nlohmann::json* context = line.find(kContextKeys);
    const nlohmann::json* choices = line.find(kChoiceKeys);
    const nlohmann::json* whole = line.find(kTextKey);
    if (choices != nullptr) {
      if (context == nullptr)
        line.fail("choices without a context", R"("query", "question", "context", "ctx" or "input")");
      items.push_back(choices_item(line, *context, *choices));
    } else if (whole != nullptr) {
      items.push_back(last_word_item(line, line.text(*whole, "the text")));
    } else {
      line.fail("neither choices nor a text", R"("query" with "choices" and "gold", or "text")");
    }
    if ((items.back().choices.size() == 1) != (items.front().choices.size() == 1))
      line.fail("choices and last words are mixed", "one kind in a file");
  }
  if (items.empty()) throw Error(ErrorKind::input, "no item in the file").path(path);
  return items;
}

std::vector<SequenceScore> score_sequences(const WeightSource& model, std::span<const TaskSequence> sequences,
                                           const Precision& precision, int threads, Progress& progress) {
  for (const TaskSequence& s : sequences) {
    if (s.scored == 0 || s.ids.size() < s.scored + 1)
      throw Error(ErrorKind::internal, "a sequence has nothing to score, or nothing before it");
  }
  const formats::ModelConfig& config = model.config();
  const bool keep = layer_bytes(config) + head_bytes(config) <= kResidentBytes;
  ModelRunner runner(model, precision, threads, keep);
  OutputHead head(model, keep, OutputHead::part_rows_for(config.hidden), threads);
  std::vector<SequenceScore> scores(sequences.size());
  const std::vector<Chunk> chunks = chunks_of(sequences);
  progress.begin("tasks", sequences.size());
  std::uint64_t done = 0;
  for (const Chunk& chunk : chunks) {
    check_interrupt();
    std::vector<std::int32_t> ids(chunk.members.size() * chunk.length, 0);
    for (std::size_t m = 0; m < chunk.members.size(); ++m) {
      const std::vector<std::int32_t>& from = sequences[chunk.members[m]].ids;
      std::copy(from.begin(), from.end(), ids.begin() + static_cast<std::ptrdiff_t>(m * chunk.length));
    }
    std::vector<float> hidden(ids.size() * config.hidden);
    runner.run(ids, {chunk.members.size(), chunk.length, 0, 0}, {}, hidden, [](std::uint64_t) {});
    std::vector<float> rows;
    std::vector<std::int32_t> targets;
    for (std::size_t m = 0; m < chunk.members.size(); ++m) {
      const TaskSequence& s = sequences[chunk.members[m]];
      const std::uint64_t first = s.ids.size() - s.scored;
      const auto begin =
          hidden.begin() + static_cast<std::ptrdiff_t>((m * chunk.length + first - 1) * config.hidden);
      rows.insert(rows.end(), begin, begin + static_cast<std::ptrdiff_t>(s.scored * config.hidden));
      targets.insert(targets.end(), s.ids.begin() + static_cast<std::ptrdiff_t>(first), s.ids.end());
    }
    const std::vector<TokenScore> tokens = score_tokens(head, rows, targets, threads);
    auto token = tokens.begin();
    for (const std::size_t member : chunk.members) {
      SequenceScore& score = scores[member];
      score.greedy = true;
      for (std::uint64_t i = 0; i < sequences[member].scored; ++i, ++token) {
        score.log_likelihood -= token->nll;
        score.greedy = score.greedy && token->is_top1;
      }
    }
    done += chunk.members.size();
    progress.advance(done);
  }
  progress.end();
  return scores;
}

TaskSummary summarize_tasks(std::span<const TaskItem> items, std::span<const SequenceScore> scores) {
  TaskSummary result;
  result.items = items.size();
  std::uint64_t right = 0, right_norm = 0;
  std::size_t at = 0;
  for (const TaskItem& item : items) {
    const auto own = scores.subspan(at, item.choices.size());
    at += item.choices.size();
    result.gold_nll -= own[item.gold].log_likelihood;
    if (own.size() == 1) {
      right += own[0].greedy ? 1U : 0U;
      result.chosen.push_back(own[0].greedy ? 0 : 1);
      continue;
    }
    std::size_t best = 0, best_norm = 0;
    const auto norm = [&](std::size_t c) {
      const std::size_t text = item.choices[c].find_first_not_of(kSpaces);
      return own[c].log_likelihood / characters(item.choices[c].substr(text));
    };
    for (std::size_t c = 1; c < own.size(); ++c) {
      if (own[c].log_likelihood > own[best].log_likelihood) best = c;
      if (norm(c) > norm(best_norm)) best_norm = c;
    }
    result.chosen.push_back(best);
    right += best == item.gold ? 1U : 0U;
    right_norm += best_norm == item.gold ? 1U : 0U;
  }
  const auto n = static_cast<double>(items.size());
  result.gold_nll /= n;
  result.accuracy = static_cast<double>(right) / n;
  result.accuracy_stderr = share_stderr(result.accuracy, items.size());
  if (!items.empty() && items.front().choices.size() > 1) {
    result.accuracy_norm = static_cast<double>(right_norm) / n;
    result.accuracy_norm_stderr = share_stderr(*result.accuracy_norm, items.size());
  }
  return result;
}

}  // namespace fireq::calib
