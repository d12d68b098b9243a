#include "../contrastive.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>
#include <unordered_map>
#include <vector>

#include "budget.h"
#include "loss.h"
#include "operand.h"
#include "rows.h"
#include "schedule.h"

namespace cl_kernels {
namespace cpu {
namespace {

enum class Among { kAll, kSame, kDifferent };

Among parse_among(std::string_view among) {
  if (among == "all") return Among::kAll;
  if (among == "same") return Among::kSame;
  TORCH_CHECK_VALUE(among == "different", "among must be 'all', 'same' or 'different', got '",
                    std::string(among), "'");
  return Among::kDifferent;
}

// Labels as small integers, equal where the labels are. Columns are padded to whole tiles with an id that no
// row has.
template <typename Id>
struct LabelIds {
  std::vector<Id> rows, cols;
  int64_t classes = 0;

  LabelIds(const at::Tensor& row_labels, const at::Tensor& col_labels, bool same) {
    const at::Tensor row_flat = row_labels.contiguous(), col_flat = col_labels.contiguous();
    const int64_t *row = row_flat.const_data_ptr<int64_t>(), *col = col_flat.const_data_ptr<int64_t>();
    const int64_t n = row_flat.numel(), m = col_flat.numel();
    rows.resize(n);
    int64_t low = std::numeric_limits<int64_t>::max(), high = std::numeric_limits<int64_t>::min();
    for (const auto& [label, count] : {std::pair{row, n}, std::pair{col, m}})
      for (int64_t i = 0; i < count; ++i) low = std::min(low, label[i]), high = std::max(high, label[i]);
    // A table where the labels are dense, as class labels are; a hash map for the others.
    const uint64_t range = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
    if (range < static_cast<uint64_t>(4 * (n + m))) {
      std::vector<Id> table(range + 1, Id{-1});
      number(row, col, same, m, [&](int64_t label) -> Id& { return table[label - low]; });
    } else {
      std::unordered_map<int64_t, Id> table;
      number(row, col, same, m,
             [&](int64_t label) -> Id& { return table.try_emplace(label, Id{-1}).first->second; });
    }
  }

 private:
  template <typename Slot>
  void number(const int64_t* row, const int64_t* col, bool same, int64_t m, Slot slot) {
    auto id_of = [&](int64_t label) {
      Id& id = slot(label);
      if (id < 0) id = static_cast<Id>(classes++);
      return id;
    };
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = id_of(row[i]);
    cols.assign(round_up(m, kTileAlign), Id{-1});
    if (same)
      std::copy(rows.begin(), rows.end(), cols.begin());
    else
      for (int64_t j = 0; j < m; ++j) cols[j] = id_of(col[j]);
  }
};

// Whether two vectors are the same memory.
bool is_same(const at::Tensor& a, const at::Tensor& b) {
  return a.const_data_ptr() == b.const_data_ptr() && a.sizes() == b.sizes() && a.strides() == b.strides();
}

// A tile: rows [row, row + rows), columns [col, col + cols) of the similarity matrix.
struct Tile {
  int64_t row, col;
  int rows, cols;
  int padded_cols() const { return static_cast<int>(round_up(cols, kTileAlign)); }
};

// Logits are held in base 2, times log2(e), so that every exponential is one exp2.
template <typename Mode>
class Engine {
 public:
  using T = typename Mode::Sum;
  using Id = typename Mode::Id;

  explicit Engine(const Contrast& problem)
      : problem_(problem),
        scale_(problem.scale.item<double>()),
        among_(parse_among(problem.among)),
        gradient_type_(problem.q.scalar_type()),
        q_(problem.q) {
    if (problem.k) k_.emplace(*problem.k);
    if (problem.key_bias) bias_ = problem.key_bias->to(sum_type<Mode>()).mul(kLog2e).contiguous();
    if (problem.positive_index) index_ = problem.positive_index->contiguous();
    if (problem.positive_mask) mask_ = problem.positive_mask->to(sum_type<Mode>()).contiguous();
    const bool same_labels = !problem.row_labels || is_same(*problem.row_labels, *problem.col_labels);
    if (problem.row_labels) ids_.emplace(*problem.row_labels, *problem.col_labels, same_labels);
    symmetric_ = !problem.k && !problem.both_axes && problem.exclude.value_or(0) == 0 && same_labels &&
                 !bias_.defined() && !mask_.defined();
    row_block_ = symmetric_ ? triangle_block(n()) : rectangle_block(n());
    col_block_ = symmetric_ ? row_block_ : rectangle_block(m());
  }

