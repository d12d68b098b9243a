#include "../similarity.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "operand.h"
#include "rows.h"
#include "schedule.h"

namespace cl_kernels {
namespace cpu {
namespace {

// 1 / ||row||, 0 for a zero row.
template <typename Mode>
at::Tensor reciprocal_norms(const at::Tensor& x) {
  const at::Tensor norm = at::linalg_vector_norm(x, 2, at::IntArrayRef{1}, false, sum_type<Mode>());
  return at::where(norm == 0, norm, norm.reciprocal());
}

template <typename Mode>
at::Tensor unit_rows(const at::Tensor& x, const at::Tensor& rnorm) {
  return x.to(sum_type<Mode>()) * rnorm.unsqueeze(1);
}

// factor * q kᵀ, a block of rows a task, through a tile in scratch memory.
template <typename Mode>
at::Tensor products(Operand<Mode>& q, Operand<Mode>& k, double factor, at::ScalarType type) {
  using T = typename Mode::Sum;
  q.make_rows();
  k.make_col_panels();
  at::Tensor out = at::empty({q.n(), k.n()}, q.tensor().options().dtype(type));
  const auto& product = tile_kernels<Mode>().product;
  const int64_t rows_at_a_time = rectangle_block(q.n()), cols_at_a_time = rectangle_block(k.n());
  Scratch<T> scratch(rows_at_a_time * cols_at_a_time);
  run_tasks(ceil_div(q.n(), rows_at_a_time), 2 * rows_at_a_time * k.n() * q.d(), [&](int64_t a) {
    T* s = scratch.get();
    const int64_t row = a * rows_at_a_time, rows = std::min(rows_at_a_time, q.n() - row);
    for (int64_t col = 0; col < k.n(); col += cols_at_a_time) {
      const int64_t cols = std::min(cols_at_a_time, k.n() - col);
      product.dot(q.row(row), q.depth(), static_cast<int>(rows), k.col_panels(col), q.depth(),
                  static_cast<int>(ceil_div(cols, product.panel_width)), static_cast<T>(factor), s,
                  cols_at_a_time);
      auto copy_out = [&](auto element) {
        using Element = decltype(element);
        Element* to = out.mutable_data_ptr<Element>() + row * k.n() + col;
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < cols; ++j)
            to[i * k.n() + j] = static_cast<Element>(s[i * cols_at_a_time + j]);
      };
      if (type == at::kHalf)
        copy_out(at::Half{});
      else if (type == at::kBFloat16)
        copy_out(at::BFloat16{});
      else
        copy_out(T{});
    }
  });
  return out;
}

// g x (or gᵀ x), g [N, M] row-major: a block of rows of the result a task.
template <typename Mode>
at::Tensor times_features(const at::Tensor& g, bool transposed, Operand<Mode>& x) {
  using T = typename Mode::Sum;
  x.make_row_panels();
  const int64_t n = g.size(transposed ? 1 : 0), depth = x.n(), ld = g.size(1);
  at::Tensor out = at::zeros({n, x.padded_d()}, g.options());
  const int64_t rows_at_a_time = rectangle_block(n);
  run_tasks(ceil_div(n, rows_at_a_time), 2 * rows_at_a_time * depth * x.d(), [&](int64_t a) {
    const int64_t row = a * rows_at_a_time;
    tile_kernels<Mode>().product.accumulate(g.const_data_ptr<T>() + (transposed ? row : row * ld), ld,
                                            transposed, static_cast<int>(std::min(rows_at_a_time, n - row)),
                                            static_cast<int>(depth), x.row_panels(0),
                                            out.mutable_data_ptr<T>() + row * x.padded_d(), x.padded_d());
  });
  return out.narrow(1, 0, x.d());
}

// Through x / ||x||: the part of g along the unit row falls out.
at::Tensor through_norm(const at::Tensor& g, const at::Tensor& unit, const at::Tensor& rnorm) {
  return (g - unit * (unit * g).sum(1, true)) * rnorm.unsqueeze(1);
}

void check(const at::Tensor& q, const std::optional<at::Tensor>& k) {
  TORCH_CHECK_VALUE(q.dim() == 2 && q.size(1) > 0, "q must be [N, D] with features, got ", q.sizes());
  if (!k) return;
  TORCH_CHECK_VALUE(k->dim() == 2 && k->size(1) == q.size(1), "k must be [M, ", q.size(1), "], got ",
                    k->sizes());
  TORCH_CHECK_TYPE(k->scalar_type() == q.scalar_type(), "k must be of q's type ", q.scalar_type(), ", got ",
                   k->scalar_type());
}

}  // namespace
}  // namespace cpu

