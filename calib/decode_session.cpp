#include "calib/decode_session.hpp"

#include <algorithm>

#include "common/error.hpp"

namespace fireq::calib {

DecodeSession::DecodeSession(const WeightSource& source, const Precision& precision, int threads)
    : source_(source),
      threads_(threads),
      runner_(source, precision, threads, true),
      head_(source, true, OutputHead::part_rows_for(source.config().hidden), threads) {
  for (std::uint64_t layer = 0; layer < source.config().layers; ++layer) {
    caches_.emplace_back(1, source.config().kv_heads, source.config().head_dim, KvCache::kBlock);
  }
}

std::vector<float> DecodeSession::step(std::span<const std::int32_t> new_ids) {
  if (new_ids.empty()) throw Error(ErrorKind::usage, "no token to continue from");
  const formats::ModelConfig& config = source_.config();
  const Batch batch{1, new_ids.size(), length_, 0};
  for (KvCache& cache : caches_) {
    // Doubled, so that copying what is there costs less than computing it.
    const std::uint64_t needed = length_ + new_ids.size();
    if (cache.capacity() < needed) cache.reserve(std::max(needed, 2 * cache.capacity()));
  }
  std::vector<float> hidden(new_ids.size() * config.hidden);
  runner_.run(new_ids, batch, caches_, hidden, [](std::uint64_t) {});
  length_ += new_ids.size();
  std::vector<float> logits(config.vocab);
  write_logits(head_, std::span(hidden).last(config.hidden), logits, threads_);
  return logits;
}

}  // namespace fireq::calib
