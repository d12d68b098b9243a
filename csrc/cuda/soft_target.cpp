#include "../soft_target.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention.h"
#include "gradient_rows.h"
#include "soft_target.h"
#include "tensors.h"

namespace cl_kernels {
namespace cuda {
namespace {

// Bytes of logits, of the student and of the teacher together, that are held at a time.
#ifdef CL_KERNELS_EMULATED
constexpr int64_t kLogitBytes = 1 << 14;
#else
constexpr int64_t kLogitBytes = int64_t{1} << 29;
#endif
constexpr int64_t kSegmentAlignment = 8;  // segments start at columns that products read and write fastest

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Backward = std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor, std::vector<at::Tensor>,
                            at::Tensor, at::Tensor>;

// out = a b, in float32.
void product_into(at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
#ifdef CL_KERNELS_EMULATED
  out.copy_(at::mm(a.to(at::kFloat), b.to(at::kFloat)));
#else
  if (a.scalar_type() == at::kFloat)
    at::mm_out(out, a, b);
  else
    at::mm_out(out, a, b, at::kFloat);
#endif
}

// total += a b, where there is a total yet.
void add_product(at::Tensor& total, const at::Tensor& a, const at::Tensor& b) {
  at::Tensor more = at::empty({a.size(0), b.size(1)}, a.options().dtype(at::kFloat));
  product_into(more, a, b);
  total = total.defined() ? total.add_(more) : more;
}

// Gradients of statistics of rows, in double; undefined tensors are zeros.
struct RowGradients {
  at::Tensor lse, target_lse, cross, positive;

  RowGradients() = default;
  explicit RowGradients(const SoftTargetIncoming& incoming)
      : lse(in_double(incoming.lse)),
        target_lse(in_double(incoming.target_lse)),
        cross(in_double(incoming.cross)),
        positive(in_double(incoming.positive_sum)) {}

  static at::Tensor in_double(const std::optional<at::Tensor>& x) {
    return x ? x->to(at::kDouble) : at::Tensor();
  }
  static RowGradient from(const at::Tensor& x, int64_t row) {
    if (!x.defined()) return {nullptr, 0};
    return {x.const_data_ptr<double>() + row * x.stride(0), x.stride(0)};
  }
};

// Statistics of rows as the forward left them; positive_sum may be [0].
struct Statistics {
  at::Tensor lse, target_lse, cross, positive_sum;

  SoftTargetRows rows(int64_t row) {
    return {lse.mutable_data_ptr<double>() + row, target_lse.mutable_data_ptr<double>() + row,
            cross.mutable_data_ptr<double>() + row,
            positive_sum.numel() > 0 ? positive_sum.mutable_data_ptr<double>() + row : nullptr};
  }
  SoftTargetGradients with(const RowGradients& g, int64_t row) const {
    return {lse.const_data_ptr<double>() + row,
            target_lse.const_data_ptr<double>() + row,
            cross.const_data_ptr<double>() + row,
            positive_sum.numel() > 0 ? positive_sum.const_data_ptr<double>() + row : nullptr,
            RowGradients::from(g.lse, row),
            RowGradients::from(g.target_lse, row),
            RowGradients::from(g.cross, row),
            RowGradients::from(g.positive, row)};
  }
};

class SoftTargetEngine {
 public:
  explicit SoftTargetEngine(const SoftTarget& problem)
      : q_(problem.q),
        t_(problem.target_q),
        k_(problem.k.vec()),
        u_(problem.target_k.vec()),
        scale_(problem.scale),
        target_scale_(problem.target_scale),
        zero_(problem.positive_in_target == "zero"),
        type_(type_of(q_)) {
    for (const at::Tensor& part : k_) {
      first_.push_back(columns_);
      start_.push_back(width_);
      columns_ += part.size(0);
      width_ += round_up(part.size(0), kSegmentAlignment);
    }
    TORCH_CHECK_VALUE(d() > 0 && e() > 0, "q and target_q must be matrices with features, got ", q_.sizes(),
                      " and ", t_.sizes());
    const int64_t most = std::numeric_limits<int>::max() - kBlock;
    TORCH_CHECK_VALUE(n() < most && width_ < most && d() < most && e() < most,
                      "q and k must have fewer than 2^31 rows and columns");
    if (problem.positive) positive_ = problem.positive->to(at::kInt).contiguous();
  }

