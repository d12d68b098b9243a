#include "engine.h"

#include <ATen/Context.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>

#include "attention.h"
#include "gradient_combine.h"
#include "gradient_rows.h"
#include "gradient_terms.h"
#include "gradient_tiles.h"
#include "positives.h"
#include "residual.h"
#include "tensors.h"

namespace cl_kernels::cuda {

Precision precision_of(const at::Tensor& features) {
  if (features.scalar_type() != at::kFloat) return Precision::kHalf;
  return at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::HIGHEST
             ? Precision::kTf32x3
             : Precision::kTf32;
}

namespace {

constexpr int64_t kChunkBytes = int64_t{1} << 29;       // of G; less where all of it is smaller
constexpr int64_t kMostRows = int64_t{65535} * kBlock;  // of a chunk: a grid's blocks along y

template <typename T>
const T* data_of(const at::Tensor& x) {
  return x.defined() && x.numel() > 0 ? x.const_data_ptr<T>() : nullptr;
}
template <typename T>
T* data_of(at::Tensor& x) {
  return x.defined() && x.numel() > 0 ? x.mutable_data_ptr<T>() : nullptr;
}

Among parse_among(std::string_view among) {
  if (among == "all") return kAll;
  if (among == "same") return kSame;
  TORCH_CHECK_VALUE(among == "different", "among must be 'all', 'same' or 'different', got '",
                    std::string(among), "'");
  return kDifferent;
}

// The problem with its tensors as the kernels read them.
struct Problem {
  at::Tensor q, k;  // row-major; k is q without keys of its own
  Scalar scale;
  at::Tensor scale_tensor;
  Type type;
  Precision precision;
  std::optional<int> offset;
  Among among;
  std::optional<LabelIds> ids;
  Positives positives;
  at::Tensor index;           // int32
  at::Tensor mask;            // as given
  at::Tensor bias;            // float
  bool self_keys, symmetric;  // symmetric: S and the denominators are

  // Ids of the labels: of their classes, where these are known already.
  explicit Problem(const Contrast& c, const LabelClasses* classes = nullptr)
      : q(row_major(c.q)),
        k(c.k ? row_major(*c.k) : q),
        scale(scalar_of(c.scale)),
        scale_tensor(c.scale),
        type(type_of(q)),
        precision(precision_of(q)),
        among(parse_among(c.among)),
        self_keys(!c.k) {
    TORCH_CHECK_VALUE(d() > 0, "q must be [N, D] with features, got ", q.sizes());
    const int64_t most = std::numeric_limits<int>::max() - kBlock;
    TORCH_CHECK_VALUE(n() < most && m() < most && q.size(1) < most,
                      "q and k must have fewer than 2^31 rows and columns");
    if (c.exclude && *c.exclude > -q.size(0) && *c.exclude < k.size(0)) offset = static_cast<int>(*c.exclude);
    TORCH_CHECK_VALUE(c.row_labels || among == kAll,
                      "denominators are restricted by labels here, not by positive_mask");
    if (c.row_labels) ids = classes != nullptr ? classes->ids : label_ids(*c.row_labels, *c.col_labels);
    positives = c.label_positives  ? kLabels
                : c.positive_index ? kIndex
                : c.positive_mask  ? kMask
                                   : kNoPositives;
    if (c.positive_index) index = c.positive_index->to(at::kInt).contiguous();
    if (c.positive_mask) mask = *c.positive_mask;
    if (c.key_bias) bias = c.key_bias->to(at::kFloat).contiguous();
    const bool same_labels = !c.row_labels || is_same(*c.row_labels, *c.col_labels);
    symmetric = self_keys && !c.both_axes && c.exclude.value_or(0) == 0 && !c.key_bias && same_labels;
  }

  int n() const { return static_cast<int>(q.size(0)); }
  int m() const { return static_cast<int>(k.size(0)); }
  int d() const { return static_cast<int>(q.size(1)); }

