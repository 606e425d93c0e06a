// Smoothing factors (docs/numerics.md, "Smoothing"): channel-wise scaling of weights, and RoPE-aware scaling
// of keys. Functions compute factors and scale FP32 matrices in place; who owns which matrix is the caller's
// business. Sums are FP64 in row order. Error(internal) when shapes disagree, Error(input) for weights or
// statistics that are not finite, Error(usage) for constants that are not positive.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fireq::libquant {

// W [rows, cols] row-major.
struct MatrixRef {
  std::span<float> data;
  std::uint64_t rows = 0;
  std::uint64_t cols = 0;
};
struct ConstMatrixRef {
  std::span<const float> data;
  std::uint64_t rows = 0;
  std::uint64_t cols = 0;
};

struct ChannelScales {
  std::vector<float> lambda;  // one per input channel
  std::uint64_t clamped = 0;  // how many hit [2^-8, 2^8] x median
  std::uint64_t zero = 0;     // zero columns, left at 1
};

// lambda_j = c / mean_o |w_oj| over all rows of all matrices that read the input (same cols); clamped to
// [2^-8, 2^8] times the median over the columns that are not zero.
ChannelScales channel_scales(std::span<const ConstMatrixRef> readers, double c);
// Lambda_1: o_proj [H, heads*D]; one lambda per value channel (g, d) from the R = heads/kv_heads columns it
// feeds. lambda has kv_heads*D entries.
ChannelScales value_channel_scales(const ConstMatrixRef& o_proj, std::uint64_t heads, std::uint64_t kv_heads,
                                   std::uint64_t head_dim, double c);
// The release's scalar Lambda_1: every value channel gets 1 / v_factor, so that v rows (divided by lambda)
// become W_v * v_factor and o columns W_o / v_factor. kv_heads*D entries.
std::vector<float> uniform_value_scales(std::uint64_t kv_heads, std::uint64_t head_dim,
                                        double v_factor = 0.9);
// Spreads value channel factors (kv_heads*D) to o_proj's columns (heads*D).
std::vector<float> expand_value_channels(std::span<const float> lambda, std::uint64_t heads,
                                         std::uint64_t kv_heads, std::uint64_t head_dim);

void scale_columns(const MatrixRef& w, std::span<const float> factor);
void divide_rows(const MatrixRef& w, std::span<const float> factor);
void scale_rows(const MatrixRef& w, std::span<const float> factor);
void divide(std::span<float> v, std::span<const float> factor);
void scale(std::span<float> v, std::span<const float> factor);

// Keys. D = head_dim, pairs are (i, i + D/2).
struct KeySmoothing {
  std::vector<float> n;  // [kv_heads, D], 1 where off; K rows *n, Q rows /n (offline)
  std::vector<float> s;  // [kv_heads, D], 1 where off; K *s, Q /s after RoPE (online)
};
struct KeySmoothingOptions {
  bool use_n = true;
  bool use_s = true;
  bool shared_heads = false;  // QK-norm with one weight vector for all heads: one N for all
  double alpha = 8;
  double beta = 8;
  double n_exponent = 1;  // N = (alpha/r)^e; by size: in proportion to query^(1-e) / key^e
  double s_exponent = 1;
  std::uint64_t top_k = 0;  // 0: max(1, round(D/16))
};
// pair_radius [kv_heads, D/2]: r; post_rope_absmax [kv_heads, D]: m, without N. A zero r or m
// (or one whose factor FP32 cannot hold) leaves 1. Equal maxima: the lower channel enters T first. With use_s
// off there is no T' and N stays everywhere.
KeySmoothing key_smoothing(std::span<const float> pair_radius, std::span<const float> post_rope_absmax,
                           std::uint64_t kv_heads, std::uint64_t head_dim,
                           const KeySmoothingOptions& options);

// The same factors from what queries and keys are like on the whole, not from the keys' maxima alone
// (docs/numerics.md, "Factors from moments"). query_size [kv_heads, D]: root mean square of the group's
// queries after RoPE; key_size [kv_heads, D]: fourth root of the mean fourth power of the keys after RoPE.
// top_k is a number of pairs here; beta is not used: the largest key_size of a head, times its factor,
// becomes alpha.
KeySmoothing key_smoothing_by_size(std::span<const double> query_size, std::span<const double> key_size,
                                   std::uint64_t kv_heads, std::uint64_t head_dim,
                                   const KeySmoothingOptions& options);

// An orthogonal matrix R [dim, dim] row-major that spreads each value channel over all of them: the cosine
// transform of type II, R[d][e] = sqrt(2 / dim) cos(pi (2d + 1) e / (2 dim)), column 0 over sqrt 2.
std::vector<double> spreading_rotation(std::uint64_t dim);
// W_v's rows (and its bias, or empty) of each KV head become R^T times them, and o_proj's columns of each
// query head are multiplied by R from the right: the product stays what it was.
void rotate_values(const MatrixRef& v_proj, std::span<float> v_bias, const MatrixRef& o_proj,
                   std::uint64_t heads, std::uint64_t kv_heads, std::uint64_t head_dim);

}  // namespace fireq::libquant