  Forward forward(bool save_gradient) {
    Statistics out = {of_rows(n()), of_rows(n()), of_rows(n()), of_rows(positive_.defined() ? n() : 0)};
    at::Tensor mean_key = floats({0}), mean_target_key = floats({0});
    if (save_gradient) mean_key = floats({n(), d()}), mean_target_key = floats({n(), d()});
    if (n() > 0) {
      if (type_ != Type::kFloat && architecture() == 90 && std::max(d(), e()) <= kWidestRows)
        attend(out, mean_key, mean_target_key);
      else
        forward_by_chunks(out, mean_key, mean_target_key);
    }
    return {out.lse, out.target_lse, out.cross, out.positive_sum, mean_key, mean_target_key};
  }

  // The gradient of the queries and the scale from the means that the forward kept.
  Backward from_means(const Statistics& statistics, const RowGradients& gradients, const at::Tensor& mean_key,
                      const at::Tensor& mean_target_key, bool needs_q) {
    at::Tensor grad = needs_q ? at::empty({n(), d()}, q_.options()) : floats({0}), along = of_rows(n());
    const at::Tensor mean = mean_key.contiguous(), target_mean = mean_target_key.contiguous();
    SoftTargetFromMeansParams params = {};
    params.gradients = statistics.with(gradients, 0);
    params.mean_key = mean.const_data_ptr<float>();
    params.mean_target_key = target_mean.const_data_ptr<float>();
    params.q = q_.const_data_ptr(), params.q_stride = q_.stride(0), params.q_step = q_.stride(1);
    params.n = static_cast<int>(n()), params.d = static_cast<int>(d());
    params.scale = scalar_of(scale_);
    params.zero = zero_;
    at::Tensor rest;  // of many segments all but the first few
    if (positive_.defined()) {
      params.positive = positive_.const_data_ptr<int>();
      std::vector<at::Tensor> keys = k_;
      if (keys.size() > kMostSegments) {
        rest = at::cat(std::vector<at::Tensor>(keys.begin() + kMostSegments - 1, keys.end()));
        keys.resize(kMostSegments - 1);
        keys.push_back(rest);
      }
      params.segments = static_cast<int>(keys.size());
      for (size_t s = 0; s < keys.size(); ++s)
        params.segment[s] = {keys[s].const_data_ptr(), keys[s].stride(0), keys[s].stride(1),
                             static_cast<int>(first_[s]), static_cast<int>(keys[s].size(0))};
    }
    if (needs_q) params.grad = grad.mutable_data_ptr();
    params.along = along.mutable_data_ptr<double>();
    launch_soft_target_from_means(params, type_, stream());
    auto none = [&] {  // of an op's outputs none may be another
      std::vector<at::Tensor> found(k_.size());
      for (at::Tensor& x : found) x = floats({0});
      return found;
    };
    return {grad, none(), floats({0}), none(), along.sum().to(at::kFloat), zeros({})};
  }

