#include "calib/diff.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "calib/folding.hpp"
#include "common/parallel.hpp"
#include "libquant/blas.hpp"

namespace fireq::calib {
namespace {

namespace blas = libquant::blas;

constexpr std::uint64_t kElementsPerTask = std::uint64_t{1} << 18U;
constexpr std::uint64_t kColumnsPerTask = 256;

// |B - A|^2 and |A|^2.
struct Squares {
  double difference = 0, a = 0, b = 0;
  void add(const Squares& o) {
    difference += o.difference;
    a += o.a;
    b += o.b;
  }
  double relative() const {
    if (a > 0) return std::sqrt(std::max(0.0, difference) / a);
    return difference > 0 || b > 0 ? 1 : 0;
  }
};

Squares sum(const std::vector<Squares>& parts) {
  Squares total;
  for (const Squares& part : parts) total.add(part);
  return total;
}

Squares squares_of(std::span<const float> a, std::span<const float> b) {
  Squares out;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double x = a[i], y = b[i];
    out.difference += (y - x) * (y - x);
    out.a += x * x;
    out.b += y * y;
  }
  return out;
}

// The second-level scales go into the weight: what is left is the matrix itself.
void apply_row_scales(LinearWeights& w, int threads) {
  if (w.row_scale.empty()) return;
  parallel_for(w.rows, threads, [&](std::size_t row) {
    const float scale = w.row_scale.size() == 1 ? w.row_scale.front() : w.row_scale[row];
    for (std::uint64_t k = 0; k < w.cols; ++k) w.weight[row * w.cols + k] *= scale;
  });
  w.row_scale.clear();
}

LinearDifference compare_linear(const LinearWeights& a, const LinearWeights& b, int threads) {
  std::vector<Squares> parts(a.rows);
  parallel_for(a.rows, threads, [&](std::size_t row) {
    parts[row] = squares_of(std::span(a.weight).subspan(row * a.cols, a.cols),
                            std::span(b.weight).subspan(row * a.cols, a.cols));
  });
  const bool equal = std::memcmp(a.weight.data(), b.weight.data(), a.weight.size() * sizeof(float)) == 0;
  return {a.name, a.rows, a.cols, sum(parts).relative(), equal};
}

// A few rows of one side of a product, FP64 [n, width].
struct Rows {
  std::uint64_t n = 0, width = 0;
  std::vector<double> value;
  Rows(std::uint64_t rows, std::uint64_t cols) : n(rows), width(cols), value(rows * cols) {}
  double* at(std::uint64_t row) { return value.data() + row * width; }
};

void subtract(Rows& from, const Rows& what) {
  for (std::size_t i = 0; i < from.value.size(); ++i) from.value[i] -= what.value[i];
}

// x y^T, [n, n].
std::vector<double> gram(const Rows& x, const Rows& y) {
  std::vector<double> out(x.n * x.n);
  blas::gemm(blas::Op::none, blas::Op::transpose, x.n, x.n, x.width, 1.0,
             blas::View<const double>{x.value.data(), x.width},
             blas::View<const double>{y.value.data(), y.width}, 0.0, blas::View<double>{out.data(), x.n});
  return out;
}

double dot(const std::vector<double>& x, const std::vector<double>& y) {
  double total = 0;
  for (std::size_t i = 0; i < x.size(); ++i) total += x[i] * y[i];
  return total;
}

// One side of a product in both folders: A's rows, and those of B.
struct Side {
  Rows a, b;
};

// L^T R of A against B. With dL = L_B - L_A and dR likewise the difference is dL^T R_B + L_A^T dR, whose
// square needs only n x n matrices and is exactly zero where nothing differs.
Squares squares_of_product(const Side& left, const Side& right) {
  Rows d_left = left.b, d_right = right.b;
  subtract(d_left, left.a);
  subtract(d_right, right.a);
  Squares out;
  const std::vector<double> left_a = gram(left.a, left.a), right_b = gram(right.b, right.b);
  out.a = dot(left_a, gram(right.a, right.a));
  out.b = dot(gram(left.b, left.b), right_b);
  out.difference = dot(gram(d_left, d_left), right_b) + dot(left_a, gram(d_right, d_right)) +
                   2 * dot(gram(d_left, left.a), gram(right.b, d_right));
  return out;
}

// Rows of a linear, times the norm's weight of each input channel and, where there is one, the norm's weight
// of the row.
Rows rows_of(const LinearWeights& w, const std::vector<std::uint64_t>& rows, const std::vector<float>& norm,
             const std::vector<float>& row_norm) {
  Rows out(rows.size(), w.cols);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const double factor = row_norm.empty() ? 1.0 : static_cast<double>(row_norm[rows[i] % row_norm.size()]);
    for (std::uint64_t k = 0; k < w.cols; ++k) {
      out.at(i)[k] = factor * static_cast<double>(w.weight[rows[i] * w.cols + k]) *
                     (norm.empty() ? 1.0 : static_cast<double>(norm[k]));
    }
  }
  return out;
}

