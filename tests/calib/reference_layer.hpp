// One decoder layer as docs/forward-pass.md defines it, in double and without any cleverness: every rounding
// that belongs to the definition is made by a search for the nearest value, every sum is a plain loop.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "calib/forward.hpp"
#include "libquant/kv_rounding.hpp"
#include "tests/calib/support.hpp"

namespace fireq::test {

using Doubles = std::vector<double>;

struct ReferenceResult {
  std::array<Doubles, formats::kSites> site;
  Doubles hidden;
  Doubles& at(formats::Site s) { return site[static_cast<std::size_t>(s)]; }
};

// Deliberate mistakes, to see that a test would notice them.
struct Mistake {
  bool block_wide_maximum = false;  // P8's largest value scale taken over keys the query does not see
  bool global_maximum = false;      // probabilities relative to the last running maximum, not the block's
  bool denominator_of_p8 = false;
  bool forget_window = false;
};

class ReferenceLayer {
 public:
  ReferenceLayer(const formats::ModelConfig& config, const calib::LayerWeights& weights, std::uint64_t layer,
                 const calib::Precision& precision, Mistake mistake = {})
      : c_(config), w_(weights), p_(precision), mistake_(mistake), window_(config.sliding_window[layer]) {}

  // One sequence: hidden [length, hidden].
  ReferenceResult run(const std::vector<float>& hidden, std::uint64_t length) const {
    ReferenceResult out;
    out.hidden.assign(hidden.begin(), hidden.end());
    Doubles& h = out.hidden;
    const std::uint64_t d = c_.head_dim;

    Doubles& x = out.at(formats::Site::attn_in);
    x = norm_rows(h, w_.attn_norm, c_.hidden);
    Doubles q = linear(calib::kQ, x, length);
    Doubles k = linear(calib::kK, x, length);
    Doubles v = linear(calib::kV, x, length);
    out.at(formats::Site::v) = v;
    if (!w_.q_norm.empty()) q = norm_rows(q, w_.q_norm, d);
    if (!w_.k_norm.empty()) k = norm_rows(k, w_.k_norm, d);
    out.at(formats::Site::k_pre_rope) = k;
    rope(q, length, c_.heads);
    rope(k, length, c_.kv_heads);
    if (!w_.k_post_rope_shift.empty()) {
      for (std::size_t i = 0; i < k.size(); ++i) {
        k[i] -= static_cast<double>(w_.k_post_rope_shift[i % (c_.kv_heads * d)]);
      }
    }
    if (!w_.k_post_rope_scale.empty()) {
      for (std::size_t i = 0; i < k.size(); ++i) k[i] *= smooth(i % (c_.kv_heads * d));
      for (std::size_t i = 0; i < q.size(); ++i) {
        const std::size_t head = i / d % c_.heads / (c_.heads / c_.kv_heads);
        q[i] /= smooth(head * d + i % d);
      }
    }
    out.at(formats::Site::q) = q;
    out.at(formats::Site::k_post_rope) = k;

    Doubles& o = out.at(formats::Site::o_in);
    o = attention(q, k, v, length);
    add(h, linear(calib::kO, o, length));
    Doubles& m = out.at(formats::Site::mlp_in);
    m = norm_rows(h, w_.mlp_norm, c_.hidden);
    const Doubles gate = linear(calib::kGate, m, length);
    const Doubles up = linear(calib::kUp, m, length);
    Doubles& a = out.at(formats::Site::down_in);
    for (std::size_t i = 0; i < gate.size(); ++i) a.push_back(gate[i] / (1 + std::exp(-gate[i])) * up[i]);
    add(h, linear(calib::kDown, a, length));
    return out;
  }