std::tuple<at::Tensor, at::Tensor, at::Tensor> similarity_forward(const at::Tensor& q,
                                                                  const std::optional<at::Tensor>& k,
                                                                  const at::Tensor& scale, bool normalize) {
  cpu::check(q, k);
  const double factor = scale.item<double>();
  auto run = [&](auto mode) -> std::tuple<at::Tensor, at::Tensor, at::Tensor> {
    using Mode = decltype(mode);
    const at::TensorOptions options = q.options().dtype(cpu::sum_type<Mode>());
    at::Tensor q_rnorm = normalize ? cpu::reciprocal_norms<Mode>(q) : at::empty({0}, options);
    at::Tensor k_rnorm = normalize && k ? cpu::reciprocal_norms<Mode>(*k) : at::empty({0}, options);
    cpu::Operand<Mode> left(normalize ? cpu::unit_rows<Mode>(q, q_rnorm) : q);
    if (!k) return {cpu::products(left, left, factor, q.scalar_type()), q_rnorm, k_rnorm};
    cpu::Operand<Mode> right(normalize ? cpu::unit_rows<Mode>(*k, k_rnorm) : *k);
    return {cpu::products(left, right, factor, q.scalar_type()), q_rnorm, k_rnorm};
  };
  // Rows normalised here stay in float: rounded to bfloat16 once more they would lose what the input has.
  return normalize && q.scalar_type() == at::kBFloat16 ? run(cpu::Float32{})
                                                       : cpu::with_mode(q.scalar_type(), run);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> similarity_backward(
    const at::Tensor& grad, const at::Tensor& q, const std::optional<at::Tensor>& k, const at::Tensor& scale,
    bool normalize, const at::Tensor& q_rnorm, const at::Tensor& k_rnorm, std::array<bool, 2> needs) {
  cpu::check(q, k);
  TORCH_CHECK_VALUE(
      grad.dim() == 2 && grad.size(0) == q.size(0) && grad.size(1) == (k ? k->size(0) : q.size(0)),
      "grad must be [N, M], got ", grad.sizes());
  const double factor = scale.item<double>();
  auto run = [&](auto mode) -> std::tuple<at::Tensor, at::Tensor, at::Tensor> {
    using Mode = decltype(mode);
    using T = typename Mode::Sum;
    const at::Tensor g = grad.to(cpu::sum_type<Mode>()).contiguous();
    const at::Tensor left = normalize ? cpu::unit_rows<Mode>(q, q_rnorm) : q.to(cpu::sum_type<Mode>());
    const at::Tensor right = !k          ? left
                             : normalize ? cpu::unit_rows<Mode>(*k, k_rnorm)
                                         : k->to(cpu::sum_type<Mode>());
    cpu::Operand<Mode> left_operand(left), right_operand(right);
    at::Tensor grad_left = cpu::times_features(g, false, right_operand);
    const at::Tensor grad_scale = cpu::contraction<T>(left.contiguous(), grad_left.contiguous());
    at::Tensor grad_right;
    if (k ? needs[1] : needs[0]) grad_right = cpu::times_features(g, true, left_operand);
    if (!k && needs[0]) grad_left = grad_left + grad_right;
    auto finish = [&](const at::Tensor& grad_unit, const at::Tensor& unit, const at::Tensor& rnorm) {
      const at::Tensor full = normalize ? cpu::through_norm(grad_unit, unit, rnorm) : grad_unit;
      return (full * factor).to(q.scalar_type()).contiguous();
    };
    const at::Tensor none = at::empty({0}, g.options());
    return {needs[0] ? finish(grad_left, left, q_rnorm) : none,
            k && needs[1] ? finish(grad_right, right, k_rnorm) : at::empty({0}, g.options()), grad_scale};
  };
  return q.scalar_type() == at::kDouble ? run(cpu::Float64{}) : run(cpu::Float32{});
}

}  // namespace cl_kernels