  Features features() const {
    return {q.const_data_ptr(), k.const_data_ptr(), row_stride(q), row_stride(k), n(), m(), d()};
  }
  PairRules rules(bool above = false) const {
    return {n(),
            m(),
            offset.has_value(),
            offset.value_or(0),
            above,
            among,
            ids ? data_of<int>(ids->rows) : nullptr,
            ids ? data_of<int>(ids->cols) : nullptr};
  }
  bool half() const { return type != Type::kFloat; }
  bool hopper() const { return half() && architecture() == 90; }
  bool in_registers() const { return hopper() && d() <= kWidestRows; }
};

Features transposed(const Features& f) {
  return {f.y, f.x, f.y_stride, f.x_stride, f.m, f.n, f.d};
}
PairRules transposed(const PairRules& r) {
  return {r.m, r.n, r.excludes, -r.offset, r.above, r.among, r.other_ids, r.own_ids};
}

// Where the tiles of float32 features leave the sums over positives.
struct PositiveMemory {
  at::Tensor parts, bounds;  // double; what holds the bounds
  TileSums sums = {};
};

at::Tensor floats(const Problem& p, at::IntArrayRef sizes) {
  return at::empty(sizes, p.q.options().dtype(at::kFloat));
}
at::Tensor doubles(const Problem& p, int64_t n) {
  return at::empty({n}, p.q.options().dtype(at::kDouble));
}

int online_parts(const Features& f, bool only_untrusted) {
  return only_untrusted ? 1 : splits(ceil_div(f.n, kBlock), ceil_div(f.m, kBlock), portable_programs());
}

// The log-sum-exps of rows by launch_lse_online: all of them, or the untrusted.
void log_sum_exp_online(const Problem& p, const Features& features, const PairRules& rules,
                        const float* own_bias, const float* other_bias, bool only_untrusted, at::Tensor& lse,
                        const PositiveTerms& positives = {}) {
  const int row_blocks = ceil_div(features.n, kBlock), parts = online_parts(features, only_untrusted);
  at::Tensor memory = floats(p, {parts, features.n, 2});
  at::Tensor tickets = at::zeros({row_blocks}, p.q.options().dtype(at::kInt));
  launch_lse_online(
      {features, rules, p.scale, own_bias, other_bias, parts,
       reinterpret_cast<float2*>(memory.mutable_data_ptr<float>()), tickets.mutable_data_ptr<int>(),
       only_untrusted, lse.mutable_data_ptr<double>(), positives},
      p.type, p.precision, stream());
}

// Room for sums over the positives of float32 rows in `slots` parts, and of mirrored tiles in `more_slots`.
PositiveTerms make_positives(const Problem& p, int slots, int more_slots, const Bounds* bounds,
                             PositiveMemory& out) {
  if (p.half() || p.positives == kNoPositives) return {};
  const at::Tensor& mask = p.mask;
  const bool masked = mask.defined();
  out.parts = at::zeros({slots + more_slots, p.n()}, p.q.options().dtype(at::kDouble));
  double* rows = out.parts.mutable_data_ptr<double>();
  double* columns = more_slots > 0 ? rows + int64_t{slots} * p.n() : nullptr;
  out.sums = {rows, columns, slots, more_slots, bounds};
  return {p.positives,
          data_of<int>(p.index),
          masked ? mask.const_data_ptr<float>() : nullptr,
          masked ? static_cast<int>(mask.size(0)) : 1,
          masked ? static_cast<int>(mask.size(1)) : 1,
          bounds,
          rows,
          columns};
}

// lse [N] and, with both axes, lse_cols [M], else [0].
std::pair<at::Tensor, at::Tensor> log_sum_exp(const Problem& p, bool both_axes, PositiveMemory& positives) {
  at::Tensor lse = doubles(p, p.n()), lse_cols = doubles(p, both_axes ? p.m() : 0);
  const Features features = p.features(), across = transposed(features);
  const PairRules rules = p.rules(), rules_across = transposed(rules);
  const float* bias = data_of<float>(p.bias);
  if (is_small(int64_t{p.n()} * p.m() * p.d())) {
    // Weights other than 1 are exact only near the reference.
    Bounds* bounds = nullptr;
    if (!p.half() && p.positives == kMask) {
      positives.bounds = at::zeros({3}, p.q.options().dtype(at::kFloat));
      bounds = reinterpret_cast<Bounds*>(positives.bounds.mutable_data_ptr<float>());
      launch_bounds(features, bias, bounds, p.type, stream());
    }
    const PositiveTerms terms = make_positives(p, online_parts(features, false), 0, bounds, positives);
    log_sum_exp_online(p, features, rules, nullptr, bias, false, lse, terms);
    if (both_axes) log_sum_exp_online(p, across, rules_across, bias, nullptr, false, lse_cols);
    return {lse, lse_cols};
  }

  const bool mirrored = p.symmetric && p.offset == 0, columns = mirrored || both_axes;
  const Schedule s = p.hopper() ? lse_schedule_sm90(features, p.type, mirrored)
                                : schedule(p.n(), p.m(), mirrored, portable_programs());
  const int64_t of_rows = int64_t{s.column_groups} * p.n();
  const int64_t of_columns = columns ? int64_t{s.row_groups} * p.m() : 0;
  // Row sums, column sums, bounds.
  positives.bounds = at::zeros({of_rows + of_columns + 3}, p.q.options().dtype(at::kFloat));
  float* row_sums = positives.bounds.mutable_data_ptr<float>();
  float* column_sums = columns ? row_sums + of_rows : nullptr;
  Bounds* bounds = reinterpret_cast<Bounds*>(row_sums + of_rows + of_columns);
  launch_bounds(features, bias, bounds, p.type, stream());
  const PositiveTerms terms =
      make_positives(p, s.column_groups, mirrored ? s.row_groups : 0, bounds, positives);
  const LseParams params{features, p.rules(mirrored), p.scale, bias, bounds, s, row_sums, column_sums, terms};
  if (p.hopper())
    launch_lse_sm90(params, p.type, stream());
  else
    launch_lse(params, p.type, p.precision, stream());

  launch_lse_combine(
      {row_sums, mirrored ? column_sums : nullptr, s.column_groups, mirrored ? s.row_groups : 0, p.n(),
       p.scale, bias != nullptr, bounds, lse.mutable_data_ptr<double>()},
      stream());
  log_sum_exp_online(p, features, rules, nullptr, bias, true, lse);
  if (both_axes) {
    launch_lse_combine({column_sums, nullptr, s.row_groups, 0, p.m(), p.scale, bias != nullptr, bounds,
                        lse_cols.mutable_data_ptr<double>()},
                       stream());
    log_sum_exp_online(p, across, rules_across, bias, nullptr, true, lse_cols);
  }
  return {lse, lse_cols};
}

// What is given of one side for the gradient.
struct TermsSource {
  at::Tensor lse;
  std::optional<at::Tensor> grad, weight_grad;
  at::Tensor ids, index, bias;
};

// The terms of a side, and the memory that they lie in.
struct TermsMemory {
  at::Tensor blocks, grad, weight_grad;
  Terms terms = {};
};

TermsMemory make_memory(const Problem& p, const TermsSource& source, int n) {
  TermsMemory t;
  t.blocks =
      at::empty({terms_blocks(n), static_cast<int64_t>(sizeof(TermsBlock))}, p.q.options().dtype(at::kByte));
  if (source.grad) t.grad = source.grad->to(at::kDouble);
  if (source.weight_grad) t.weight_grad = source.weight_grad->to(at::kDouble);
  t.terms = {reinterpret_cast<const TermsBlock*>(t.blocks.const_data_ptr()), source.grad.has_value(),
             source.weight_grad.has_value()};
  return t;
}

TermsParams params_of(const TermsSource& source, TermsMemory& t, int n) {
  return {data_of<double>(source.lse),
          data_of<double>(std::as_const(t.grad)),
          data_of<double>(std::as_const(t.weight_grad)),
          t.terms.softmax ? t.grad.stride(0) : 0,
          t.terms.positives ? t.weight_grad.stride(0) : 0,
          data_of<int>(source.ids),
          data_of<int>(source.index),
          data_of<float>(source.bias),
          reinterpret_cast<TermsBlock*>(t.blocks.mutable_data_ptr()),
          n};
}

TermsSource row_source(const Problem& p, const at::Tensor& lse, const std::optional<at::Tensor>& grad,
                       const std::optional<at::Tensor>& weight_grad) {
  return {lse, grad, weight_grad, p.ids ? p.ids->rows : at::Tensor(), p.index, {}};
}
TermsSource column_source(const Problem& p, const at::Tensor& lse, const std::optional<at::Tensor>& grad) {
  return {lse, grad, {}, p.ids ? p.ids->cols : at::Tensor(), {}, p.bias};
}

struct BothTerms {
  TermsMemory rows, columns;
};

// The terms of rows and of columns, in one launch; of rows alone where the columns are these.
BothTerms make_terms(const Problem& p, const TermsSource& rows, const std::optional<TermsSource>& columns,
                     at::Tensor& bound, const at::Tensor& largest_weight) {
  BothTerms t;
  t.rows = make_memory(p, rows, p.n());
  BothTermsParams params{
      params_of(rows, t.rows, p.n()), {}, data_of<float>(bound), data_of<float>(largest_weight)};
  if (columns) {
    t.columns = make_memory(p, *columns, p.m());
    params.columns = params_of(*columns, t.columns, p.m());
  }
  launch_gradient_terms(params, stream());
  return t;
}

// What float16 needs to know of the size of G: [1] float, or undefined.
at::Tensor make_bound(const Problem& p) {
  return p.type == Type::kHalf ? at::zeros({1}, p.q.options().dtype(at::kFloat)) : at::Tensor();
}

// A mask as floats, whose strides are ints.
at::Tensor weights_of(const at::Tensor& mask) {
  const at::Tensor weights = mask.to(at::kFloat);
  return std::max(weights.stride(0), weights.stride(1)) > std::numeric_limits<int>::max()
             ? weights.contiguous()
             : weights;
}

at::Tensor largest_weight(const Problem& p) {
  return p.type == Type::kHalf && p.mask.defined() ? p.mask.abs().amax() : at::Tensor();
}

GradientRules rules_of(const Problem& p, const Terms& rows, const Terms& cols, const at::Tensor& bound) {
  const at::Tensor& mask = p.mask;
  const bool masked = mask.defined();
  return {p.rules(),
          p.scale,
          rows,
          cols,
          p.bias.defined(),
          p.positives,
          masked ? mask.const_data_ptr<float>() : nullptr,
          masked ? static_cast<int>(mask.size(0)) : 1,
          masked ? static_cast<int>(mask.size(1)) : 1,
          masked ? static_cast<int>(mask.stride(0)) : 0,
          masked ? static_cast<int>(mask.stride(1)) : 0,
          data_of<float>(bound)};
}

GradientRules transposed(const GradientRules& r) {
  GradientRules t = r;
  t.pairs = transposed(r.pairs);
  std::swap(t.own, t.other);
  return t;
}

// Parts [splits, n, d] of sum_j G_ij y_j.
at::Tensor row_gradients(const Problem& p, const Features& f, const GradientRules& rules) {
  const int parts = splits(ceil_div(f.n, kBlock), ceil_div(f.m, kBlock), multiprocessors());
  at::Tensor out = floats(p, {parts, f.n, f.d});
  launch_gradient_rows_sm90({f, rules, parts, out.mutable_data_ptr<float>()}, p.type, stream());
  return out;
}

// Chunks of G: `rows` of them at once, from any column on, in one buffer.
struct Chunks {
  const Problem& p;
  const GradientRules& rules;
  int64_t rows, stride;
  at::Tensor buffer;