Rows columns_of(const LinearWeights& w, std::uint64_t begin, std::uint64_t count) {
  Rows out(count, w.rows);
  for (std::uint64_t row = 0; row < w.rows; ++row) {
    for (std::uint64_t i = 0; i < count; ++i) out.at(i)[row] = w.weight[row * w.cols + begin + i];
  }
  return out;
}

double compare_q_k(const formats::ModelConfig& config, const LayerWeights& a, const LayerWeights& b,
                   int threads) {
  const std::uint64_t half = config.head_dim / 2, group = config.heads / config.kv_heads;
  std::vector<Squares> parts(config.heads);
  parallel_for(config.heads, threads, [&](std::size_t head) {
    for (std::uint64_t j = 0; j < half; ++j) {
      const auto pair = [&](std::uint64_t h) {
        return std::vector{h * config.head_dim + j, h * config.head_dim + j + half};
      };
      const auto side = [&](std::size_t linear, std::uint64_t h,
                            const std::vector<float> LayerWeights::*norm) {
        return Side{rows_of(a.linear[linear], pair(h), a.attn_norm, a.*norm),
                    rows_of(b.linear[linear], pair(h), b.attn_norm, b.*norm)};
      };
      parts[head].add(squares_of_product(side(kQ, head, &LayerWeights::q_norm),
                                         side(kK, head / group, &LayerWeights::k_norm)));
    }
  });
  return sum(parts).relative();
}

double compare_v_o(const formats::ModelConfig& config, const LayerWeights& a, const LayerWeights& b,
                   int threads) {
  const std::uint64_t group = config.heads / config.kv_heads;
  std::vector<Squares> parts(config.heads);
  parallel_for(config.heads, threads, [&](std::size_t head) {
    std::vector<std::uint64_t> rows(config.head_dim);
    for (std::uint64_t i = 0; i < rows.size(); ++i) rows[i] = head / group * config.head_dim + i;
    const Side v{rows_of(a.linear[kV], rows, a.attn_norm, {}), rows_of(b.linear[kV], rows, b.attn_norm, {})};
    const Side o{columns_of(a.linear[kO], head * config.head_dim, config.head_dim),
                 columns_of(b.linear[kO], head * config.head_dim, config.head_dim)};
    parts[head] = squares_of_product(v, o);
  });
  return sum(parts).relative();
}

double compare_gate(const LayerWeights& a, const LayerWeights& b, int threads) {
  const LinearWeights &x = a.linear[kGate], &y = b.linear[kGate];
  std::vector<Squares> parts(x.rows);
  parallel_for(x.rows, threads, [&](std::size_t row) {
    const Rows p = rows_of(x, {row}, a.mlp_norm, {}), q = rows_of(y, {row}, b.mlp_norm, {});
    for (std::uint64_t k = 0; k < x.cols; ++k) {
      const double difference = q.value[k] - p.value[k];
      parts[row].difference += difference * difference;
      parts[row].a += p.value[k] * p.value[k];
      parts[row].b += q.value[k] * q.value[k];
    }
  });
  return sum(parts).relative();
}

