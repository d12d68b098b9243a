// Losses over keys that get no gradient, as queues and momentum encoders have them: InfoNCE and SCE.
//
// Tiles stand on their side, [keys, queries]: a product reads keys as they lie, row by row, and the softmax
// of a query runs down a column, over whole vectors of queries. Nothing as large as the keys is made: those
// that are not rows of the dtype of products, of a width of whole panels, are packed a tile at a time. The
// first pass over the keys leaves the log-sum-exps and keeps the logits of as many queries as fit the budget;
// the second makes one gradient of both softmaxes and multiplies it once.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <deque>

#include "budget.h"
#include "loss.h"
#include "operand.h"
#include "rows.h"
#include "schedule.h"

namespace cl_kernels::cpu {
namespace {

constexpr int64_t kKeys = 128;         // of a tile
constexpr int64_t kMostQueries = 128;  // of a tile
constexpr int64_t kParts = 32;         // tasks of a pass, whatever the number of threads

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double softplus(double x) {
  return (x > 0 ? x : 0) + std::log1p(std::exp(-std::abs(x)));
}

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

// One softmax of a block of queries: in parts of the keys, then whole. Base 2.
template <typename T>
struct Columns {
  std::vector<T> max, coef, shift;      // [parts, queries]; [queries]
  std::vector<double> sum, cross, lse;  // [parts, queries], [parts, queries]; [queries]

  void start(int64_t parts, int64_t queries) {
    max.assign(parts * queries, -std::numeric_limits<T>::infinity());
    sum.assign(parts * queries, 0);
    cross.assign(parts * queries, 0);
    coef.assign(queries, T(0));
    shift.assign(queries, T(0));
    lse.assign(queries, -kInfinity);
  }

  // The log-sum-exp of query j over all parts; returns the mean that `cross` holds.
  double join(int64_t parts, int64_t queries, int64_t j) {
    T top = -std::numeric_limits<T>::infinity();
    for (int64_t p = 0; p < parts; ++p) top = std::max(top, max[p * queries + j]);
    double total = 0, weighted = 0;
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t at = p * queries + j;
      const double by = max[at] == top ? 1 : std::exp2(static_cast<double>(max[at]) - top);
      total += sum[at] * by;
      weighted += cross[at] * by;
    }
    lse[j] = total == 0 ? -kInfinity : std::log2(total) + top;
    return total == 0 ? 0 : weighted / total;
  }

  // weight times the softmax of query j as coef 2^(x - shift): the log-sum-exp rounded, and what rounding
  // leaves in the coefficient.
  void set(int64_t j, double weight) {
    if (lse[j] == -kInfinity) return;
    shift[j] = static_cast<T>(lse[j]);
    coef[j] = static_cast<T>(weight * std::exp2(shift[j] - lse[j]));
  }
};

template <typename Mode>
class KeyLossEngine {
 public:
  using T = typename Mode::Sum;

