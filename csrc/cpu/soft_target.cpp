#include "../soft_target.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <deque>

#include "operand.h"
#include "rows.h"
#include "schedule.h"

namespace cl_kernels {
namespace cpu {
namespace {

template <typename Mode>
class SoftTargetEngine {
 public:
  using T = typename Mode::Sum;

  explicit SoftTargetEngine(const SoftTarget& problem)
      : scale_(problem.scale.item<double>()),
        target_scale_(problem.target_scale.item<double>()),
        zero_(problem.positive_in_target == "zero"),
        input_type_(problem.q.scalar_type()),
        q_(problem.q),
        target_q_(problem.target_q),
        row_block_(rectangle_block(problem.q.size(0))) {
    if (problem.positive) positive_ = problem.positive->contiguous();
    int64_t first = 0;
    for (size_t i = 0; i < problem.k.size(); ++i) {
      segments_.emplace_back(problem.k[i], problem.target_k[i], first);
      first += problem.k[i].size(0);
    }
    col_block_ = rectangle_block(first);
    for (size_t i = 0; i < segments_.size(); ++i)
      for (int64_t col = 0; col < segments_[i].k.n(); col += col_block_) tiles_.push_back({i, col});
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(
      bool save_gradient) {
    const at::TensorOptions options = this->options();
    at::Tensor lse = at::empty({n()}, at::kDouble), target_lse = at::empty_like(lse),
               cross = at::empty_like(lse);
    at::Tensor positive_sum = at::zeros({positive_.defined() ? n() : 0}, at::kDouble);
    at::Tensor mean_key = at::zeros({save_gradient ? n() : 0, q_.padded_d()}, options);
    at::Tensor mean_target_key = at::zeros_like(mean_key);
    prepare_logits();
    if (save_gradient)
      for (Segment& segment : segments_) segment.k.make_row_panels();
    Scratch<T> scratch(2 * GradientProduct<Mode>::kTiles * tile_elements() + 4 * row_block_);
    run_tasks(row_blocks(), flops(save_gradient ? 4 : 2) * tiles_.size(), [&](int64_t a) {
      const int64_t row = a * row_block_;
      const int rows = rows_of(a);
      T* s = scratch.get();
      T* t = s + GradientProduct<Mode>::kTiles * tile_elements();
      T *max = t + GradientProduct<Mode>::kTiles * tile_elements(), *sum = max + row_block_,
        *target_max = sum + row_block_, *decay = target_max + row_block_;
      std::vector<double> target_sum(row_block_), weighted(row_block_);
      std::fill(max, decay + row_block_, T(0));
      std::fill(max, max + row_block_, -std::numeric_limits<T>::infinity());
      std::fill(target_max, target_max + row_block_, -std::numeric_limits<T>::infinity());
      T* o = mean_key.mutable_data_ptr<T>() + row * q_.padded_d();
      T* u = mean_target_key.mutable_data_ptr<T>() + row * q_.padded_d();
      for (const ColumnTile& b : tiles_) {
        const int cols = cols_of(b), padded = static_cast<int>(round_up(cols, kTileAlign));
        logits(row, rows, b, s, t);
        for_positives(row, rows, b, [&](int i, int64_t j) {
          positive_sum.mutable_data_ptr<double>()[row + i] = s[i * ld() + j] * kLn2;
        });
        tile_kernels<Mode>().row.online_cross({s, t, ld(), rows, padded}, target_max, target_sum.data(),
                                              weighted.data(), decay);
        if (save_gradient) {
          fill_positive(row, rows, b, t, T(0));
          decay_rows(u, decay, rows);
          GradientProduct<Mode>(t, ld(), t + tile_elements(), rows, cols)
              .add_rows(segments_[b.segment].k, b.col, u);
        }
        fill_tail(s, rows, cols, -std::numeric_limits<T>::infinity());
        tile_kernels<Mode>().row.online(s, ld(), rows, padded, save_gradient, max, sum, decay);
        if (save_gradient) {
          fill_positive(row, rows, b, s, T(0));
          decay_rows(o, decay, rows);
          GradientProduct<Mode>(s, ld(), s + tile_elements(), rows, cols)
              .add_rows(segments_[b.segment].k, b.col, o);
        }
      }
      for (int i = 0; i < rows; ++i) {
        lse.mutable_data_ptr<double>()[row + i] = log_of_sum(max[i], sum[i]);
        target_lse.mutable_data_ptr<double>()[row + i] = log_of_sum(target_max[i], target_sum[i]);
        cross.mutable_data_ptr<double>()[row + i] =
            target_sum[i] == 0 ? 0 : weighted[i] * kLn2 / target_sum[i];  // NaN where the sum is
        decay[i] = sum[i] == 0 ? T(0) : T(1) / sum[i];
        sum[i] = target_sum[i] == 0 ? T(0) : static_cast<T>(1 / target_sum[i]);
      }
      if (save_gradient) {
        decay_rows(o, decay, rows);
        decay_rows(u, sum, rows);
      }
    });
    if (!save_gradient) mean_key = at::empty({0}, options), mean_target_key = at::empty({0}, options);
    auto trim = [&](const at::Tensor& x) { return save_gradient ? x.narrow(1, 0, q_.d()).contiguous() : x; };
    return {lse, target_lse, cross, positive_sum, trim(mean_key), trim(mean_target_key)};
  }

  std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor>
  backward(const SoftTargetIncoming& incoming, const SoftTargetSaved& saved, std::array<bool, 4> needs) {
    const Rows rows(n(), incoming, saved);
    const auto [need_q, need_k, need_target_q, need_target_k] = needs;
    const at::TensorOptions options = this->options();
    at::Tensor grad_q = at::zeros({n(), q_.padded_d()}, options);  // always, for the gradient of the scale
    at::Tensor grad_target_q = at::zeros({need_target_q ? n() : 0, target_q_.padded_d()}, options);
    std::vector<at::Tensor> grad_k, grad_target_k;
    for (Segment& segment : segments_) {
      grad_k.push_back(at::zeros({need_k ? segment.k.n() : 0, q_.padded_d()}, options));
      grad_target_k.push_back(at::zeros({need_target_k ? segment.k.n() : 0, target_q_.padded_d()}, options));
    }
    if (saved.mean_key.dim() == 2 && !need_k && !need_target_q && !need_target_k)
      gradient_from_means(rows, saved.mean_key, saved.mean_target_key, grad_q);
    else
      gradient_from_tiles(rows, needs, grad_q, grad_k, grad_target_q, grad_target_k);

    at::Tensor grad_scale = contraction<T>(sum_rows(q_), grad_q);
    at::Tensor grad_target_scale =
        need_target_q ? contraction<T>(sum_rows(target_q_), grad_target_q) : at::zeros({}, options);
    auto finish = [&](at::Tensor& grad, int64_t d, double scale, bool need) {
      grad = need ? finish_gradient(grad, d, scale, input_type_) : at::empty({0}, options);
    };
    finish(grad_q, q_.d(), scale_, need_q);
    finish(grad_target_q, target_q_.d(), target_scale_, need_target_q);
    for (at::Tensor& grad : grad_k) finish(grad, q_.d(), scale_, need_k);
    for (at::Tensor& grad : grad_target_k) finish(grad, target_q_.d(), target_scale_, need_target_k);
    return {grad_q, grad_k, grad_target_q, grad_target_k, grad_scale, grad_target_scale};
  }

 private:
  struct Segment {
    Operand<Mode> k;
    std::optional<Operand<Mode>> target_k;  // unless it is k itself
    int64_t first;                          // column of its first key
    Segment(const at::Tensor& k, const at::Tensor& target, int64_t first) : k(k), first(first) {
      if (!k.is_same(target)) target_k.emplace(target);
    }
    Operand<Mode>& target() { return target_k ? *target_k : k; }
  };
  struct ColumnTile {
    size_t segment;
    int64_t col;  // within the segment
  };

  // What the gradient needs of each row: statistics, the log-sum-exps in base 2, and the incoming gradients,
  // 0 where there are no columns.
  struct Rows {
    std::vector<double> lse, target_lse, cross, positive;
    std::vector<T> lse_coef, target_coef, cross_coef, positive_coef;

    Rows(int64_t n, const SoftTargetIncoming& incoming, const SoftTargetSaved& saved) {
      auto copy = [&](const std::optional<at::Tensor>& x, auto& out) {
        out.assign(n, 0);
        if (x) copy_rows(*x, out.data());
      };
      copy(saved.lse, lse);
      copy(saved.target_lse, target_lse);
      copy(saved.cross, cross);
      copy(saved.positive_sum, positive);
      copy(incoming.lse, lse_coef);
      copy(incoming.target_lse, target_coef);
      copy(incoming.cross, cross_coef);
      copy(incoming.positive_sum, positive_coef);
      auto to_base_2 = [](double& value) {
        const bool empty = value == -std::numeric_limits<double>::infinity();
        value = empty ? 0 : value * kLog2e;
        return empty;
      };
      for (int64_t i = 0; i < n; ++i) {
        if (to_base_2(lse[i])) lse_coef[i] = T(0);
        if (to_base_2(target_lse[i])) target_coef[i] = cross_coef[i] = T(0);
      }
    }
  };

  int64_t n() const { return q_.n(); }
  at::TensorOptions options() const { return q_.tensor().options().dtype(sum_type<Mode>()); }
  int64_t row_blocks() const { return ceil_div(n(), row_block_); }
  int rows_of(int64_t a) const { return static_cast<int>(std::min(row_block_, n() - a * row_block_)); }
  int cols_of(const ColumnTile& b) const {
    return static_cast<int>(std::min(col_block_, segments_[b.segment].k.n() - b.col));
  }
  ptrdiff_t ld() const { return round_up(col_block_, kTileAlign); }
  int64_t tile_elements() const { return round_up(row_block_, 2) * ld(); }
  int64_t flops(int products) const { return 2 * products * row_block_ * col_block_ * q_.d(); }

  void prepare_logits() {
    q_.make_rows();
    target_q_.make_rows();
    for (Segment& segment : segments_) {
      segment.k.make_col_panels();
      segment.target().make_col_panels();
    }
  }

  // Base-2 logits of the student and of the teacher. Columns past the end: 0 for the student, -inf for the
  // teacher.
  void logits(int64_t row, int rows, const ColumnTile& b, T* s, T* t) {
    const int cols = cols_of(b);
    const auto& product = tile_kernels<Mode>().product;
    const int panels = static_cast<int>(ceil_div(cols, product.panel_width));
    product.dot(q_.row(row), q_.depth(), rows, segments_[b.segment].k.col_panels(b.col), q_.depth(), panels,
                static_cast<T>(scale_ * kLog2e), s, ld());
    product.dot(target_q_.row(row), target_q_.depth(), rows, segments_[b.segment].target().col_panels(b.col),
                target_q_.depth(), panels, static_cast<T>(target_scale_ * kLog2e), t, ld());
    fill_tail(s, rows, cols, T(0));
    fill_tail(t, rows, cols, -std::numeric_limits<T>::infinity());
    fill_positive(row, rows, b, t, zero_ ? T(0) : -std::numeric_limits<T>::infinity());
  }

  void fill_tail(T* s, int rows, int cols, T value) const {
    for (int i = 0; i < rows; ++i)
      std::fill(s + i * ld() + cols, s + i * ld() + round_up(cols, kTileAlign), value);
  }

  // f(i, j) for the rows whose positive is a column of this tile.
  template <typename F>
  void for_positives(int64_t row, int rows, const ColumnTile& b, F f) const {
    if (!positive_.defined()) return;
    const int64_t* positive = positive_.const_data_ptr<int64_t>() + row;
    for (int i = 0; i < rows; ++i) {
      const int64_t j = positive[i] - segments_[b.segment].first - b.col;
      if (j >= 0 && j < cols_of(b)) f(i, j);
    }
  }
  void fill_positive(int64_t row, int rows, const ColumnTile& b, T* s, T value) const {
    for_positives(row, rows, b, [&](int i, int64_t j) { s[i * ld() + j] = value; });
  }

  void decay_rows(T* x, const T* decay, int rows) const {
    for (int i = 0; i < rows; ++i)
      if (decay[i] != 1)
        for (int64_t c = 0; c < q_.padded_d(); ++c) x[i * q_.padded_d() + c] *= decay[i];
  }

  // f(i, the key of row i's positive) for every row that has one.
  template <typename F>
  void for_positive_keys(F f) {
    const int64_t* positive = positive_.const_data_ptr<int64_t>();
    using Element = std::conditional_t<Mode::kPack == 2, at::BFloat16, T>;
    at::parallel_for(0, n(), 64, [&](int64_t begin, int64_t end) {
      std::vector<T> key(q_.d());
      for (int64_t i = begin; i < end; ++i) {
        if (positive[i] < 0) continue;
        size_t s = segments_.size() - 1;
        while (segments_[s].first > positive[i]) --s;
        const at::Tensor& keys = segments_[s].k.tensor();
        const Element* from =
            keys.template const_data_ptr<Element>() + (positive[i] - segments_[s].first) * keys.stride(0);
        for (int64_t c = 0; c < q_.d(); ++c) key[c] = static_cast<T>(from[c * keys.stride(1)]);
        f(i, key.data());
      }
    });
  }

  // G k, of row means that the forward kept; the positive's own share is added here, in full precision.
  void gradient_from_means(const Rows& r, const at::Tensor& mean_key, const at::Tensor& mean_target_key,
                           at::Tensor& grad_q) {
    const int64_t d = q_.d(), ld = q_.padded_d();
    T* out = grad_q.mutable_data_ptr<T>();
    const T *o = mean_key.const_data_ptr<T>(), *u = mean_target_key.const_data_ptr<T>();
    for_rows(n(), d, [&](int64_t i) {
      for (int64_t c = 0; c < d; ++c)
        out[i * ld + c] = r.lse_coef[i] * o[i * d + c] + r.cross_coef[i] * u[i * d + c];
    });
    if (!positive_.defined()) return;
    for_positive_keys([&](int64_t i, const T* key) {
      double weight = r.positive_coef[i] + r.lse_coef[i] * std::exp2(r.positive[i] * kLog2e - r.lse[i]);
      if (zero_) weight += r.cross_coef[i] * std::exp2(-r.target_lse[i]);
      for (int64_t c = 0; c < d; ++c) out[i * ld + c] += static_cast<T>(weight) * key[c];
    });
  }

  void gradient_from_tiles(const Rows& r, std::array<bool, 4> needs, at::Tensor& grad_q,
                           std::vector<at::Tensor>& grad_k, at::Tensor& grad_target_q,
                           std::vector<at::Tensor>& grad_target_k) {
    const bool need_k = needs[1], need_target_q = needs[2], need_target_k = needs[3];
    prepare_logits();
    for (Segment& segment : segments_) {
      segment.k.make_row_panels();
      if (need_target_q) segment.target().make_row_panels();
    }
    if (need_k) q_.make_row_panels();
    if (need_target_k) target_q_.make_row_panels();
    // Log-sum-exps rounded to T; what rounding leaves goes into the coefficients.
    std::vector<T> lse(n()), target_lse(n()), lse_coef(n()), target_coef(n()), cross_coef(n()), cross(n()),
        cross_rest(n());
    for (int64_t i = 0; i < n(); ++i) {
      lse[i] = static_cast<T>(r.lse[i]);
      target_lse[i] = static_cast<T>(r.target_lse[i]);
      const double rest = std::exp2(target_lse[i] - r.target_lse[i]);
      lse_coef[i] = static_cast<T>(r.lse_coef[i] * std::exp2(lse[i] - r.lse[i]));
      target_coef[i] = static_cast<T>(r.target_coef[i] * rest);
      cross_coef[i] = static_cast<T>(r.cross_coef[i] * rest);
      cross[i] = static_cast<T>(r.cross[i] * kLog2e);
      cross_rest[i] = static_cast<T>(r.cross[i] * kLog2e - cross[i]);
    }
    constexpr int kTiles = GradientProduct<Mode>::kTiles;
    Scratch<T> scratch(2 * kTiles * tile_elements());
    auto visit = [&](int64_t a, int64_t tile) {
      const ColumnTile& b = tiles_[tile];
      Segment& segment = segments_[b.segment];
      const int64_t row = a * row_block_;
      const int rows = rows_of(a), cols = cols_of(b);
      T *s = scratch.get(), *t = s + kTiles * tile_elements();
      logits(row, rows, b, s, t);
      tile_kernels<Mode>().row.soft_target_gradient(
          {s, t, ld(), rows, static_cast<int>(round_up(cols, kTileAlign))},
          {lse_coef.data() + row, lse.data() + row, cross_coef.data() + row, target_lse.data() + row,
           target_coef.data() + row, cross.data() + row, cross_rest.data() + row});
      fill_tail(s, rows, cols, T(0));
      for_positives(row, rows, b, [&](int i, int64_t j) {
        s[i * ld() + j] += r.positive_coef[row + i];
        t[i * ld() + j] = T(0);
      });
      const GradientProduct<Mode> g(s, ld(), s + tile_elements(), rows, cols);
      g.add_rows(segment.k, b.col, grad_q.mutable_data_ptr<T>() + row * q_.padded_d());
      if (need_k)
        g.add_cols(q_, row, grad_k[b.segment].template mutable_data_ptr<T>() + b.col * q_.padded_d());
      if (!need_target_q && !need_target_k) return;
      const GradientProduct<Mode> h(t, ld(), t + tile_elements(), rows, cols);
      const int64_t e = target_q_.padded_d();
      if (need_target_q) h.add_rows(segment.target(), b.col, grad_target_q.mutable_data_ptr<T>() + row * e);
      if (need_target_k)
        h.add_cols(target_q_, row, grad_target_k[b.segment].template mutable_data_ptr<T>() + b.col * e);
    };
    visit_rectangle(row_blocks(), tiles_.size(), flops(5), visit);
  }

  double scale_, target_scale_;
  bool zero_;
  at::ScalarType input_type_;
  Operand<Mode> q_, target_q_;
  at::Tensor positive_;
  std::deque<Segment> segments_;
  std::vector<ColumnTile> tiles_;
  int64_t row_block_, col_block_;
};

void check(const SoftTarget& problem) {
  const auto& [q, k, target_q, target_k, scale, target_scale, positive, positive_in_target] = problem;
  TORCH_CHECK_VALUE(q.dim() == 2 && q.size(1) > 0, "q must be [N, D] with features, got ", q.sizes());
  TORCH_CHECK_VALUE(target_q.dim() == 2 && target_q.size(0) == q.size(0) && target_q.size(1) > 0,
                    "target_q must be [", q.size(0), ", E] with features, got ", target_q.sizes());
  TORCH_CHECK_VALUE(!k.empty() && k.size() == target_k.size(),
                    "k and target_k must have as many segments, got ", k.size(), " and ", target_k.size());
  TORCH_CHECK_VALUE(positive_in_target == "exclude" || positive_in_target == "zero",
                    "positive_in_target must be 'exclude' or 'zero', got '", std::string(positive_in_target),
                    "'");
  int64_t m = 0;
  for (size_t i = 0; i < k.size(); ++i) {
    TORCH_CHECK_VALUE(k[i].dim() == 2 && k[i].size(1) == q.size(1), "a segment of k must be [M, ", q.size(1),
                      "], got ", k[i].sizes());
    TORCH_CHECK_VALUE(target_k[i].dim() == 2 && target_k[i].size(0) == k[i].size(0) &&
                          target_k[i].size(1) == target_q.size(1),
                      "a segment of target_k must be [", k[i].size(0), ", ", target_q.size(1), "], got ",
                      target_k[i].sizes());
    for (const at::Tensor& x : {k[i], target_k[i], target_q})
      TORCH_CHECK_TYPE(x.scalar_type() == q.scalar_type(), "keys and targets must be of q's type ",
                       q.scalar_type(), ", got ", x.scalar_type());
    m += k[i].size(0);
  }
  if (!positive) return;
  TORCH_CHECK_VALUE(positive->dim() == 1 && positive->size(0) == q.size(0), "positive must be [", q.size(0),
                    "], got ", positive->sizes());
  check_index("positive", *positive, m);
}

}  // namespace
}  // namespace cpu

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> soft_target_forward(
    const SoftTarget& problem, bool save_gradient) {
  cpu::check(problem);
  return cpu::with_mode(problem.q.scalar_type(), [&](auto mode) {
    return cpu::SoftTargetEngine<decltype(mode)>(problem).forward(save_gradient);
  });
}

std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor>
soft_target_backward(const SoftTargetIncoming& incoming, const SoftTarget& problem,
                     const SoftTargetSaved& saved, std::array<bool, 4> needs) {
  cpu::check(problem);
  return cpu::with_mode(problem.q.scalar_type(), [&](auto mode) {
    return cpu::SoftTargetEngine<decltype(mode)>(problem).backward(incoming, saved, needs);
  });
}

}  // namespace cl_kernels