// squares_of_product with n = 1 for every channel, the sums over down's columns taken row by row.
double compare_up_down(const LayerWeights& a, const LayerWeights& b, int threads) {
  const LinearWeights &down_a = a.linear[kDown], &down_b = b.linear[kDown];
  const std::uint64_t ffn = down_a.cols;
  std::vector<Squares> parts((ffn + kColumnsPerTask - 1) / kColumnsPerTask);
  parallel_for(parts.size(), threads, [&](std::size_t task) {
    const std::uint64_t begin = task * kColumnsPerTask, count = std::min(kColumnsPerTask, ffn - begin);
    std::vector<double> aa(count), bb(count), dd(count), bd(count);
    for (std::uint64_t row = 0; row < down_a.rows; ++row) {
      for (std::uint64_t i = 0; i < count; ++i) {
        const double x = down_a.weight[row * ffn + begin + i], y = down_b.weight[row * ffn + begin + i];
        aa[i] += x * x;
        bb[i] += y * y;
        dd[i] += (y - x) * (y - x);
        bd[i] += y * (y - x);
      }
    }
    for (std::uint64_t i = 0; i < count; ++i) {
      const Rows p = rows_of(a.linear[kUp], {begin + i}, a.mlp_norm, {});
      const Rows q = rows_of(b.linear[kUp], {begin + i}, b.mlp_norm, {});
      double up_aa = 0, up_bb = 0, up_dd = 0, up_da = 0;
      for (std::uint64_t k = 0; k < p.width; ++k) {
        const double x = p.value[k], y = q.value[k];
        up_aa += x * x;
        up_bb += y * y;
        up_dd += (y - x) * (y - x);
        up_da += (y - x) * x;
      }
      parts[task].difference += up_dd * bb[i] + up_aa * dd[i] + 2 * up_da * bd[i];
      parts[task].a += up_aa * aa[i];
      parts[task].b += up_bb * bb[i];
    }
  });
  return sum(parts).relative();
}

// What is folded into a source's weights, as text: equal texts mean equal folds.
std::string folds_of(const WeightSource& source) {
  if (!source.packed()) return {};
  const formats::QuantizationConfig& q = *source.quantization();
  const Recipe recipe = parse_recipe(q.recipe_json, source.reader().folder() + "/config.json");
  const FoldReport changes = planned_changes(source.config(), recipe);
  const auto any = [](const auto& list) { return std::find(list.begin(), list.end(), true) != list.end(); };
  if (!any(changes.weight_changed) && !any(changes.bias_changed) && !changes.mlp_norm_changed &&
      !changes.qk_norm_changed)
    return {};
  const nlohmann::json all = nlohmann::json::parse(recipe_to_json(recipe));
  nlohmann::json folds = {{"source", q.source_fingerprint}, {"calibration", q.calibration_fingerprint}};
  for (const char* section : {"smoothing", "keys", "values"}) {
    if (all.contains(section)) folds[section] = all[section];
  }
  return folds.dump();
}

std::string shape_of(const TensorView& view) {
  return std::string(dtype_name(view.dtype)) + " " + shape_text(view.shape);
}

bool is_float(Dtype dtype) {
  return dtype == Dtype::f32 || dtype == Dtype::f16 || dtype == Dtype::bf16;
}

double compare_values(const TensorView& a, const TensorView& b, int threads) {
  const std::uint64_t n = a.elements();
  std::vector<Squares> parts((n + kElementsPerTask - 1) / kElementsPerTask);
  parallel_for(parts.size(), threads, [&](std::size_t task) {
    const std::uint64_t begin = task * kElementsPerTask, count = std::min(kElementsPerTask, n - begin);
    std::vector<float> x(count), y(count);
    tensor_to_float(a, begin, x, false);
    tensor_to_float(b, begin, y, false);
    parts[task] = squares_of(x, y);
  });
  return sum(parts).relative();
}

// Tensors that hold the matrices of linears: every name below a linear's but its bias, and fused ones.
bool belongs_to_linear(const std::string& name, const std::set<std::string>& linears) {
  const std::size_t dot = name.rfind('.');
  if (dot == std::string::npos || name.substr(dot) == ".bias") return false;
  return linears.contains(name.substr(0, dot));
}