  std::tuple<at::Tensor, at::Tensor> log_sum_exp() {
    at::Tensor lse = at::empty({n()}, at::kDouble);
    at::Tensor lse_cols = at::empty({problem_.both_axes ? m() : 0}, at::kDouble);
    q_.make_rows();
    key().make_col_panels();
    start_positives();
    const bool shared_exp = (symmetric_ || problem_.both_axes) && !bias_.defined();
    // The log-sum-exp of a single column is its logit to the last bit where the shift is that logit.
    const bool single = std::min(n(), m()) <= 2;
    if (!shared_exp || single || !fixed_shift(lse, lse_cols)) {
      start_positives();
      online(lse);
      if (problem_.both_axes) transposed().online(lse_cols);
      if (problem_.both_axes && bias_.defined()) lse_cols.add_(bias_, kLn2);
    }
    return {lse, lse_cols};
  }

  // After log_sum_exp, whose tiles hold the logits of the positives: the very ones that the log-sum-exps were
  // made of, so that lse - S of a converged row keeps its digits.
  std::tuple<at::Tensor, at::Tensor> positives() {
    at::Tensor sum = at::empty({has_positives() ? n() : 0}, at::kDouble), count = at::empty_like(sum);
    double* out = sum.mutable_data_ptr<double>();
    for (int64_t i = 0; i < sum.numel(); ++i) out[i] = positive_sum_[i] * kLn2;
    if (has_positives()) count_positives(count.mutable_data_ptr<double>());
    return {sum, count};
  }

  // The loss, and where they are needed its gradients, in the type of sums.
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> loss(const LossOptions& options) {
    const bool any = options.needs[0] || options.needs[1] || options.needs[2];
    if (any) keep_logits();
    const auto [lse, lse_cols] = log_sum_exp();
    const auto [sum, count] = positives();
    positive_sum_.clear();
    const RowLosses rows(lse, lse_cols, sum, count, options);
    const at::TensorOptions type = q_.tensor().options().dtype(sum_type<Mode>());
    const at::Tensor loss = at::scalar_tensor(rows.loss, type);
    auto none = [&] { return at::empty({0}, type); };
    if (!any) return {loss, none(), none(), none()};
    gradient_type_ = sum_type<Mode>();
    ContrastIncoming incoming{rows.grad_lse, std::nullopt, std::nullopt};
    if (problem_.both_axes) incoming.lse_cols = rows.grad_lse_cols;
    if (has_positives()) incoming.positive_sum = rows.grad_positive_sum;
    auto [grad_q, grad_k, grad_scale, grad_bias] =
        gradient(incoming, {lse, lse_cols, none()}, {options.needs[0], options.needs[1], true, false});
    return {loss, grad_q, grad_k, grad_scale};
  }

  // (P - W) k, the gradient of frozen keys' queries but for the gradients of the rows, and the scale.
  at::Tensor residual(const at::Tensor& lse) {
    const at::Tensor ones = at::ones({n()}, at::kDouble);
    std::optional<at::Tensor> positive;
    if (index_.defined()) positive = ones.neg();
    set_rows(ones, positive, lse);
    at::Tensor out = at::zeros({n(), q_.padded_d()}, q_.tensor().options().dtype(sum_type<Mode>())), none;
    rectangle_gradient(true, false, false, out, none, none);
    return out.narrow(1, 0, q_.d()).contiguous();
  }