  KeyLossEngine(const KeyLoss& problem, double factor, bool gradient)
      : problem_(problem),
        scale_(problem.scale.item<double>()),
        coeff_(problem.target_q ? problem.coeff->item<double>() : 1),
        factor_(factor),
        gradient_(gradient),
        q_(problem.q) {
    q_.make_col_panels();
    if (problem.target_q) {
      target_q_.emplace(*problem.target_q);
      target_q_->make_col_panels();
      target_scale_ = problem.target_scale->item<double>();
    }
    if (problem.positive) positive_ = problem.positive->contiguous();
    if (problem.own) own_ = problem.own->to(sum_type<Mode>()).contiguous();
    int64_t first = 0;
    for (const at::Tensor& part : problem.k) {
      const int64_t keys = part.size(0);
      Operand<Mode>* as_they_lie = nullptr;
      if (part.scalar_type() == element_type<Mode>() && part.is_contiguous() && q_.rows_are_panels()) {
        as_they_lie = &segments_.emplace_back(part);
        as_they_lie->make_rows();
      }
      for (int64_t row = 0; row < keys; row += kKeys)
        tiles_.push_back(
            {part, as_they_lie, row, first + row, static_cast<int>(std::min(kKeys, keys - row))});
      first += keys;
    }
    parts_ = std::min<int64_t>(kParts, tiles_.size());
    set_block();
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor> run(std::array<bool, 2> needs) {
    const at::TensorOptions options = q_.tensor().options().dtype(sum_type<Mode>());
    const at::Tensor none = at::empty({0}, options);
    at::Tensor grad = gradient_ ? at::empty({n(), q_.d()}, options) : none;
    double loss = 0;
    for (int64_t first = 0; first < n(); first += block_) loss += block(first, grad);
    const at::Tensor value = at::scalar_tensor(loss * factor_, options);
    if (!gradient_) return {value, none, at::empty({0}, options)};
    const at::Tensor grad_scale = contraction<T>(sum_rows(q_), grad);
    return {value, needs[0] ? finish_gradient(grad, q_.d(), scale_, sum_type<Mode>()) : none, grad_scale};
  }

 private:
  struct Tile {
    at::Tensor part;             // the segment of its keys
    Operand<Mode>* as_they_lie;  // all of it, or null: a tile's keys are converted and packed for each pass
    int64_t row, column;         // of its first key: in the segment, in the problem
    int rows;
  };
  // A tile's keys, from `row` of an operand on.
  struct Keys {
    const Operand<Mode>& operand;
    int64_t row;
  };

  int64_t n() const { return q_.n(); }
  int64_t ld() const { return block_; }
  int64_t tile_elements() const { return kKeys * ld(); }
  int kinds() const { return target_q_ ? 2 : 1; }
  int64_t first_tile(int64_t part) const { return part * static_cast<int64_t>(tiles_.size()) / parts_; }

  // As many queries at a time as keep their logits, but for one tile, within the budget, in blocks of one
  // size.
  void set_block() {
    const int64_t counted = std::max<int64_t>(1, static_cast<int64_t>(tiles_.size()) - 1);
    const int64_t of_query = counted * kKeys * static_cast<int64_t>(sizeof(T)) * kinds();
    const int64_t fit = keep_budget() / of_query / kTileAlign * kTileAlign;
    keeps_ = gradient_ && fit >= kTileAlign;
    const int64_t most = keeps_ ? std::min(fit, kMostQueries) : kMostQueries;
    block_ = round_up(ceil_div(n(), ceil_div(n(), most)), kTileAlign);
    if (keeps_) kept_ = kept_memory<T>(static_cast<int64_t>(tiles_.size()) * kinds() * tile_elements());
  }

  int64_t flops() const { return 2 * kinds() * kKeys * block_ * q_.d() * ceil_div(tiles_.size(), parts_); }

  // f(part, tile, its keys, its logits of the student, and of the teacher or null) for every tile.
  template <typename F>
  void for_tiles(Scratch<T>& scratch, F f) {
    run_tasks(parts_, flops(), [&](int64_t part) {
      for (int64_t b = first_tile(part); b < first_tile(part + 1); ++b) {
        const Tile& tile = tiles_[b];
        T* s = keeps_ ? kept_.mutable_data_ptr<T>() + b * kinds() * tile_elements() : scratch.get();
        T* t = target_q_ ? s + tile_elements() : nullptr;
        if (tile.as_they_lie) {
          f(part, tile, Keys{*tile.as_they_lie, tile.row}, s, t);
          continue;
        }
        Operand<Mode> own(tile.part.narrow(0, tile.row, tile.rows));
        own.make_rows();
        if (gradient_) own.make_row_panels();
        f(part, tile, Keys{own, 0}, s, t);
      }
    });
  }

  void logits(const Tile& tile, const Keys& keys, const Operand<Mode>& q, int64_t first, double scale,
              T* s) const {
    const auto& product = tile_kernels<Mode>().product;
    const int panels = static_cast<int>(ceil_div(std::min(block_, n() - first), product.panel_width));
    product.dot(keys.operand.row(keys.row), q.depth(), tile.rows, q.col_panels(first), q.depth(), panels,
                static_cast<T>(scale * kLog2e), s, ld());
  }

  // f(query, place in the tile) for the queries of the block whose positive is one of the tile's keys.
  template <typename F>
  void for_positives(const Tile& tile, int64_t first, F f) const {
    if (!positive_.defined()) return;
    const int64_t* positive = positive_.const_data_ptr<int64_t>() + first;
    for (int64_t j = 0; j < std::min(block_, n() - first); ++j) {
      const int64_t i = positive[j] - tile.column;
      if (i >= 0 && i < tile.rows) f(j, i * ld() + j);
    }
  }

  void logits_of_both(const Tile& tile, const Keys& keys, int64_t first, T* s, T* t) {
    logits(tile, keys, q_, first, scale_, s);
    for_positives(tile, first, [&](int64_t j, int64_t at) { positive_sum_[j] = s[at] * kLn2; });
    if (!t) return;
    logits(tile, keys, *target_q_, first, target_scale_, t);
    const T value = problem_.positive_is_zero ? T(0) : -std::numeric_limits<T>::infinity();
    for_positives(tile, first, [&](int64_t, int64_t at) { t[at] = value; });
  }

  // The loss of the queries from `first` on, and their gradients.
  double block(int64_t first, at::Tensor& grad) {
    const int64_t queries = std::min(block_, n() - first);
    const int cols = static_cast<int>(round_up(queries, tile_kernels<Mode>().product.panel_width));
    Scratch<T> scratch((kinds() + 2) * tile_elements());
    student_.start(parts_, block_);
    if (target_q_) teacher_.start(parts_, block_);
    positive_sum_.assign(block_, 0);
    positive_coef_.assign(block_, T(0));
    for_tiles(scratch, [&](int64_t part, const Tile& tile, const Keys& keys, T* s, T* t) {
      logits_of_both(tile, keys, first, s, t);
      auto online = [&](const T* x, const T* crossed, Columns<T>& of) {
        const int64_t at = part * block_;
        tile_kernels<Mode>().row.online_columns(x, crossed, ld(), tile.rows, cols, of.max.data() + at,
                                                of.sum.data() + at, of.cross.data() + at);
      };
      online(s, nullptr, student_);
      if (t) online(t, s, teacher_);
    });
    double loss = 0;
    for (int64_t j = 0; j < queries; ++j) loss += row(first, j);
    if (!gradient_) return loss;

    const int64_t d = q_.padded_d();
    at::Tensor parts = at::zeros({parts_, block_, d}, grad.options());
    for_tiles(scratch, [&](int64_t part, const Tile& tile, const Keys& keys, T* s, T* t) {
      if (!keeps_) logits_of_both(tile, keys, first, s, t);
      T* g = scratch.get() + (keeps_ ? 0 : kinds() * tile_elements());
      tile_kernels<Mode>().row.gradient_columns({s, t, g, ld(), tile.rows, cols, student_.coef.data(),
                                                 student_.shift.data(), teacher_.coef.data(),
                                                 teacher_.shift.data()});
      for_positives(tile, first, [&](int64_t j, int64_t at) { g[at] += positive_coef_[j]; });
      GradientProduct<Mode>(g, ld(), g + tile_elements(), tile.rows, static_cast<int>(queries))
          .add_cols(keys.operand, keys.row, parts.mutable_data_ptr<T>() + part * block_ * d);
    });
    for_rows(queries, parts_ * d, [&](int64_t j) {
      T* out = grad.mutable_data_ptr<T>() + (first + j) * q_.d();
      const T* own = own_.defined() ? own_.const_data_ptr<T>() + (first + j) * q_.d() : nullptr;
      for (int64_t c = 0; c < q_.d(); ++c) out[c] = own ? positive_coef_[j] * own[c] : T(0);
      for (int64_t p = 0; p < parts_; ++p) {
        const T* part = parts.const_data_ptr<T>() + (p * block_ + j) * d;
        for (int64_t c = 0; c < q_.d(); ++c) out[c] += part[c];
      }
    });
    return loss;
  }

  // The loss of a query, and the coefficients of its gradient.
  double row(int64_t first, int64_t j) {
    student_.join(parts_, block_, j);
    double cross = target_q_ ? teacher_.join(parts_, block_, j) * kLn2 : 0;
    const double lse = student_.lse[j] * kLn2;
    double positive = positive_sum_[j], of_all = 1, of_cross = coeff_ - 1, of_positive = -coeff_;
    double above = lse - positive;  // of the log-sum-exp, the positive with it, over the positive
    if (own_.defined()) {
      positive = scale_ * own_product(first + j);
      above = softplus(lse - positive);
      of_all = sigmoid(lse - positive);
      of_positive = 1 - coeff_ - of_all;
      if (target_q_ && problem_.positive_is_zero) {
        const double keys = sigmoid(teacher_.lse[j] * kLn2);  // their share of the target
        cross = positive + keys * (cross - positive);
        of_positive += (1 - keys) * of_cross;
        of_cross *= keys;
      }
    }
    student_.set(j, of_all * factor_);
    if (target_q_) teacher_.set(j, of_cross * factor_);
    positive_coef_[j] = static_cast<T>(of_positive * factor_);
    const double loss = target_q_ ? above + (1 - coeff_) * (positive - cross) : above;
    return loss < 0 ? 0 : loss;
  }

  double own_product(int64_t i) const {
    using Element = std::conditional_t<Mode::kPack == 2, at::BFloat16, T>;
    const at::Tensor& q = q_.tensor();
    const Element* x = q.template const_data_ptr<Element>() + i * q.stride(0);
    const T* own = own_.const_data_ptr<T>() + i * q_.d();
    T part[8] = {};
    for (int64_t c = 0; c < q_.d(); ++c) part[c % 8] += static_cast<T>(x[c * q.stride(1)]) * own[c];
    return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
  }

  const KeyLoss& problem_;
  double scale_, target_scale_ = 0, coeff_, factor_;
  bool gradient_, keeps_ = false;
  Operand<Mode> q_;
  std::optional<Operand<Mode>> target_q_;
  at::Tensor positive_, own_, kept_;
  std::deque<Operand<Mode>> segments_;  // that are read as they lie
  std::vector<Tile> tiles_;
  int64_t parts_ = 0, block_ = 0;
  // Of a block of queries.
  Columns<T> student_, teacher_;
  std::vector<double> positive_sum_;
  std::vector<T> positive_coef_;
};

void check(const KeyLoss& problem) {
  const at::Tensor& q = problem.q;
  TORCH_CHECK_VALUE(q.dim() == 2 && q.numel() > 0, "q must be [N, D] and not empty, got ", q.sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(q.scalar_type()), "q must be floating, got ", q.scalar_type());
  int64_t m = 0;
  for (const at::Tensor& k : problem.k) {
    TORCH_CHECK_VALUE(k.dim() == 2 && k.size(1) == q.size(1), "a segment of k must be [M, ", q.size(1),
                      "], got ", k.sizes());
    TORCH_CHECK_TYPE(k.scalar_type() == q.scalar_type(), "k must be of q's type ", q.scalar_type(), ", got ",
                     k.scalar_type());
    m += k.size(0);
  }
  TORCH_CHECK_VALUE(m > 0, "k must hold a key");
  for (const auto& [name, x] : {std::pair{"target_q", problem.target_q}, std::pair{"own", problem.own}})
    TORCH_CHECK_VALUE(!x || (x->sizes() == q.sizes() && x->scalar_type() == q.scalar_type()), name,
                      " must be as q, ", q.sizes());
  TORCH_CHECK_VALUE(!problem.target_q || (problem.target_scale && problem.coeff),
                    "target_scale and coeff must be given with target_q");
  TORCH_CHECK_VALUE(problem.own.has_value() != problem.positive.has_value(),
                    "one of own and positive must be given");
  if (!problem.positive) return;
  TORCH_CHECK_VALUE(problem.positive->dim() == 1 && problem.positive->size(0) == q.size(0),
                    "positive must be [", q.size(0), "], got ", problem.positive->sizes());
  check_index("positive", *problem.positive, m);
  const at::Tensor index = problem.positive->contiguous();
  for (int64_t i = 0; i < index.numel(); ++i)
    TORCH_CHECK_INDEX(index.const_data_ptr<int64_t>()[i] >= 0, "each row must have a positive, row ", i,
                      " has none");
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> key_loss(const KeyLoss& problem, bool mean,
                                                        std::array<bool, 2> needs) {
  check(problem);
  const double of_row = mean ? 1.0 / problem.q.size(0) : 1.0;
  return with_mode(problem.q.scalar_type(), [&](auto mode) {
    return KeyLossEngine<decltype(mode)>(problem, of_row, needs[0] || needs[1]).run(needs);
  });
}

}  // namespace cl_kernels::cpu
