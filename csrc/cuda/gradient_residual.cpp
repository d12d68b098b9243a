#include "gradient_residual.h"

#include <ATen/ops/empty.h>

#include "residual.h"
#include "tensors.h"

namespace cl_kernels::cuda {

std::pair<at::Tensor, at::Tensor> gradient_from_residual(const at::Tensor& residual, const at::Tensor& q,
                                                         const at::Tensor& k, const at::Tensor& scale,
                                                         const std::optional<at::Tensor>& positive_index,
                                                         const std::optional<at::Tensor>& grad_lse,
                                                         const std::optional<at::Tensor>& grad_positive,
                                                         bool needs_q) {
  const DeviceGuard guard(q);
  const at::Tensor x = row_major(q), kept = residual.contiguous();
  const int64_t n = q.size(0), d = q.size(1);
  at::Tensor y, index, of_lse, of_positive;
  if (positive_index) y = row_major(k), index = positive_index->to(at::kInt).contiguous();
  if (grad_lse) of_lse = grad_lse->to(at::kDouble);
  if (grad_positive) of_positive = grad_positive->to(at::kDouble);
  at::Tensor grad = needs_q ? at::empty({n, d}, q.options()) : at::empty({0}, kept.options());
  at::Tensor along = at::empty({n}, q.options().dtype(at::kDouble));

  ResidualGradientParams params = {};
  params.residual = kept.const_data_ptr<float>();
  params.q = x.const_data_ptr(), params.q_stride = row_stride(x);
  params.n = static_cast<int>(n), params.d = static_cast<int>(d);
  params.scale = scalar_of(scale);
  if (positive_index) {
    params.k = y.const_data_ptr(), params.k_stride = row_stride(y);
    params.index = index.const_data_ptr<int>();
  }
  if (grad_lse) params.grad_lse = of_lse.const_data_ptr<double>(), params.grad_lse_stride = of_lse.stride(0);
  if (grad_positive)
    params.grad_positive = of_positive.const_data_ptr<double>(),
    params.grad_positive_stride = of_positive.stride(0);
  if (needs_q) params.grad = grad.mutable_data_ptr();
  params.along = along.mutable_data_ptr<double>();
  launch_residual_gradient(params, type_of(x), stream());
  return {grad, along.sum().to(at::kFloat)};
}

}  // namespace cl_kernels::cuda