  // From the residual: where only the queries and the scale need a gradient.
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gradient_from_residual(
      const at::Tensor& residual, const ContrastIncoming& incoming, bool need_q, bool need_scale) {
    const int64_t d = q_.d();
    std::vector<T> lse_grad(n(), T(0)), positive_grad(n(), T(0));
    if (incoming.lse) copy_rows(*incoming.lse, lse_grad.data());
    if (incoming.positive_sum) copy_rows(*incoming.positive_sum, positive_grad.data());
    const at::Tensor keys = index_.defined() ? sum_rows(key()) : at::Tensor();
    at::Tensor grad = at::empty_like(residual);
    T* out = grad.template mutable_data_ptr<T>();
    const T* r = residual.const_data_ptr<T>();
    for_rows(n(), d, [&](int64_t i) {
      for (int64_t c = 0; c < d; ++c) out[i * d + c] = lse_grad[i] * r[i * d + c];
      const int64_t j = index_.defined() ? index_.const_data_ptr<int64_t>()[i] : -1;
      if (j < 0) return;
      const T* positive = keys.const_data_ptr<T>() + j * d;
      for (int64_t c = 0; c < d; ++c) out[i * d + c] += (lse_grad[i] + positive_grad[i]) * positive[c];
    });
    auto none = [&] { return at::empty({0}, grad.options()); };
    at::Tensor grad_scale = need_scale ? contraction<T>(sum_rows(q_), grad) : none();
    return {need_q ? finish(grad) : none(), none(), grad_scale, none()};
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gradient(const ContrastIncoming& incoming,
                                                                      const ContrastSaved& saved,
                                                                      std::array<bool, 4> needs) {
    const at::TensorOptions options = q_.tensor().options().dtype(sum_type<Mode>());
    auto none = [&] { return at::empty({0}, options); };
    const auto [needs_q, needs_k, needs_scale, needs_bias] = needs;
    if (problem_.both_axes) cols_.set(incoming.lse_cols, saved.lse_cols);
    set_rows(incoming.lse, incoming.positive_sum, saved.lse);

    if (symmetric_) {
      at::Tensor grad = large_zeros<T>({n(), q_.padded_d()});
      triangle_gradient(grad);
      at::Tensor grad_scale = needs_scale ? contraction<T>(sum_rows(q_), grad).mul_(0.5) : none();
      return {needs_q ? finish(grad) : none(), none(), grad_scale, none()};
    }
    const bool self = !k_;
    const bool into_q = needs_q || !needs_k;  // one of them, for the gradient of the scale
    const bool into_k = self ? needs_q : needs_k;
    at::Tensor grad_q = into_q ? large_zeros<T>({n(), q_.padded_d()}) : none();
    at::Tensor grad_k = into_k ? large_zeros<T>({m(), q_.padded_d()}) : none();
    at::Tensor grad_bias = needs_bias ? at::zeros({m()}, options) : none(), grad_scale = none();
    rectangle_gradient(into_q, into_k, needs_bias, grad_q, grad_k, grad_bias);
    if (needs_scale)
      grad_scale = into_q ? contraction<T>(sum_rows(q_), grad_q) : contraction<T>(sum_rows(key()), grad_k);
    if (self && into_k) grad_q.add_(grad_k);
    return {needs_q ? finish(grad_q) : none(), !self && needs_k ? finish(grad_k) : none(), grad_scale,
            grad_bias};
  }

 private:
  int64_t n() const { return q_.n(); }
  int64_t m() const { return k_ ? k_->n() : q_.n(); }
  Operand<Mode>& key() { return k_ ? *k_ : q_; }

  Tile tile(int64_t row_block, int64_t col_block) const {
    const int64_t row = row_block * row_block_, col = col_block * col_block_;
    return {row, col, static_cast<int>(std::min(row_block_, n() - row)),
            static_cast<int>(std::min(col_block_, m() - col))};
  }
  int64_t row_blocks() const { return ceil_div(n(), row_block_); }
  int64_t col_blocks() const { return ceil_div(m(), col_block_); }
  int64_t flops(int products) const { return 2 * products * row_block_ * col_block_ * q_.d(); }

  // The same problem with rows and columns exchanged (without the bias, which is constant along a column).
  Engine transposed() {
    Contrast problem{key().tensor(), q_.tensor(), problem_.scale};
    if (problem_.exclude) problem.exclude = -*problem_.exclude;
    problem.row_labels = problem_.col_labels;
    problem.col_labels = problem_.row_labels;
    problem.among = problem_.among;
    Engine other(problem);
    other.q_.make_rows();
    other.key().make_col_panels();
    return other;
  }

  // Base-2 logits of a tile; what is left out becomes -inf. The forward adds up those of positives.
  void logits(const Tile& t, T* s, bool mirror) {
    tile_kernels<Mode>().product.dot(
        q_.row(t.row), q_.depth(), t.rows, key().col_panels(t.col), q_.depth(),
        static_cast<int>(ceil_div(t.cols, tile_kernels<Mode>().product.panel_width)),
        static_cast<T>(scale_ * kLog2e), s, ld());
    if (!positive_sum_.empty()) add_positives(t, s, mirror);
    const T out = -std::numeric_limits<T>::infinity();
    for (int i = 0; i < t.rows; ++i) std::fill(s + i * ld() + t.cols, s + i * ld() + t.padded_cols(), out);
    if (bias_.defined()) {
      const T* bias = bias_.const_data_ptr<T>() + t.col;
      for (int i = 0; i < t.rows; ++i)
        for (int j = 0; j < t.cols; ++j) s[i * ld() + j] += bias[j];
    }
    if (among_ != Among::kAll && !ids_) restrict_by_mask(t, s);
    if (among_ != Among::kAll && ids_) {
      const Id* cols = ids_->cols.data() + t.col;
      for (int i = 0; i < t.rows; ++i) {
        const Id id = ids_->rows[t.row + i];
        for (int j = 0; j < t.cols; ++j)
          if ((cols[j] == id) != (among_ == Among::kSame)) s[i * ld() + j] = out;
      }
    }
    fill_excluded(t, s, out);
  }

  // f(row in the tile, place in the tile, weights, how many) for every run of the mask along a tile's rows.
  template <typename F>
  void for_mask(const Tile& t, F f) const {
    const int64_t height = mask_.size(0), period = mask_.size(1);
    for (int i = 0; i < t.rows; ++i) {
      const T* weights = mask_.const_data_ptr<T>() + (t.row + i) % height * period;
      for (int64_t j = 0, c = t.col % period; j < t.cols; c = 0) {
        const int64_t run = std::min(t.cols - j, period - c);
        f(i, i * ld() + j, weights + c, static_cast<int>(run));
        j += run;
      }
    }
  }

  // Denominators by weight instead of label: of the pairs of weight 0, or each pair times its weight.
  void restrict_by_mask(const Tile& t, T* s) const {
    const T out = -std::numeric_limits<T>::infinity();
    for_mask(t, [&](int, int64_t at, const T* weights, int run) {
      T* x = s + at;
      if (among_ == Among::kDifferent) {
        for (int j = 0; j < run; ++j) x[j] = weights[j] != 0 ? out : x[j];
        return;
      }
      for (int j = 0; j < run; ++j)
        if (weights[j] != 1) x[j] = weights[j] == 0 ? out : x[j] + std::log2(weights[j]);
    });
  }

  void fill_excluded(const Tile& t, T* s, T value) const {
    if (!problem_.exclude) return;
    for (int i = 0; i < t.rows; ++i) {
      const int64_t j = t.row + i + *problem_.exclude - t.col;
      if (j >= 0 && j < t.cols) s[i * ld() + j] = value;
    }
  }

  ptrdiff_t ld() const { return round_up(col_block_, kTileAlign); }
  int64_t tile_elements() const { return round_up(row_block_, 2) * ld(); }

  // Keeps the logits of the first pass over the tiles for the second, where they fit the budget.
  void keep_logits() {
    const int64_t tiles = symmetric_ ? row_blocks() * (row_blocks() + 1) / 2 : row_blocks() * col_blocks();
    const int64_t elements = tiles * tile_elements();
    if (elements * static_cast<int64_t>(sizeof(T)) <= keep_budget()) kept_ = kept_memory<T>(elements);
  }

  // Where a tile's logits stand: among those kept, of a symmetric problem those from the diagonal on, or in a
  // thread's scratch memory.
  T* place(int64_t a, int64_t b, T* scratch) const {
    if (!kept_.defined() || (symmetric_ && a > b)) return scratch;
    const int64_t at = symmetric_ ? b * (b + 1) / 2 + a : a * col_blocks() + b;
    return kept_.mutable_data_ptr<T>() + at * tile_elements();
  }

  // A shift c common to every logit, so that one exponential serves its row and its column and sums are plain
  // sums. Logits lie in [-r, r], r = |scale| max|q_i| max|k_j|. No row can underflow where 2r fits into the
  // exponent range; up to a few times that the sums themselves tell. False: not possible, and nothing that
  // counts was written.
  bool fixed_shift(at::Tensor& lse, at::Tensor& lse_cols) {
    constexpr bool wide = sizeof(T) == 8;
    constexpr double range = wide ? 700 : 86, tiny = wide ? 1e-200 : 1e-25;
    const double headroom = range - std::log(static_cast<double>(std::max(n(), m())));
    const double norm = largest_norm(q_);
    const double r = std::abs(scale_) * norm * (k_ ? largest_norm(*k_) : norm);
    if (!(r <= 2.5 * range)) return false;
    const bool safe = r <= headroom;
    // A whole number: subtracting it from a logit is exact.
    const T shift = static_cast<T>(std::ceil(std::max(0.0, r - headroom) * kLog2e));
    std::vector<T> row_sum(round_up(n(), kTileAlign), T(0));
    std::vector<T> col_sum(symmetric_ ? 0 : round_up(m(), kTileAlign), T(0));
    Scratch<T> scratch(ld() + tile_elements());
    auto sum = [&](int64_t a, int64_t b, T* cols) {
      T* part = scratch.get();
      sum_tile(tile(a, b), place(a, b, part + ld()), shift, part, row_sum.data(), cols);
    };
    if (symmetric_) {
      visit_triangle(row_blocks(), flops(1),
                     [&](int64_t a, int64_t b) { sum(a, b, a == b ? nullptr : row_sum.data()); });
    } else {
      visit_rectangle(row_blocks(), col_blocks(), flops(1),
                      [&](int64_t a, int64_t b) { sum(a, b, col_sum.data()); });
    }
    auto finish_sums = [&](const std::vector<T>& sums, at::Tensor& out) {
      double* value = out.mutable_data_ptr<double>();
      for (int64_t i = 0; i < out.numel(); ++i) {
        if (!safe && !(sums[i] >= tiny)) return false;
        value[i] = log_of_sum(shift, sums[i]);
      }
      return true;
    };
    return finish_sums(row_sum, lse) && (symmetric_ || finish_sums(col_sum, lse_cols));
  }

  // `part`: scratch memory for the sums of a tile's columns.
  void sum_tile(const Tile& t, T* s, T shift, T* part, T* row_sum, T* col_sum) {
    logits(t, s, symmetric_);
    std::fill(part, part + ld(), T(0));
    tile_kernels<Mode>().row.sum_exp(s, ld(), t.rows, t.padded_cols(), shift, row_sum + t.row,
                                     col_sum ? part : nullptr);
    if (col_sum)
      for (int j = 0; j < t.cols; ++j) col_sum[t.col + j] += part[j];
  }

  // Any range of logits: a running maximum for each row.
  void online(at::Tensor& lse) {
    double* out = lse.mutable_data_ptr<double>();
    Scratch<T> scratch(2 * row_block_ + tile_elements());
    run_tasks(row_blocks(), flops(1) * col_blocks(), [&](int64_t a) {
      T *max = scratch.get(), *sum = max + row_block_;
      std::fill(max, max + row_block_, -std::numeric_limits<T>::infinity());
      std::fill(sum, sum + row_block_, T(0));
      for (int64_t b = 0; b < col_blocks(); ++b) {
        const Tile t = tile(a, b);
        T* s = place(a, b, sum + row_block_);
        logits(t, s, false);
        tile_kernels<Mode>().row.online(s, ld(), t.rows, t.padded_cols(), false, max, sum, nullptr);
      }
      const Tile t = tile(a, 0);
      for (int i = 0; i < t.rows; ++i) out[t.row + i] = log_of_sum(max[i], sum[i]);
    });
  }

  bool has_positives() const { return problem_.label_positives || index_.defined() || mask_.defined(); }

  void start_positives() {
    if (has_positives()) positive_sum_.assign(round_up(n(), kTileAlign), 0);
  }

  // Base-2 logits of a tile's positives onto the sums of its rows, and of its columns where the tile stands
  // for its mirror image too.
  void add_positives(const Tile& t, T* s, bool mirror) {
    double* sum = positive_sum_.data();
    if (index_.defined()) {
      for_index(t, mirror, [&](int64_t row, int64_t at) { sum[row] = s[at]; });
      return;
    }
    fill_excluded(t, s, T(0));
    if (problem_.label_positives) {
      tile_kernels<Mode>().row.sum_equal(s, ld(), t.rows, t.padded_cols(), ids_->rows.data() + t.row,
                                         ids_->cols.data() + t.col, sum + t.row,
                                         mirror && t.row != t.col ? sum + t.col : nullptr);
      return;
    }
    for_mask(t, [&](int i, int64_t at, const T* weights, int run) {
      sum[t.row + i] += tile_kernels<Mode>().row.weighted_sum(weights, s + at, run);
    });
  }

  void count_positives(double* count) const {
    if (index_.defined()) {
      for (int64_t i = 0; i < n(); ++i) count[i] = index_.const_data_ptr<int64_t>()[i] >= 0;
      return;
    }
    const int64_t period = mask_.defined() ? mask_.size(1) : 0;
    std::vector<double> total;  // of each row of the mask, or of each class
    if (mask_.defined()) {
      // Column c of the mask stands for every key j with j % period == c.
      std::vector<double> repeats(period);
      for (int64_t j = 0; j < m(); ++j) ++repeats[j % period];
      total.assign(mask_.size(0), 0);
      for_rows(mask_.size(0), period, [&](int64_t row) {
        const T* weights = mask_.const_data_ptr<T>() + row * period;
        for (int64_t c = 0; c < period; ++c) total[row] += weights[c] * repeats[c];
      });
    } else {
      total.assign(ids_->classes, 0);
      for (int64_t j = 0; j < m(); ++j) ++total[ids_->cols[j]];
    }
    for (int64_t i = 0; i < n(); ++i) {
      const int64_t group = mask_.defined() ? i % mask_.size(0) : ids_->rows[i];
      count[i] = total[group];
      const int64_t j = i + problem_.exclude.value_or(m());
      if (j < 0 || j >= m()) continue;
      count[i] -= mask_.defined()
                      ? static_cast<double>(mask_.const_data_ptr<T>()[group * period + j % period])
                      : ids_->cols[j] == ids_->rows[i];
    }
  }

  // f(i, place in the tile) for every row i whose positive by index lies in the tile, or in its mirror image
  // where the tile stands for that too.
  template <typename F>
  void for_index(const Tile& t, bool mirror, F f) const {
    const int64_t* index = index_.const_data_ptr<int64_t>();
    for (int i = 0; i < t.rows; ++i) {
      const int64_t j = index[t.row + i] - t.col;
      if (index[t.row + i] >= 0 && j >= 0 && j < t.cols) f(t.row + i, i * ld() + j);
    }
    if (!mirror) return;
    for (int j = 0; j < t.cols; ++j) {
      const int64_t i = index[t.col + j] - t.row;
      if (index[t.col + j] >= 0 && i >= 0 && i < t.rows) f(t.col + j, i * ld() + j);
    }
  }

  // The softmax of each row (or column) as coef_i 2^(s - shift_i); rows without any column get coefficient 0.
  // A log-sum-exp L is rounded to the shift, and what rounding leaves goes into the coefficient.
  struct SoftmaxTerms {
    std::vector<T> coef, shift;
    std::vector<double> lse;  // L in base 2, -inf for an empty row

    void set(const std::optional<at::Tensor>& grad, const at::Tensor& lse_in) {
      lse.assign(round_up(lse_in.numel(), kTileAlign), -std::numeric_limits<double>::infinity());
      coef.assign(lse.size(), T(0));
      shift.assign(lse.size(), T(0));
      if (grad) copy_rows(*grad, coef.data());
      copy_rows(lse_in, lse.data());
      for (double& value : lse) value *= kLog2e;
    }

    // coef_i 2^(s - to(i)) for the same softmax.
    template <typename To>
    void move(To to) {
      for (size_t i = 0; i < lse.size(); ++i) {
        const bool empty = lse[i] == -std::numeric_limits<double>::infinity();
        shift[i] = empty ? T(0) : to(i);
        coef[i] = empty || coef[i] == 0 ? T(0) : static_cast<T>(coef[i] * std::exp2(shift[i] - lse[i]));
      }
    }
  };

  void set_rows(const std::optional<at::Tensor>& grad_lse, const std::optional<at::Tensor>& grad_positive,
                const at::Tensor& lse) {
    rows_.set(grad_lse, lse);
    weight_.assign(round_up(n(), kTileAlign), T(0));
    if (grad_positive) copy_rows(*grad_positive, weight_.data());
    choose_softmax();
  }

  // One exponential can serve a row and a column where their log-sum-exps are close: then what is lost to
  // underflow relative to the largest of them is below 2^-60 of any row.
  void choose_softmax() {
    if (symmetric_) cols_ = rows_;
    double low = std::numeric_limits<double>::infinity(), high = -low;
    for (const SoftmaxTerms* terms : {&rows_, &cols_})
      for (double value : terms->lse) {
        if (value == -std::numeric_limits<double>::infinity()) continue;
        low = std::min(low, value);
        high = std::max(high, value);
      }
    constexpr double kClose = sizeof(T) == 8 ? 400 : 60;
    const bool both = symmetric_ || problem_.both_axes;
    if (both && !bias_.defined() && low <= high && high - low <= kClose) {
      softmax_ = Softmax::kBothCommon;
      shift_ = static_cast<T>(high);
      for (SoftmaxTerms* terms : {&rows_, &cols_}) terms->move([&](size_t) { return shift_; });
    } else {
      softmax_ = both ? Softmax::kBothSeparate : Softmax::kRows;
      for (SoftmaxTerms* terms : {&rows_, &cols_})
        terms->move([&](size_t i) { return static_cast<T>(terms->lse[i]); });
    }
  }

  // The tile of G: of G + Gᵀ in the symmetric case.
  void gradient_tile(int64_t a, int64_t b, T* s) {
    const Tile t = tile(a, b);
    if (!kept_.defined()) logits(t, s, symmetric_);
    GradientTile<T, Id> g{};
    g.logits = place(a, b, s);
    g.out = s;
    g.ld = ld();
    g.rows = t.rows;
    g.cols = t.padded_cols();
    g.softmax = softmax_;
    g.shift = shift_;
    g.row_coef = rows_.coef.data() + t.row;
    g.row_shift = rows_.shift.data() + t.row;
    if (softmax_ != Softmax::kRows) {
      g.col_coef = cols_.coef.data() + t.col;
      g.col_shift = cols_.shift.data() + t.col;
    }
    g.row_weight = weight_.data() + t.row;
    if (problem_.label_positives) {
      g.row_ids = ids_->rows.data() + t.row;
      g.col_ids = ids_->cols.data() + t.col;
      if (symmetric_) g.col_weight = weight_.data() + t.col;
    }
    tile_kernels<Mode>().row.gradient(g);
    if (mask_.defined()) add_mask(t, s);
    fill_excluded(t, s, T(0));
    if (index_.defined()) for_index(t, symmetric_, [&](int64_t row, int64_t at) { s[at] += weight_[row]; });
  }

  void add_mask(const Tile& t, T* s) const {
    for_mask(t, [&](int i, int64_t at, const T* weights, int run) {
      const T weight = weight_[t.row + i];
      for (int j = 0; weight != 0 && j < run; ++j) s[at + j] += weight * weights[j];
    });
  }

  void triangle_gradient(at::Tensor& grad) {
    q_.make_rows();
    q_.make_col_panels();
    q_.make_row_panels();
    T* out = grad.mutable_data_ptr<T>();
    Scratch<T> scratch(tile_elements() * GradientProduct<Mode>::kTiles);
    visit_triangle(row_blocks(), flops(3), [&](int64_t a, int64_t b) {
      const Tile t = tile(a, b);
      T* s = scratch.get();
      gradient_tile(a, b, s);
      const GradientProduct<Mode> g(s, ld(), s + tile_elements(), t.rows, t.cols);
      g.add_rows(q_, t.col, out + t.row * q_.padded_d());
      if (a != b) g.add_cols(q_, t.row, out + t.col * q_.padded_d());
    });
  }

  void rectangle_gradient(bool need_q, bool need_k, bool need_bias, at::Tensor& grad_q, at::Tensor& grad_k,
                          at::Tensor& grad_bias) {
    q_.make_rows();
    key().make_col_panels();
    if (need_q) key().make_row_panels();
    if (need_k) q_.make_row_panels();
    if (kept_.defined() && need_q && need_k) return kept_gradient(grad_q, grad_k);
    Scratch<T> scratch(tile_elements() * GradientProduct<Mode>::kTiles);
    auto visit = [&](int64_t a, int64_t b) {
      const Tile t = tile(a, b);
      T* s = scratch.get();
      gradient_tile(a, b, s);
      if (need_bias) {
        T* out = grad_bias.mutable_data_ptr<T>() + t.col;
        for (int i = 0; i < t.rows; ++i)
          for (int j = 0; j < t.cols; ++j) out[j] += s[i * ld() + j];
      }
      const GradientProduct<Mode> g(s, ld(), s + tile_elements(), t.rows, t.cols);
      if (need_q) g.add_rows(key(), t.col, grad_q.mutable_data_ptr<T>() + t.row * q_.padded_d());
      if (need_k) g.add_cols(q_, t.row, grad_k.mutable_data_ptr<T>() + t.col * q_.padded_d());
    };
    if (need_k || need_bias) {
      visit_rectangle(row_blocks(), col_blocks(), flops(3), visit);
    } else {
      run_tasks(row_blocks(), flops(2) * col_blocks(), [&](int64_t a) {
        for (int64_t b = 0; b < col_blocks(); ++b) visit(a, b);
      });
    }
  }

  // Both products of a G that takes the place of the logits kept: first by rows, then by columns, so that
  // each thread adds to one block of the result, which stays in its cache.
  void kept_gradient(at::Tensor& grad_q, at::Tensor& grad_k) {
    Scratch<T> rounded(tile_elements());
    auto product = [&](int64_t a, int64_t b) {
      const Tile t = tile(a, b);
      return GradientProduct<Mode>(place(a, b, nullptr), ld(), rounded.get(), t.rows, t.cols);
    };
    run_tasks(row_blocks(), flops(1) * col_blocks(), [&](int64_t a) {
      T* out = grad_q.mutable_data_ptr<T>() + a * row_block_ * q_.padded_d();
      for (int64_t b = 0; b < col_blocks(); ++b) {
        gradient_tile(a, b, place(a, b, nullptr));
        product(a, b).add_rows(key(), b * col_block_, out);
      }
    });
    run_tasks(col_blocks(), flops(1) * row_blocks(), [&](int64_t b) {
      T* out = grad_k.mutable_data_ptr<T>() + b * col_block_ * q_.padded_d();
      for (int64_t a = 0; a < row_blocks(); ++a) product(a, b).add_cols(q_, a * row_block_, out);
    });
  }

  // scale * (the first d columns), in the type of the input that it is the gradient of.
  at::Tensor finish(const at::Tensor& grad) const {
    return finish_gradient(grad, q_.d(), scale_, gradient_type_);
  }

  Contrast problem_;
  double scale_;
  Among among_;
  at::ScalarType gradient_type_;
  Operand<Mode> q_;
  std::optional<Operand<Mode>> k_;
  std::optional<LabelIds<Id>> ids_;
  at::Tensor bias_, index_, mask_;
  bool symmetric_;
  int64_t row_block_, col_block_;
  at::Tensor kept_;                   // tiles of logits, between the two passes of a loss
  std::vector<double> positive_sum_;  // of the forward: base-2 logits over each row's positives
  // Of the gradient.
  SoftmaxTerms rows_, cols_;
  std::vector<T> weight_;  // of a row's positives
  Softmax softmax_ = Softmax::kRows;
  T shift_ = 0;
};

void check(const Contrast& problem) {
  const at::Tensor& q = problem.q;
  const std::optional<at::Tensor>& k = problem.k;
  TORCH_CHECK_VALUE(q.dim() == 2 && q.size(1) > 0, "q must be [N, D] with features, got ", q.sizes());
  if (k) {
    TORCH_CHECK_VALUE(k->dim() == 2 && k->size(1) == q.size(1), "k must be [M, ", q.size(1), "], got ",
                      k->sizes());
    TORCH_CHECK_TYPE(k->scalar_type() == q.scalar_type(), "k must be of q's type ", q.scalar_type(), ", got ",
                     k->scalar_type());
  }
  const int64_t n = q.size(0), m = k ? k->size(0) : n;
  auto vector = [](const char* name, const std::optional<at::Tensor>& x, int64_t size) {
    TORCH_CHECK_VALUE(!x || (x->dim() == 1 && x->size(0) == size), name, " must be [", size, "], got ",
                      x->sizes());
  };
  vector("row_labels", problem.row_labels, n);
  vector("col_labels", problem.col_labels, m);
  vector("positive_index", problem.positive_index, n);
  vector("key_bias", problem.key_bias, m);
  const bool by_label = problem.label_positives || (problem.among != "all" && !problem.positive_mask);
  TORCH_CHECK_VALUE(
      problem.row_labels.has_value() == problem.col_labels.has_value() && (problem.row_labels || !by_label),
      "row_labels and col_labels must be given together, and where labels decide which pairs count");
  TORCH_CHECK_VALUE(problem.row_labels || problem.among == "all" || !problem.both_axes,
                    "denominators by positive_mask are those of rows, both_axes is for the others");
  TORCH_CHECK_VALUE(
      !problem.positive_mask || (problem.positive_mask->dim() == 2 && problem.positive_mask->numel() > 0),
      "positive_mask must be [R, C] and not empty");
  TORCH_CHECK_VALUE(problem.label_positives + problem.positive_index.has_value() +
                            problem.positive_mask.has_value() + problem.key_bias.has_value() <=
                        1,
                    "at most one of label_positives, positive_index, positive_mask and key_bias");
  if (problem.positive_index) check_index("positive_index", *problem.positive_index, m);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_loss(const Contrast& problem,
                                                                            bool unit,
                                                                            const LossOptions& options) {
  check(problem);
  TORCH_CHECK_VALUE(!problem.key_bias, "key_bias is not for a whole loss");
  TORCH_CHECK_TYPE(at::isFloatingType(problem.q.scalar_type()), "q must be floating, got ",
                   problem.q.scalar_type());
  if (unit) {
    TORCH_CHECK_VALUE(!problem.k, "unit is for queries that are the keys");
    return with_mode(problem.q.scalar_type(), [&](auto mode) {
      using T = typename decltype(mode)::Sum;
      const UnitRows<T> rows(problem.q);
      Contrast of_unit = problem;
      of_unit.q = rows.unit.to(problem.q.scalar_type());
      auto found = Engine<decltype(mode)>(of_unit).loss(options);
      if (options.needs[0]) rows.through(std::get<1>(found));
      return found;
    });
  }
  TORCH_CHECK_VALUE(!problem.both_axes || !problem.k || problem.k->size(0) == problem.q.size(0),
                    "a loss over both axes has as many columns as rows");
  return with_mode(problem.q.scalar_type(),
                   [&](auto mode) { return Engine<decltype(mode)>(problem).loss(options); });
}

}  // namespace cpu

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_forward(
    const Contrast& problem, bool save_gradient) {
  cpu::check(problem);
  TORCH_CHECK_VALUE(!save_gradient || (problem.k && !problem.both_axes && !problem.label_positives &&
                                       !problem.positive_mask),
                    "save_gradient is for one axis, keys of their own and positives by index or none");
  return cpu::with_mode(problem.q.scalar_type(), [&](auto mode) {
    cpu::Engine<decltype(mode)> engine(problem);
    auto sums = engine.log_sum_exp();
    auto positives = engine.positives();
    at::Tensor residual =
        save_gradient ? engine.residual(std::get<0>(sums))
                      : at::empty({0}, std::get<0>(sums).options().dtype(cpu::sum_type<decltype(mode)>()));
    return std::tuple_cat(sums, positives, std::make_tuple(residual));
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_backward(
    const ContrastIncoming& incoming, const Contrast& problem, const ContrastSaved& saved,
    std::array<bool, 4> needs) {
  const bool of_queries = saved.residual.dim() == 2 && !needs[1] && !needs[3];
  cpu::check(problem);
  return cpu::with_mode(problem.q.scalar_type(), [&](auto mode) {
    cpu::Engine<decltype(mode)> engine(problem);
    if (of_queries) return engine.gradient_from_residual(saved.residual, incoming, needs[0], needs[2]);
    return engine.gradient(incoming, saved, needs);
  });
}

}  // namespace cl_kernels