  Backward by_chunks(const Statistics& statistics, const RowGradients& gradients, std::array<bool, 4> needs) {
    const auto [needs_q, needs_k, needs_target_q, needs_target_k] = needs;
    const bool of_target = needs_target_q || needs_target_k;
    at::Tensor factors = largest_factors(statistics, gradients);
    at::Tensor grad_q, grad_target_q, along = zeros({n()}, at::kDouble);
    at::Tensor target_along = of_target ? zeros({n()}, at::kDouble) : at::Tensor();
    std::vector<at::Tensor> grad_k(k_.size()), grad_target_k(k_.size());
    if (needs_q) grad_q = zeros({n(), d()});
    if (needs_target_q) grad_target_q = zeros({n(), e()});
    for_chunks([&](int64_t row, int64_t count, const SoftTargetLogits& logits, const at::Tensor& s,
                   const at::Tensor& t) {
      SoftTargetMatricesParams params = {};
      params.logits = logits;
      params.gradients = statistics.with(gradients, row);
      params.factor = factor(factors, 0), params.target_factor = factor(factors, 1);
      params.write_g = needs_q || needs_k, params.write_h = of_target;
      params.along = along.mutable_data_ptr<double>() + row;
      if (of_target) params.target_along = target_along.mutable_data_ptr<double>() + row;
      launch_soft_target_matrices(params, type_, stream());
      const at::Tensor q = q_.narrow(0, row, count), target_q = t_.narrow(0, row, count);
      for (size_t i = 0; i < k_.size(); ++i) {
        if (k_[i].size(0) == 0) continue;
        const at::Tensor g = matrix(s, i), h = matrix(t, i);
        if (needs_q) add_rows(grad_q, row, g, k_[i]);
        if (needs_k) add_product(grad_k[i], g.t(), q);
        if (needs_target_q) add_rows(grad_target_q, row, h, u_[i]);
        if (needs_target_k) add_product(grad_target_k[i], h.t(), target_q);
      }
    });
    std::vector<at::Tensor> finished_k, finished_target_k;
    for (size_t i = 0; i < k_.size(); ++i) {
      finished_k.push_back(finish(grad_k[i], needs_k, k_[i], scale_, factors, 0));
      finished_target_k.push_back(finish(grad_target_k[i], needs_target_k, u_[i], target_scale_, factors, 1));
    }
    return {finish(grad_q, needs_q, q_, scale_, factors, 0),
            finished_k,
            finish(grad_target_q, needs_target_q, t_, target_scale_, factors, 1),
            finished_target_k,
            along.sum().to(at::kFloat),
            of_target ? target_along.sum().to(at::kFloat) : zeros({})};
  }

 private:
  int64_t n() const { return q_.size(0); }
  int64_t d() const { return q_.size(1); }
  int64_t e() const { return t_.size(1); }

  at::Tensor floats(at::IntArrayRef sizes) const { return at::empty(sizes, q_.options().dtype(at::kFloat)); }
  at::Tensor of_rows(int64_t n) const { return at::empty({n}, q_.options().dtype(at::kDouble)); }
  at::Tensor zeros(at::IntArrayRef sizes, at::ScalarType type = at::kFloat) const {
    return at::zeros(sizes, q_.options().dtype(type));
  }

  // Two attentions for each segment: of the student over k with the mean of k, of the teacher over u with the
  // mean of k. Neither counts the positive, which the combination adds in double.
  void attend(Statistics& out, at::Tensor& mean_key, at::Tensor& mean_target_key) {
    const at::Tensor q = row_major(q_), t = row_major(t_);
    std::vector<int> parts(k_.size(), 0);
    int slots = 0;
    for (size_t i = 0; i < k_.size(); ++i) {
      if (k_[i].size(0) == 0) continue;
      const int blocks = static_cast<int>(ceil_div<int64_t>(k_[i].size(0), kBlock));
      parts[i] = splits(static_cast<int>(ceil_div<int64_t>(n(), kBlock)), blocks, multiprocessors());
      slots += parts[i];
    }
    at::Tensor sums = floats({4, slots, n()}), means = floats({2, slots, n(), d()}),
               logits = floats({2, n()});
    const int64_t plane = int64_t{slots} * n();
    float *peak = sums.mutable_data_ptr<float>(), *mean = means.mutable_data_ptr<float>();
    int slot = 0;
    for (size_t i = 0; i < k_.size(); ++i) {
      if (parts[i] == 0) continue;
      const at::Tensor k = row_major(k_[i]), u = is_same(k_[i], u_[i]) ? k : row_major(u_[i]);
      const int rows = static_cast<int>(n()), columns = static_cast<int>(k.size(0));
      AttentionParams params = {};
      params.v = k.const_data_ptr(), params.v_stride = row_stride(k), params.width = static_cast<int>(d());
      params.pairs.n = rows, params.pairs.m = columns, params.pairs.among = kAll;
      if (positive_.defined()) params.index = positive_.const_data_ptr<int>();
      params.first_key = static_cast<int>(first_[i]);
      params.drop_index = true;
      params.splits = parts[i];
      for (const bool teacher : {false, true}) {
        const at::Tensor &x = teacher ? t : q, &y = teacher ? u : k;
        params.features = {
            x.const_data_ptr(),         y.const_data_ptr(), row_stride(x), row_stride(y), rows, columns,
            static_cast<int>(x.size(1))};
        params.scale = scalar_of(teacher ? target_scale_ : scale_);
        params.peak = peak + 2 * plane * teacher + slot * n();
        params.total = params.peak + plane;
        params.mean = mean + plane * d() * teacher + slot * n() * d();
        params.index_logit = logits.mutable_data_ptr<float>() + n() * teacher;
        launch_attention_sm90(params, type_, stream());
      }
      slot += parts[i];
    }
    SoftTargetCombineParams params = {};
    params.peak = peak, params.total = peak + plane, params.mean = mean;
    params.target_peak = peak + 2 * plane, params.target_total = peak + 3 * plane;
    params.target_mean = mean + plane * d();
    params.slots = slots, params.n = static_cast<int>(n()), params.d = static_cast<int>(d());
    if (positive_.defined()) params.positive = positive_.const_data_ptr<int>();
    params.columns = static_cast<int>(columns_);
    params.logit = logits.const_data_ptr<float>();
    params.zero = zero_;
    params.scale = scalar_of(scale_);
    params.q = q.const_data_ptr(), params.q_stride = row_stride(q);
    params.rows = out.rows(0);
    if (mean_key.numel() > 0) {
      params.mean_key = mean_key.mutable_data_ptr<float>();
      params.mean_target_key = mean_target_key.mutable_data_ptr<float>();
    }
    launch_soft_target_combine(params, type_, stream());
  }