  // One linear of `length` tokens with its quantisation.
  Doubles linear(std::size_t which, const Doubles& input, std::uint64_t length) const {
    const calib::LinearWeights& l = w_.linear[which];
    Doubles x = input;
    Doubles a(length, 1);
    if (p_.fp8_activations) {
      for (std::uint64_t t = 0; t < length; ++t) {
        // a and the quotient are FP32 by definition: bf16 inputs over a bf16 maximum often fall on a tie.
        float largest = 0x1p-20F;
        for (std::uint64_t k = 0; k < l.cols; ++k) {
          x[t * l.cols + k] = nearest_bf16(x[t * l.cols + k]);
          largest = std::max(largest, std::fabs(static_cast<float>(x[t * l.cols + k])));
        }
        const float scale = largest * (1.0F / 448.0F);
        a[t] = static_cast<double>(scale);
        for (std::uint64_t k = 0; k < l.cols; ++k) {
          const float quotient = static_cast<float>(x[t * l.cols + k]) / scale;
          x[t * l.cols + k] = nearest_e4m3(static_cast<double>(quotient));
        }
      }
    }
    Doubles y(length * l.rows);
    for (std::uint64_t t = 0; t < length; ++t) {
      for (std::uint64_t n = 0; n < l.rows; ++n) {
        double sum = 0;
        for (std::uint64_t k = 0; k < l.cols; ++k) {
          sum += x[t * l.cols + k] * static_cast<double>(l.weight[n * l.cols + k]);
        }
        const double r =
            l.row_scale.empty() ? 1 : static_cast<double>(l.row_scale[l.row_scale.size() == 1 ? 0 : n]);
        sum *= a[t] * r;
        if (!l.bias.empty()) sum += static_cast<double>(l.bias[n]);
        y[t * l.rows + n] = p_.fp8_activations ? nearest_bf16(sum) : sum;
      }
    }
    return y;
  }

  // Attention of queries and keys after RoPE and smoothing, with its quantisation.
  Doubles attention(Doubles q, Doubles k, Doubles v, std::uint64_t length) const {
    const std::uint64_t d = c_.head_dim;
    Doubles sigma_k(length * c_.kv_heads, 1);
    Doubles sigma_v(length * c_.kv_heads, 1);
    for (std::uint64_t i = 0; i < length * c_.kv_heads; ++i) {
      const auto codes = [&](double* x, const std::vector<float>& rounding, libquant::KvPart part) {
        if (rounding.empty()) return quantize_kv(x, d);
        std::vector<float> row(x, x + d);  // libquant's own tests have a reference for what follows
        const std::uint64_t size = libquant::kv_rounding_size(d);
        const float sigma = libquant::quantize_kv_together(
            row, std::span(rounding).subspan(i % c_.kv_heads * size, size), part);
        std::copy(row.begin(), row.end(), x);
        return static_cast<double>(sigma);
      };
      if (p_.int4_k) sigma_k[i] = codes(k.data() + i * d, w_.k_rounding, libquant::KvPart::key);
      if (p_.int4_v) sigma_v[i] = codes(v.data() + i * d, w_.v_rounding, libquant::KvPart::value);
    }
    Doubles out(q.size());
    for (std::uint64_t t = 0; t < length; ++t) {
      for (std::uint64_t h = 0; h < c_.heads; ++h) {
        const std::uint64_t g = h / (c_.heads / c_.kv_heads);
        double* query = q.data() + (t * c_.heads + h) * d;
        double scale = 1 / std::sqrt(static_cast<double>(d));
        if (p_.fp8_q) {
          double largest = std::ldexp(1, -20);
          for (std::uint64_t i = 0; i < d; ++i) largest = std::max(largest, std::fabs(query[i]));
          for (std::uint64_t i = 0; i < d; ++i) query[i] = nearest_e4m3(query[i] / (largest / 448));
          scale *= largest / 448;
        }
        const std::uint64_t first =
            window_ == 0 || mistake_.forget_window || t + 1 < window_ ? 0 : t + 1 - window_;
        Doubles score(length, 0);
        double last_top = -1e300;
        for (std::uint64_t j = first; j <= t; ++j) {
          for (std::uint64_t i = 0; i < d; ++i) score[j] += query[i] * k[(j * c_.kv_heads + g) * d + i];
          score[j] *= scale * sigma_k[j * c_.kv_heads + g];
          last_top = std::max(last_top, score[j]);
        }
        double top = -1e300;
        double total = 0;
        Doubles sum(d, 0);
        for (std::uint64_t block = first / 128; block <= t / 128; ++block) {
          const std::uint64_t low = std::max(first, block * 128);
          const std::uint64_t high = std::min(t + 1, (block + 1) * 128);
          const double before = top;
          for (std::uint64_t j = low; j < high; ++j) top = std::max(top, score[j]);
          if (mistake_.global_maximum) top = last_top;
          const double keep = std::exp(before - top);
          double largest_sigma = 0;
          for (std::uint64_t j = block * 128; j < std::min(length, (block + 1) * 128); ++j) {
            if (mistake_.block_wide_maximum || (j >= low && j < high)) {
              largest_sigma = std::max(largest_sigma, sigma_v[j * c_.kv_heads + g]);
            }
          }
          total *= keep;
          for (double& s : sum) s *= keep;
          for (std::uint64_t j = low; j < high; ++j) {
            const double p = std::exp(score[j] - top);
            double weight = p * sigma_v[j * c_.kv_heads + g];
            if (p_.fp8_p) weight = nearest_e4m3(448 * weight / largest_sigma) * largest_sigma / 448;
            total += mistake_.denominator_of_p8 ? weight / sigma_v[j * c_.kv_heads + g] : p;
            for (std::uint64_t i = 0; i < d; ++i) sum[i] += weight * v[(j * c_.kv_heads + g) * d + i];
          }
        }
        for (std::uint64_t i = 0; i < d; ++i) out[(t * c_.heads + h) * d + i] = sum[i] / total;
      }
    }
    return out;
  }