std::set<std::string> linear_modules(const formats::ModelConfig& config) {
  std::set<std::string> modules;
  for (std::uint64_t layer = 0; layer < config.layers; ++layer) {
    for (const std::string& name : formats::linear_names(layer)) modules.insert(name);
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    modules.insert(prefix + "self_attn.qkv_proj");
    modules.insert(prefix + "mlp.gate_up_proj");
  }
  return modules;
}

void compare_tensors(const WeightSource& a, const WeightSource& b, int threads, FolderDifference& out) {
  const std::set<std::string> linears = linear_modules(a.config());
  std::set<std::string> names;
  for (const WeightSource* source : {&a, &b}) {
    for (const std::string& name : source->reader().names()) {
      if (!belongs_to_linear(name, linears)) names.insert(name);
    }
  }
  for (const std::string& name : names) {
    check_interrupt();
    const bool in_a = a.reader().contains(name), in_b = b.reader().contains(name);
    TensorDifference d{name,
                       in_a ? shape_of(a.reader().tensor(name)) : "",
                       in_b ? shape_of(b.reader().tensor(name)) : "",
                       {}};
    if (in_a && in_b) {
      const TensorView x = a.reader().tensor(name), y = b.reader().tensor(name);
      const bool equal = x.dtype == y.dtype && x.shape == y.shape &&
                         std::equal(x.data.begin(), x.data.end(), y.data.begin(), y.data.end());
      if (!equal && x.shape == y.shape && is_float(x.dtype) && is_float(y.dtype))
        d.relative = compare_values(x, y, threads);
      a.reader().release(name);
      b.reader().release(name);
      if (equal) continue;
    }
    out.tensors.push_back(std::move(d));
  }
}

}  // namespace

FolderDifference compare_folders(const WeightSource& a, const WeightSource& b, int threads,
                                 Progress& progress) {
  require_same_shape(a.config(), b.config(), b.reader().folder());
  const formats::ModelConfig& config = a.config();
  FolderDifference out;
  out.same_folds = folds_of(a) == folds_of(b);
  progress.begin("compare", config.layers + 1);
  for (std::uint64_t layer = 0; layer < config.layers; ++layer) {
    check_interrupt();
    LayerWeights x = a.load_layer(layer, threads), y = b.load_layer(layer, threads);
    for (std::size_t i = 0; i < kLinears; ++i) {
      apply_row_scales(x.linear[i], threads);
      apply_row_scales(y.linear[i], threads);
      out.linears.push_back(compare_linear(x.linear[i], y.linear[i], threads));
    }
    out.products.push_back({layer, "q k", compare_q_k(config, x, y, threads)});
    out.products.push_back({layer, "v o", compare_v_o(config, x, y, threads)});
    out.products.push_back({layer, "gate", compare_gate(x, y, threads)});
    out.products.push_back({layer, "up down", compare_up_down(x, y, threads)});
    progress.advance(layer + 1);
  }
  compare_tensors(a, b, threads, out);
  progress.end();
  const auto worst_first = [](const auto& p, const auto& q) { return p.relative > q.relative; };
  std::stable_sort(out.linears.begin(), out.linears.end(), worst_first);
  std::stable_sort(out.products.begin(), out.products.end(), worst_first);
  return out;
}

SizeByKind size_by_kind(const WeightSource& source) {
  const std::set<std::string> linears = linear_modules(source.config());
  SizeByKind out;
  for (const std::string& name : source.reader().names()) {
    const std::uint64_t bytes = source.reader().tensor(name).data.size();
    if (name.starts_with("model.embed_tokens.")) {
      out.embedding += bytes;
    } else if (name.starts_with("lm_head.")) {
      out.head += bytes;
    } else if (belongs_to_linear(name, linears)) {
      out.linears += bytes;
    } else if (name.ends_with("norm.weight")) {
      out.norms += bytes;
    } else {
      out.other += bytes;
    }
  }
  return out;
}

}  // namespace fireq::calib