  void forward_by_chunks(Statistics& out, at::Tensor& mean_key, at::Tensor& mean_target_key) {
    // A softmax is at most 1.
    const float factor = type_ == Type::kHalf ? 0x1p15f : 1.0f;
    const bool means = mean_key.numel() > 0;
    if (means) mean_key.zero_(), mean_target_key.zero_();
    for_chunks(
        [&](int64_t row, int64_t, const SoftTargetLogits& logits, const at::Tensor& s, const at::Tensor& t) {
          launch_soft_target_statistics({logits, out.rows(row)}, stream());
          if (!means) return;
          SoftTargetMatricesParams params = {};
          params.logits = logits;
          params.gradients = out.with({}, row);
          params.means = params.write_g = params.write_h = true;
          params.factor = params.target_factor = {nullptr, factor};
          launch_soft_target_matrices(params, type_, stream());
          for (size_t i = 0; i < k_.size(); ++i) {
            if (k_[i].size(0) == 0) continue;
            add_rows(mean_key, row, matrix(s, i), k_[i]);
            add_rows(mean_target_key, row, matrix(t, i), k_[i]);
          }
        });
    if (factor != 1.0f) mean_key.div_(factor), mean_target_key.div_(factor);
  }

  // f(first row, rows, logits, S, T) for some rows after others, with all of their columns.
  template <typename F>
  void for_chunks(F f) {
    if (n() == 0) return;
    const int64_t row_bytes = 2 * sizeof(float) * std::max<int64_t>(width_, 1);
    const int64_t rows = std::min(n(), std::max<int64_t>(1, kLogitBytes / row_bytes));
    const at::Tensor buffer = floats({2, rows, width_}), positive = padded_positive();
    for (int64_t row = 0; row < n(); row += rows) {
      const int64_t count = std::min(rows, n() - row);
      at::Tensor s = buffer[0].narrow(0, 0, count), t = buffer[1].narrow(0, 0, count);
      for (size_t i = 0; i < k_.size(); ++i) {
        const int64_t m = k_[i].size(0), filling = round_up(m, kSegmentAlignment) - m;
        if (m == 0) continue;
        product_into(s.narrow(1, start_[i], m), q_.narrow(0, row, count), k_[i].t());
        product_into(t.narrow(1, start_[i], m), t_.narrow(0, row, count), u_[i].t());
        if (filling == 0) continue;
        for (const at::Tensor& x : {s, t})
          x.narrow(1, start_[i] + m, filling).fill_(-std::numeric_limits<float>::infinity());
      }
      const SoftTargetLogits logits = {s.mutable_data_ptr<float>(),
                                       t.mutable_data_ptr<float>(),
                                       static_cast<int>(count),
                                       static_cast<int>(width_),
                                       scalar_of(scale_),
                                       scalar_of(target_scale_),
                                       positive.defined() ? positive.const_data_ptr<int>() + row : nullptr,
                                       zero_};
      f(row, count, logits, s, t);
    }
  }

