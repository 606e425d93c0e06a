// Byte pair encoding. The pair of neighbours with the lowest rank is merged first, the leftmost of equals; a
// heap of candidates makes that O(n log n) in the length of the piece, because a pipeline without
// pre-tokenizer (Llama 2) hands a whole book over as one piece. Candidates are not removed when a neighbour
// changes; they are recognised as stale when popped, by the token they would make, exactly as the tokenizers
// library does: with several merges that make one token this decides some ties.
#include <algorithm>
#include <bit>
#include <cstdio>
#include <limits>
#include <utility>

#include "common/error.hpp"
#include "formats/tokenizer_parts.hpp"
#include "formats/unicode.hpp"

namespace fireq::formats {
namespace {

constexpr std::uint64_t pair_key(std::int32_t left, std::int32_t right) noexcept {
  return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32U) |
         static_cast<std::uint32_t>(right);
}

constexpr std::uint64_t scatter(std::uint64_t key) noexcept {
  key *= 0x9E3779B97F4A7C15U;
  return key ^ (key >> 32U);
}

}  // namespace

BpeModel::BpeModel(const JsonFields& fields) {
  const std::string type = fields.text_or("type", "BPE");
  if (type != "BPE") fields.fail("type", "names a model that is not supported", "BPE");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!fields.text_or(key, "").empty()) fields.fail(key, "is not supported", "null or \"\"");
  }
  if (const nlohmann::json* dropout = fields.find("dropout"); dropout != nullptr && *dropout != 0) {
    fields.fail("dropout", "makes the tokens random, which is not supported", "null");
  }
  byte_fallback_ = fields.boolean_or("byte_fallback", false);
  ignore_merges_ = fields.boolean_or("ignore_merges", false);
  fuse_unk_ = fields.boolean_or("fuse_unk", false);
  read_vocab(fields);
  read_merges(fields);
  if (fields.find("unk_token") != nullptr) {
    const std::optional<std::int32_t> id = id_of(fields.text("unk_token"));
    if (!id) fields.fail("unk_token", "is not in the vocabulary");
    unk_ = *id;
  }
}

void BpeModel::read_vocab(const JsonFields& fields) {
  const JsonFields entries = fields.object("vocab");
  vocab_.reserve(entries.value().size());
  std::vector<bool> used;
  for (const auto& item : entries.value().items()) {
    const nlohmann::json& value = item.value();
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() > kLargestTokenId) {
      entries.fail(item.key(), "has no usable token id",
                   "an integer from 0 to " + std::to_string(kLargestTokenId));
    }
    const auto id = value.get<std::size_t>();
    if (id >= used.size()) used.resize(std::max(id + 1, used.size() * 2));
    if (used[id]) entries.fail(item.key(), "has the id of another token");
    used[id] = true;
    vocab_.emplace(item.key(), static_cast<std::int32_t>(id));
  }

  short_characters_.fill(-1);
  for (char32_t c = 0; c < short_characters_.size(); ++c) {
    std::string text;
    append_utf8(c, text);
    if (const auto id = id_of(text)) short_characters_[c] = *id;
  }
  byte_tokens_.fill(-1);
  for (unsigned b = 0; b < 256; ++b) {
    std::array<char, 8> name{};
    std::snprintf(name.data(), name.size(), "<0x%02X>", b);
    if (const auto id = id_of(name.data())) byte_tokens_[b] = *id;
  }
}

void BpeModel::read_merges(const JsonFields& fields) {
  const nlohmann::json& list = fields.array("merges");
  if (list.size() > std::numeric_limits<std::uint32_t>::max() / 4) fields.fail("merges", "is too long");
  merges_.assign(std::bit_ceil(std::max<std::size_t>(16, list.size() * 2)), Merge{});
  mask_ = merges_.size() - 1;
  std::string joined;
  for (std::size_t i = 0; i < list.size(); ++i) {
    const nlohmann::json& item = list[i];
    const auto fail = [&](const std::string& problem) {
      throw Error(ErrorKind::input,
                  "key '" + fields.where() + "merges[" + std::to_string(i) + "]' " + problem)
          .path(fields.path())
          .expected(R"("left right" or ["left", "right"] of tokens in the vocabulary)")
          .found(json_excerpt(item));
    };
    std::string_view left, right;
    if (item.is_string()) {
      const std::string_view text = item.get_ref<const std::string&>();
      const std::size_t space = text.find(' ');
      if (space == std::string_view::npos || text.find(' ', space + 1) != std::string_view::npos) {
        fail("is not two tokens");
      }
      left = text.substr(0, space);
      right = text.substr(space + 1);
    } else if (item.is_array() && item.size() == 2 && item[0].is_string() && item[1].is_string()) {
      left = item[0].get_ref<const std::string&>();
      right = item[1].get_ref<const std::string&>();
    } else {
      fail("is not two tokens");
    }
    joined.assign(left);
    joined += right;
    const auto left_id = id_of(left);
    const auto right_id = id_of(right);
    const auto joined_id = id_of(joined);
    if (!left_id || !right_id) fail("names a token that is not in the vocabulary");
    if (!joined_id) fail("makes a token that is not in the vocabulary");
    insert_merge({pair_key(*left_id, *right_id), static_cast<std::uint32_t>(i), *joined_id});
  }
}

