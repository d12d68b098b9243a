#include "../dimcl.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "../contrastive.h"
#include "loss.h"

namespace cl_kernels {
namespace {

at::ScalarType sum_type(const at::Tensor& z) {
  return z.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The two views' standardised columns as the rows of one matrix, [2D, N].
at::Tensor standardised(const at::Tensor& z0, const at::Tensor& z1, const at::Tensor& mean,
                        const at::Tensor& rnorm) {
  const at::Tensor z = at::stack({z0, z1}).to(mean.scalar_type());
  return (z - mean.unsqueeze(1))
      .mul_(rnorm.unsqueeze(1))
      .transpose(1, 2)
      .reshape({2 * z0.size(1), z0.size(0)});
}

// Each column of a view is the positive of the same column of the other, and of what the mask adds.
Contrast column_problem(const at::Tensor& x, const at::Tensor& scale,
                        const std::optional<at::Tensor>& positive_mask) {
  Contrast problem{x, std::nullopt, scale, 0};
  const at::Tensor index = at::arange(x.size(0), x.options().dtype(at::kLong)).roll(x.size(0) / 2);
  if (positive_mask)
    problem.positive_mask =
        positive_mask->scatter(1, index.unsqueeze(1), true).fill_diagonal_(false).to(x.scalar_type());
  else
    problem.positive_index = index;
  return problem;
}

void check(const at::Tensor& z0, const at::Tensor& z1, const std::optional<at::Tensor>& positive_mask) {
  TORCH_CHECK_VALUE(z0.dim() == 2 && z0.numel() > 0, "z0 must be [N, D] and not empty, got ", z0.sizes());
  TORCH_CHECK_VALUE(z1.sizes() == z0.sizes(), "z1 must be ", z0.sizes(), " as z0, got ", z1.sizes());
  TORCH_CHECK_TYPE(z1.scalar_type() == z0.scalar_type(), "z1 must be of z0's type ", z0.scalar_type(),
                   ", got ", z1.scalar_type());
  const int64_t columns = 2 * z0.size(1);
  if (!positive_mask) return;
  TORCH_CHECK_VALUE(positive_mask->sizes() == at::IntArrayRef({columns, columns}), "positive_mask must be [",
                    columns, ", ", columns, "], got ", positive_mask->sizes());
  TORCH_CHECK_TYPE(positive_mask->scalar_type() == at::kBool, "positive_mask must be bool");
}

// Mean and reciprocal length of the columns of both views, [2, D]; 0 in place of the latter for a constant.
std::pair<at::Tensor, at::Tensor> moments(const at::Tensor& z0, const at::Tensor& z1) {
  const at::ScalarType type = sum_type(z0);
  const at::Tensor wide = at::stack({z0, z1}).to(at::kDouble);
  const at::Tensor mean = wide.mean(1);
  const at::Tensor norm = at::linalg_vector_norm(wide - mean.unsqueeze(1), 2, at::IntArrayRef{1});
  // What rounding alone leaves of a constant column.
  const double epsilon =
      type == at::kDouble ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
  const at::Tensor residue = mean.abs() * (4 * epsilon * std::sqrt(static_cast<double>(z0.size(0))));
  const at::Tensor rnorm = at::where(norm > residue, norm.reciprocal(), at::zeros_like(norm)).to(type);
  return {mean.to(type), rnorm};
}

// From the gradient of x, which it changes, to those of the views, [2, N, D] of any strides: through
// x = (z - mean) / ||z - mean||. The mean goes last, or a nearly constant column would bring it back.
at::Tensor through_moments(at::Tensor grad, const at::Tensor& x, const at::Tensor& rnorm) {
  const int64_t d = rnorm.size(1);
  grad -= x * (x * grad).sum(1, true);
  grad -= grad.mean(1, true);
  grad *= rnorm.reshape({2 * d, 1});
  return grad.reshape({2, d, x.size(1)}).transpose(1, 2);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dimcl_forward(
    const at::Tensor& z0, const at::Tensor& z1, const at::Tensor& scale,
    const std::optional<at::Tensor>& positive_mask) {
  check(z0, z1, positive_mask);
  const auto [mean, rnorm] = moments(z0, z1);
  const at::Tensor x = standardised(z0, z1, mean, rnorm);
  auto [lse, unused, sum, count, unused_residual] =
      contrastive_forward(column_problem(x, scale, positive_mask), false);
  return {lse, sum, count, mean, rnorm};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dimcl_backward(
    const std::optional<at::Tensor>& grad_lse, const std::optional<at::Tensor>& grad_positive_sum,
    const at::Tensor& z0, const at::Tensor& z1, const at::Tensor& scale,
    const std::optional<at::Tensor>& positive_mask, const at::Tensor& lse, const at::Tensor& mean,
    const at::Tensor& rnorm, bool needs_scale) {
  check(z0, z1, positive_mask);
  const at::Tensor x = standardised(z0, z1, mean, rnorm);
  const at::Tensor nothing = at::empty({0}, lse.options());
  auto [grad, unused_k, grad_scale, unused_bias] = contrastive_backward(
      {grad_lse, std::nullopt, grad_positive_sum}, column_problem(x, scale, positive_mask),
      {lse, nothing, nothing}, {true, false, needs_scale, false});
  const at::Tensor out = through_moments(grad, x, rnorm).to(z0.scalar_type());
  return {out[0].clone(at::MemoryFormat::Contiguous), out[1].clone(at::MemoryFormat::Contiguous), grad_scale};
}

namespace cpu {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> dimcl_loss(
    const at::Tensor& z0, const at::Tensor& z1, const at::Tensor& scale,
    const std::optional<at::Tensor>& positive_mask, const LossOptions& options) {
  check(z0, z1, positive_mask);
  const auto [mean, rnorm] = moments(z0, z1);
  const at::Tensor x = standardised(z0, z1, mean, rnorm);
  const auto [need_z0, need_z1, need_scale] = options.needs;
  LossOptions of_columns = options;
  of_columns.needs = {need_z0 || need_z1, false, need_scale};
  auto [loss, grad, none, grad_scale] =
      contrastive_loss(column_problem(x, scale, positive_mask), false, of_columns);
  if (!need_z0 && !need_z1) return {loss, grad, none, grad_scale};
  const at::Tensor out = through_moments(grad, x, rnorm);
  auto of_view = [&](int64_t view, bool needed) {
    return needed ? out[view].clone(at::MemoryFormat::Contiguous) : at::empty({0}, grad.options());
  };
  return {loss, of_view(0, need_z0), of_view(1, need_z1), grad_scale};
}

}  // namespace cpu
}  // namespace cl_kernels