 private:
  static void add(Doubles& to, const Doubles& from) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] += from[i];
  }
  double smooth(std::size_t i) const { return static_cast<double>(w_.k_post_rope_scale[i]); }

  Doubles norm_rows(const Doubles& x, const std::vector<float>& weight, std::uint64_t n) const {
    Doubles out(x.size());
    for (std::size_t row = 0; row < x.size() / n; ++row) {
      double square = 0;
      for (std::size_t i = 0; i < n; ++i) square += x[row * n + i] * x[row * n + i];
      const double inverse = 1 / std::sqrt(square / static_cast<double>(n) + c_.rms_eps);
      for (std::size_t i = 0; i < n; ++i) {
        out[row * n + i] = x[row * n + i] * inverse * static_cast<double>(weight[i]);
      }
    }
    return out;
  }

  void rope(Doubles& x, std::uint64_t length, std::uint64_t heads) const {
    const std::uint64_t d = c_.head_dim;
    const std::vector<float> frequency = formats::rope_inverse_frequencies(c_);
    for (std::uint64_t t = 0; t < length; ++t) {
      for (std::uint64_t h = 0; h < heads; ++h) {
        double* p = x.data() + (t * heads + h) * d;
        for (std::uint64_t i = 0; i < d / 2; ++i) {
          const double angle = static_cast<double>(static_cast<float>(t) * frequency[i]);
          const double a = p[i];
          const double b = p[i + d / 2];
          p[i] = a * std::cos(angle) - b * std::sin(angle);
          p[i + d / 2] = b * std::cos(angle) + a * std::sin(angle);
        }
      }
    }
  }

  // Codes in place, their scale returned.
  static double quantize_kv(double* x, std::uint64_t n) {
    double largest = 0;
    for (std::uint64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(x[i]));
    const double sigma = std::max(nearest_e4m3(largest / 7), std::ldexp(1, -9));
    for (std::uint64_t i = 0; i < n; ++i) x[i] = std::nearbyint(std::clamp(x[i] / sigma, -7.0, 7.0));
    return sigma;
  }

  const formats::ModelConfig& c_;
  const calib::LayerWeights& w_;
  const calib::Precision p_;
  const Mistake mistake_;
  const std::uint64_t window_;
};

}  // namespace fireq::test