void BpeModel::insert_merge(const Merge& merge) {
  std::uint64_t at = scatter(merge.pair) & mask_;
  while (merges_[at].pair != merge.pair && merges_[at].pair != ~std::uint64_t{0}) at = (at + 1) & mask_;
  merges_[at] = merge;  // of two equal pairs the later one counts
}

const BpeModel::Merge* BpeModel::find_merge(std::int32_t left, std::int32_t right) const noexcept {
  const std::uint64_t key = pair_key(left, right);
  for (std::uint64_t at = scatter(key) & mask_;; at = (at + 1) & mask_) {
    if (merges_[at].pair == key) return &merges_[at];
    if (merges_[at].pair == ~std::uint64_t{0}) return nullptr;
  }
}

std::optional<std::int32_t> BpeModel::id_of(std::string_view token) const {
  const auto at = vocab_.find(token);
  if (at == vocab_.end()) return {};
  return at->second;
}

std::int32_t BpeModel::character_id(std::string_view character) const {
  if (character.size() <= 2) return short_characters_[utf8_step(character, 0).code_point];
  return id_of(character).value_or(-1);
}

void BpeModel::split_characters(std::string_view piece, std::vector<Scratch::Symbol>& symbols) const {
  symbols.clear();
  const auto push = [&](std::int32_t id) {
    Scratch::Symbol symbol;
    symbol.id = id;
    symbols.push_back(symbol);
  };
  // An unknown character is held back until the next known one, so that a run of them can become one.
  bool unknown = false;
  for (std::size_t at = 0; at < piece.size();) {
    const std::size_t length = utf8_step(piece, at).length;
    const std::string_view character = piece.substr(at, length);
    at += length;
    if (const std::int32_t id = character_id(character); id >= 0) {
      if (std::exchange(unknown, false)) push(unk_);
      push(id);
      continue;
    }
    if (byte_fallback_) {
      const auto token = [&](char c) { return byte_tokens_[static_cast<unsigned char>(c)]; };
      if (std::all_of(character.begin(), character.end(), [&](char c) { return token(c) >= 0; })) {
        for (const char c : character) push(token(c));
        continue;
      }
    }
    if (unk_ < 0) continue;  // dropped without a trace, as in the original
    if (unknown && !fuse_unk_) push(unk_);
    unknown = true;
  }
  if (unknown) push(unk_);
  for (std::size_t i = 0; i < symbols.size(); ++i) {
    symbols[i].previous = static_cast<std::int64_t>(i) - 1;
    symbols[i].next = i + 1 < symbols.size() ? static_cast<std::int64_t>(i) + 1 : -1;
  }
}

void BpeModel::encode(std::string_view piece, Scratch& scratch, std::vector<std::int32_t>& out) const {
  if (ignore_merges_) {
    if (const auto id = id_of(piece)) {
      out.push_back(*id);
      return;
    }
  }
  std::vector<Scratch::Symbol>& symbols = scratch.symbols;
  std::vector<Scratch::Candidate>& heap = scratch.heap;
  split_characters(piece, symbols);
  if (symbols.size() > std::numeric_limits<std::uint32_t>::max()) {
    throw Error(ErrorKind::input, "a piece of text is too long for the tokenizer");
  }

  heap.clear();
  const auto candidate = [&](std::size_t left, std::size_t right) -> std::optional<Scratch::Candidate> {
    const Merge* merge = find_merge(symbols[left].id, symbols[right].id);
    if (merge == nullptr) return {};
    return Scratch::Candidate{(static_cast<std::uint64_t>(merge->rank) << 32U) | left, merge->id};
  };
  const auto push = [&](std::int64_t left, std::int64_t right) {
    if (const auto found = candidate(static_cast<std::size_t>(left), static_cast<std::size_t>(right))) {
      heap.push_back(*found);
      std::push_heap(heap.begin(), heap.end(), std::greater<>{});
    }
  };
  for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
    if (const auto found = candidate(i, i + 1)) heap.push_back(*found);
  }
  std::make_heap(heap.begin(), heap.end(), std::greater<>{});
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>{});
    const Scratch::Candidate top = heap.back();
    heap.pop_back();
    const std::size_t at = top.order & 0xFFFFFFFFU;
    Scratch::Symbol& left = symbols[at];
    if (left.gone || left.next < 0) continue;
    Scratch::Symbol& right = symbols[static_cast<std::size_t>(left.next)];
    const Merge* merge = find_merge(left.id, right.id);
    if (merge == nullptr || merge->id != top.id) continue;  // stale
    left.id = merge->id;
    right.gone = true;
    left.next = right.next;
    if (left.next >= 0) symbols[static_cast<std::size_t>(left.next)].previous = static_cast<std::int64_t>(at);
    if (left.previous >= 0) push(left.previous, static_cast<std::int64_t>(at));
    if (left.next >= 0) push(static_cast<std::int64_t>(at), left.next);
  }
  for (const Scratch::Symbol& symbol : symbols) {
    if (!symbol.gone) out.push_back(symbol.id);
  }
}

}  // namespace fireq::formats
