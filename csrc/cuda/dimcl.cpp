#include "../dimcl.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <limits>

#include "columns.h"
#include "engine.h"
#include "tensors.h"

namespace cl_kernels {
namespace cuda {
namespace {

void check_arguments(const at::Tensor& z0, const at::Tensor& z1,
                     const std::optional<at::Tensor>& positive_mask) {
  TORCH_CHECK_VALUE(z0.dim() == 2 && z0.numel() > 0, "z0 must be [N, D] and not empty, got ", z0.sizes());
  TORCH_CHECK_VALUE(z1.sizes() == z0.sizes(), "z1 must be ", z0.sizes(), " as z0, got ", z1.sizes());
  TORCH_CHECK_TYPE(z1.scalar_type() == z0.scalar_type(), "z1 must be of z0's type ", z0.scalar_type(),
                   ", got ", z1.scalar_type());
  const int64_t most = std::numeric_limits<int>::max() / 4;
  TORCH_CHECK_VALUE(z0.size(0) < most && z0.size(1) < most,
                    "z0 must have fewer than 2^29 rows and columns, got ", z0.sizes());
  const int64_t columns = 2 * z0.size(1);
  if (!positive_mask) return;
  TORCH_CHECK_VALUE(positive_mask->sizes() == at::IntArrayRef({columns, columns}), "positive_mask must be [",
                    columns, ", ", columns, "], got ", positive_mask->sizes());
  TORCH_CHECK_TYPE(positive_mask->scalar_type() == at::kBool, "positive_mask must be bool");
}

struct Columns {
  at::Tensor x;            // [2D, N]: the standardised columns of both views, as rows
  at::Tensor mean, rnorm;  // [2, D] float
};

Columns standardise(const at::Tensor& z0, const at::Tensor& z1) {
  const int64_t n = z0.size(0), d = z0.size(1), lanes = 16 / z0.element_size();
  const at::Tensor views[2] = {z0.stride(1) == 1 ? z0 : z0.contiguous(),
                               z1.stride(1) == 1 ? z1 : z1.contiguous()};
  at::Tensor x = at::empty({2 * d, round_up(n, lanes)}, z0.options());
  at::Tensor mean = empty_like_device(z0, {2, d}, at::kFloat), rnorm = at::empty_like(mean);
  at::Tensor parts = empty_like_device(z0, {2, column_chunks(static_cast<int>(n)), 2, d}, at::kFloat);
  StandardiseParams p{};
  for (int view = 0; view < 2; ++view) {
    p.z[view] = views[view].const_data_ptr();
    p.z_stride[view] = views[view].stride(0);
  }
  p.n = static_cast<int>(n);
  p.d = static_cast<int>(d);
  // What rounding alone leaves of a constant column.
  p.noise = 4 * std::numeric_limits<float>::epsilon() * std::sqrt(static_cast<float>(n));
  p.parts = parts.mutable_data_ptr<float>();
  p.mean = mean.mutable_data_ptr<float>();
  p.rnorm = rnorm.mutable_data_ptr<float>();
  p.x = x.mutable_data_ptr();
  p.x_stride = x.stride(0);
  launch_standardise(p, type_of(z0), stream());
  return {x.narrow(1, 0, n), mean, rnorm};
}

// Each column of a view is the positive of the same column of the other, and of what the mask adds.
Contrast column_problem(const at::Tensor& x, const at::Tensor& scale,
                        const std::optional<at::Tensor>& positive_mask) {
  Contrast problem{x, std::nullopt, scale, 0};
  const at::Tensor own = at::arange(x.size(0), x.options().dtype(at::kLong));
  const at::Tensor partner = own.roll(x.size(0) / 2);
  if (positive_mask)
    problem.positive_mask = *positive_mask | (partner.unsqueeze(1) == own);
  else
    problem.positive_index = partner;
  return problem;
}

}  // namespace
}  // namespace cuda

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dimcl_forward(
    const at::Tensor& z0, const at::Tensor& z1, const at::Tensor& scale,
    const std::optional<at::Tensor>& positive_mask) {
  cuda::check_arguments(z0, z1, positive_mask);
  const cuda::DeviceGuard guard(z0);
  const cuda::Columns columns = cuda::standardise(z0, z1);
  const cuda::Statistics out =
      cuda::engine_forward(cuda::column_problem(columns.x, scale, positive_mask), false);
  return {out.lse, out.positive_sum, out.positive_count, columns.mean, columns.rnorm};
}

// The columns are standardised again: the statistics as returned have lost digits that x needs.
std::tuple<at::Tensor, at::Tensor, at::Tensor> dimcl_backward(
    const std::optional<at::Tensor>& grad_lse, const std::optional<at::Tensor>& grad_positive_sum,
    const at::Tensor& z0, const at::Tensor& z1, const at::Tensor& scale,
    const std::optional<at::Tensor>& positive_mask, const at::Tensor& lse, const at::Tensor&,
    const at::Tensor&, bool needs_scale) {
  cuda::check_arguments(z0, z1, positive_mask);
  const cuda::DeviceGuard guard(z0);
  const int64_t n = z0.size(0), d = z0.size(1);
  const cuda::Columns columns = cuda::standardise(z0, z1);
  const at::Tensor nothing = at::empty({0}, lse.options());
  const cuda::Gradients grads = cuda::engine_backward(
      {grad_lse, std::nullopt, grad_positive_sum}, cuda::column_problem(columns.x, scale, positive_mask),
      {lse, nothing, nothing}, {true, false, needs_scale, false}, true);
  at::Tensor grad_z0 = at::empty({n, d}, z0.options()), grad_z1 = at::empty({n, d}, z1.options());
  at::Tensor along = cuda::empty_like_device(z0, {2, 2 * d}, at::kFloat);
  const at::Tensor grad_x = grads.q.contiguous();
  const cuda::ColumnGradientParams p{grad_x.const_data_ptr<float>(),
                                     columns.x.const_data_ptr(),
                                     cuda::row_stride(columns.x),
                                     columns.rnorm.const_data_ptr<float>(),
                                     static_cast<int>(n),
                                     static_cast<int>(d),
                                     along.mutable_data_ptr<float>(),
                                     {grad_z0.mutable_data_ptr(), grad_z1.mutable_data_ptr()}};
  cuda::launch_column_gradient(p, cuda::type_of(z0), cuda::stream());
  return {grad_z0, grad_z1, grads.scale};
}

}  // namespace cl_kernels
