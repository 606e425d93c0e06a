// From final hidden states to what evaluation reports: negative log-likelihoods, divergence from a reference
// model, logits. Logits are made tile by tile; [tokens, vocab] never exists unless it is what is asked for.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "calib/gemm.hpp"
#include "calib/weights.hpp"

namespace fireq::calib {

// The output head with the final norm: its matrix kept in panels, or read in parts each time.
class OutputHead {
 public:
  static constexpr std::uint64_t kPartBytes = std::uint64_t{64} << 20U;
  // keep: hold the whole matrix in memory ([vocab, hidden] FP32), else one part of at most 64 MiB. Heads that
  // are compared need the same part_rows (part_rows_for the wider of them).
  OutputHead(const WeightSource& source, bool keep, std::uint64_t part_rows, int threads);
  static std::uint64_t part_rows_for(std::uint64_t hidden, std::uint64_t bytes = kPartBytes) noexcept;

  std::uint64_t vocab() const noexcept { return vocab_; }
  std::uint64_t hidden() const noexcept { return hidden_; }
  std::uint64_t parts() const noexcept { return (vocab_ + part_rows_ - 1) / part_rows_; }
  std::uint64_t part_rows() const noexcept { return part_rows_; }  // a multiple of 32
  // Rows [index * part_rows(), ...) in panels; valid until the next call.
  const Panels& part(std::uint64_t index);
  double load_seconds() const noexcept { return load_seconds_; }  // spent reading and packing so far

  // Final norm of `rows` hidden states into out, row stride padded_stride(hidden).
  void normalise(std::span<const float> hidden, std::uint64_t rows, FloatBuffer& out) const;

 private:
  void load(std::uint64_t index, Panels& panels);

  const WeightSource& source_;
  const int threads_;
  const std::uint64_t vocab_, hidden_, part_rows_;
  const std::vector<float> norm_;
  bool keep_;
  std::vector<Panels> panels_;  // one per part, or one for all
  double load_seconds_ = 0;
};

struct TokenScore {
  double nll = 0;            // of the target, nats
  double kl = 0;             // KL(reference || model), with a reference
  double reference_nll = 0;  // of the target, with a reference
  bool is_top1 = false;      // no logit is larger than the target's
  bool same_top1 = false;    // with a reference
};

// hidden [rows, hidden] before the final norm, targets [rows].
std::vector<TokenScore> score_tokens(OutputHead& head, std::span<const float> hidden,
                                     std::span<const std::int32_t> targets, int threads);
// The same with a reference model's final hidden states of the same tokens. Both vocabularies are equal in
// size.
std::vector<TokenScore> score_tokens(OutputHead& head, std::span<const float> hidden, OutputHead& reference,
                                     std::span<const float> reference_hidden,
                                     std::span<const std::int32_t> targets, int threads);

// Mean KL(reference || model) per row of each of `models`, whose final hidden states [rows, hidden] go
// through the same head as the reference's. The reference's logits are made once for all models; normalised
// copies of all hidden states are held at once.
std::vector<double> mean_divergences(OutputHead& head, std::span<const std::vector<float>> models,
                                     std::span<const float> reference, int threads);

// Logits [rows, vocab].
void write_logits(OutputHead& head, std::span<const float> hidden, std::span<float> logits, int threads);

}  // namespace fireq::calib