  Chunks(const Problem& p, const GradientRules& rules, int64_t most_rows)
      : p(p), rules(rules), stride(round_up<int64_t>(p.m(), 8)) {
    const int64_t fit = kChunkBytes / (stride * p.q.element_size()) / kBlock * kBlock;
    rows = std::min<int64_t>({std::max<int64_t>(kBlock, std::min(fit, most_rows)), kMostRows, p.n()});
    buffer = at::empty({rows, stride}, p.q.options());
  }

  // G of the rows [first, last) and the columns from first_column on; times 2^lift for float16.
  at::Tensor of(int64_t first, int64_t last, int64_t first_column) {
    const GradientTilesParams params{p.features(),
                                     rules,
                                     static_cast<int>(first),
                                     static_cast<int>(last),
                                     static_cast<int>(first_column),
                                     buffer.mutable_data_ptr(),
                                     stride};
    if (p.hopper())
      launch_gradient_tiles_sm90(params, p.type, stream());
    else
      launch_gradient_tiles(params, p.type, p.precision, stream());
    return buffer.narrow(0, 0, last - first).narrow(1, 0, p.m() - first_column);
  }

  // f(first, last) for each chunk.
  template <typename F>
  void for_each(F f) const {
    for (int64_t first = 0; first < p.n(); first += rows) f(first, std::min<int64_t>(first + rows, p.n()));
  }
};

// sum += a b, or = where it is the first.
void accumulate(at::Tensor sum, const at::Tensor& a, const at::Tensor& b, bool first) {
  if (first)
    product_into(sum, a, b);
  else
    sum.add_(product(a, b));
}

// (G y, G^T x), [1, n, D] and [1, m, D], by chunks of G and library products; times 2^lift for float16.
std::pair<at::Tensor, at::Tensor> chunk_gradients(const Problem& p, const GradientRules& rules,
                                                  bool into_rows, bool into_columns) {
  Chunks chunks(p, rules, p.n());
  at::Tensor by_rows, by_columns;
  if (into_rows) by_rows = floats(p, {1, p.n(), p.d()});
  if (into_columns) by_columns = floats(p, {1, p.m(), p.d()});
  chunks.for_each([&](int64_t first, int64_t last) {
    const at::Tensor g = chunks.of(first, last, 0);
    if (into_rows) accumulate(by_rows[0].narrow(0, first, last - first), g, p.k, true);
    if (into_columns) accumulate(by_columns[0], g.t(), p.q.narrow(0, first, last - first), first == 0);
  });
  return {by_rows, by_columns};
}

// (G + G^T) q in parts [1 or 2, n, D], of which a chunk's is computed from its diagonal on: what is right of
// it serves the rows of its columns too, in the second part.
at::Tensor mirrored_gradients(const Problem& p, const GradientRules& rules) {
  Chunks chunks(p, rules, mirrored_rows());
  const int64_t n = p.n();
  at::Tensor out = floats(p, {chunks.rows < n ? 2 : 1, n, p.d()});
  if (chunks.rows < n) out[1].narrow(0, 0, chunks.rows).zero_();
  chunks.for_each([&](int64_t first, int64_t last) {
    const at::Tensor g = chunks.of(first, last, first);
    accumulate(out[0].narrow(0, first, last - first), g, p.q.narrow(0, first, n - first), true);
    if (last == n) return;
    const at::Tensor right = g.narrow(1, last - first, n - last);
    accumulate(out[1].narrow(0, last, n - last), right.t(), p.q.narrow(0, first, last - first), first == 0);
  });
  return out;
}

// The gradient of x from its parts, in its type or in float, and x . parts of each row, whose sum is the
// gradient of the scale.
std::pair<at::Tensor, at::Tensor> combine(const Problem& p, const at::Tensor& parts, const at::Tensor& x,
                                          const at::Tensor& unit, bool in_float, double share) {
  const int64_t n = parts.size(1), d = parts.size(2);
  at::Tensor grad = in_float ? floats(p, {n, d}) : at::empty({n, d}, p.q.options());
  at::Tensor along = doubles(p, n);
  launch_gradient_combine(
      {parts.const_data_ptr<float>(), static_cast<int>(parts.size(0)), static_cast<int>(n),
       static_cast<int>(d), x.const_data_ptr(), row_stride(x), p.scale, data_of<float>(unit),
       static_cast<float>(share), grad.mutable_data_ptr(), along.mutable_data_ptr<double>()},
      p.type, in_float, stream());
  return {grad, along};
}

// The statistics of frozen keys, positives by index or none, and their residual, by an attention over the
// keys.
Statistics attend(const Problem& p) {
  const int parts = splits(ceil_div(p.n(), kBlock), ceil_div(p.m(), kBlock), multiprocessors());
  at::Tensor peak = floats(p, {parts, p.n()}), total = floats(p, {parts, p.n()});
  at::Tensor mean = floats(p, {parts, p.n(), p.d()});
  at::Tensor logits = at::zeros({2, p.n()}, p.q.options().dtype(at::kFloat));
  const AttentionParams params{p.features(),
                               p.k.const_data_ptr(),
                               row_stride(p.k),
                               p.d(),
                               p.rules(),
                               p.scale,
                               data_of<float>(p.bias),
                               data_of<int>(p.index),
                               0,
                               false,
                               parts,
                               peak.mutable_data_ptr<float>(),
                               total.mutable_data_ptr<float>(),
                               mean.mutable_data_ptr<float>(),
                               logits.mutable_data_ptr<float>(),
                               logits.mutable_data_ptr<float>() + p.n()};
  launch_attention_sm90(params, p.type, stream());
  const int64_t indexed = p.index.defined() ? p.n() : 0;
  Statistics out{doubles(p, p.n()), doubles(p, 0), doubles(p, indexed), doubles(p, indexed),
                 floats(p, {p.n(), p.d()})};
  launch_residual({params.peak, params.total, params.mean, parts, p.n(), p.d(), params.index,
                   params.index_logit, params.own_logit, p.k.const_data_ptr(), row_stride(p.k),
                   out.lse.mutable_data_ptr<double>(), data_of<double>(out.positive_sum),
                   data_of<double>(out.positive_count), out.residual.mutable_data_ptr<float>()},
                  p.type, stream());
  return out;
}

// (P - W) k [N, D] of frozen keys by chunks of it, W the positives by index.
at::Tensor chunk_residual(const Problem& p, const at::Tensor& lse) {
  at::Tensor bound = make_bound(p);
  const at::Tensor ones = at::ones_like(lse), one = at::ones({}, at::kFloat);
  std::optional<at::Tensor> weights;
  if (p.index.defined()) weights = -ones;
  const BothTerms both =
      make_terms(p, row_source(p, lse, ones, weights), column_source(p, {}, {}), bound, {});
  const at::Tensor parts =
      chunk_gradients(p, rules_of(p, both.rows.terms, both.columns.terms, bound), true, false).first;
  Problem unscaled = p;
  unscaled.scale = scalar_of(one);
  return combine(unscaled, parts, p.q, bound, true, 1).first;
}

}  // namespace

Statistics engine_forward(const Contrast& contrast, bool save_gradient) {
  const DeviceGuard guard(contrast.q);
  std::optional<LabelClasses> by_label;
  if (contrast.label_positives && contrast.row_labels)
    by_label = label_classes(*contrast.row_labels, *contrast.col_labels);
  const LabelClasses* classes = by_label ? &*by_label : nullptr;
  Problem p(contrast, classes);
  if (save_gradient && p.in_registers()) return attend(p);
  if (!p.half() && p.mask.defined()) p.mask = p.mask.to(at::kFloat).contiguous();
  Statistics out;
  PositiveMemory positives;
  std::tie(out.lse, out.lse_cols) = log_sum_exp(p, contrast.both_axes, positives);
  std::tie(out.positive_sum, out.positive_count) = positive_sums(contrast, classes, positives.sums);
  out.residual = save_gradient ? chunk_residual(p, out.lse) : floats(p, {0});
  return out;
}

Gradients engine_backward(const ContrastIncoming& incoming, const Contrast& contrast,
                          const ContrastSaved& saved, std::array<bool, 4> needs, bool in_float) {
  const DeviceGuard guard(contrast.q);
  Problem p(contrast);
  if (p.mask.defined()) p.mask = weights_of(p.mask);
  const auto [needs_q, needs_k, needs_scale, needs_bias] = needs;
  at::Tensor bound = make_bound(p);
  const at::Tensor unit = p.in_registers() ? at::Tensor() : bound;  // of chunks; the row kernels take it off
  const auto nothing = [&] { return floats(p, {0}); };              // of an op's outputs none may be another
  Gradients out{nothing(), nothing(), nothing(), nothing()};
  at::Tensor along;
  const auto finished = [&, of_q = needs_q, of_k = needs_k, of_scale = needs_scale] {
    if (!of_q) out.q = nothing();
    if (!of_k) out.k = nothing();
    if (of_scale) out.scale = along.sum().to(at::kFloat);
    return out;
  };

  const bool mirrored = p.symmetric && !needs_bias;
  const TermsSource of_rows = row_source(p, saved.lse, incoming.lse, incoming.positive_sum);
  std::optional<TermsSource> of_columns;
  if (!mirrored)
    of_columns = column_source(p, incoming.lse_cols ? saved.lse_cols : at::Tensor(), incoming.lse_cols);
  const BothTerms terms = make_terms(p, of_rows, of_columns, bound, largest_weight(p));
  if (mirrored) {
    // G + G^T in one pass.
    const GradientRules both = rules_of(p, terms.rows.terms, terms.rows.terms, bound);
    const at::Tensor parts =
        p.in_registers() ? row_gradients(p, p.features(), both) : mirrored_gradients(p, both);
    std::tie(out.q, along) = combine(p, parts, p.q, unit, in_float, 0.5);
    return finished();
  }

  const GradientRules rules = rules_of(p, terms.rows.terms, terms.columns.terms, bound);
  const bool into_q = needs_q || !needs_k;  // one of them, for the gradient of the scale
  const bool into_k = p.self_keys ? needs_q : needs_k;
  at::Tensor by_rows, by_cols;
  if (p.in_registers()) {
    if (into_q) by_rows = row_gradients(p, p.features(), rules);
    if (into_k) by_cols = row_gradients(p, transposed(p.features()), transposed(rules));
  } else {
    std::tie(by_rows, by_cols) = chunk_gradients(p, rules, into_q, into_k);
  }
  if (needs_bias) {
    out.key_bias = floats(p, {p.m()});
    launch_gradient_sums(
        {transposed(p.features()), transposed(rules), out.key_bias.mutable_data_ptr<float>()}, p.type,
        p.precision, stream());
  }
  if (p.self_keys && into_q && into_k) {
    std::tie(out.q, along) = combine(p, at::cat({by_rows, by_cols}), p.q, unit, in_float, 0.5);
    return finished();
  }
  if (into_k) std::tie(out.k, along) = combine(p, by_cols, p.k, unit, in_float, 1);
  if (into_q) std::tie(out.q, along) = combine(p, by_rows, p.q, unit, in_float, 1);
  return finished();
}

}  // namespace cl_kernels::cuda