  // The positives as columns of the buffer.
  at::Tensor padded_positive() const {
    if (!positive_.defined() || width_ == columns_) return positive_;
    at::Tensor columns = positive_.masked_fill(positive_.ge(columns_), -1);
    for (size_t i = 1; i < k_.size(); ++i) {
      const int64_t shift = (start_[i] - first_[i]) - (start_[i - 1] - first_[i - 1]);
      if (shift > 0) columns.add_(positive_.ge(first_[i]).logical_and(columns.ge(0)).to(at::kInt), shift);
    }
    return columns;
  }

  // Segment i of G or of H, where the kernel left it.
  at::Tensor matrix(const at::Tensor& logits, size_t i) const {
    return logits.view(q_.scalar_type()).narrow(1, start_[i], k_[i].size(0));
  }

  static void add_rows(at::Tensor& total, int64_t row, const at::Tensor& a, const at::Tensor& b) {
    at::Tensor rows = total.narrow(0, row, a.size(0));
    add_product(rows, a, b);
  }

  // [2] for G and for H, where float16 needs them.
  at::Tensor largest_factors(const Statistics& statistics, const RowGradients& gradients) const {
    if (type_ != Type::kHalf || n() == 0) return {};
    at::Tensor factors = floats({2});
    launch_soft_target_factors(
        {statistics.with(gradients, 0), static_cast<int>(n()), factors.mutable_data_ptr<float>()}, stream());
    return factors;
  }
  static Scalar factor(const at::Tensor& factors, int which) {
    if (!factors.defined()) return {nullptr, 1.0f};
    return {factors.const_data_ptr<float>() + which, 0.0f};
  }

  // The gradient of x from its sum of products.
  at::Tensor finish(at::Tensor& total, bool needed, const at::Tensor& x, const at::Tensor& scale,
                    const at::Tensor& factors, int which) const {
    if (!needed) return floats({0});
    if (!total.defined()) return zeros(x.sizes(), x.scalar_type());
    total.mul_(scale);
    if (factors.defined()) total.div_(factors[which]);
    return total.to(x.scalar_type());
  }

  at::Tensor q_, t_;
  std::vector<at::Tensor> k_, u_;
  at::Tensor scale_, target_scale_, positive_;  // positive_: int32, or undefined
  bool zero_;
  Type type_;
  int64_t columns_ = 0, width_ = 0;     // of all segments, without and with their filling
  std::vector<int64_t> first_, start_;  // a segment's first column, the same
};

}  // namespace
}  // namespace cuda

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> soft_target_forward(
    const SoftTarget& problem, bool save_gradient) {
  const cuda::DeviceGuard guard(problem.q);
  return cuda::SoftTargetEngine(problem).forward(save_gradient);
}

std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor>
soft_target_backward(const SoftTargetIncoming& incoming, const SoftTarget& problem,
                     const SoftTargetSaved& saved, std::array<bool, 4> needs) {
  const cuda::DeviceGuard guard(problem.q);
  cuda::SoftTargetEngine engine(problem);
  const cuda::Statistics statistics = {saved.lse.contiguous(), saved.target_lse.contiguous(),
                                       saved.cross.contiguous(), saved.positive_sum.contiguous()};
  const cuda::RowGradients gradients(incoming);
  if (saved.mean_key.numel() > 0 && !needs[1] && !needs[2] && !needs[3])
    return engine.from_means(statistics, gradients, saved.mean_key, saved.mean_target_key, needs[0]);
  return engine.by_chunks(statistics, gradients, needs);
}

}  // namespace cl_kernels
