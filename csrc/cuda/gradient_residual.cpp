#include "gradient_residual.h"

#include <ATen/ops/empty.h>

#include "residual.h"
#include "tensors.h"

namespace cl_kernels::cuda {

std::pair<at::Tensor, at::Tensor> gradient_from_residual(const ContrastIncoming& incoming,
                                                         const Contrast& problem, const at::Tensor& residual,
                                                         std::array<bool, 2> needs) {
  const auto [needs_q, needs_scale] = needs;
  const at::Tensor& q = problem.q;
  const std::optional<at::Tensor>& positive_index = problem.positive_index;
  const DeviceGuard guard(q);
  const at::Tensor x = row_major(q), kept = residual.contiguous();
  const int64_t n = q.size(0), d = q.size(1);
  at::Tensor y, index, of_lse, of_positive;
  if (positive_index) y = row_major(*problem.k), index = positive_index->to(at::kInt).contiguous();
  if (incoming.lse) of_lse = incoming.lse->to(at::kDouble);
  if (incoming.positive_sum) of_positive = incoming.positive_sum->to(at::kDouble);
  at::Tensor grad = needs_q ? at::empty({n, d}, q.options()) : at::empty({0}, kept.options());
  at::Tensor along = at::empty({n}, q.options().dtype(at::kDouble));

  ResidualGradientParams params = {};
  params.residual = kept.const_data_ptr<float>();
  params.q = x.const_data_ptr(), params.q_stride = row_stride(x);
  params.n = static_cast<int>(n), params.d = static_cast<int>(d);
  params.scale = scalar_of(problem.scale);
  if (positive_index) {
    params.k = y.const_data_ptr(), params.k_stride = row_stride(y);
    params.index = index.const_data_ptr<int>();
  }
  if (incoming.lse)
    params.grad_lse = of_lse.const_data_ptr<double>(), params.grad_lse_stride = of_lse.stride(0);
  if (incoming.positive_sum)
    params.grad_positive = of_positive.const_data_ptr<double>(),
    params.grad_positive_stride = of_positive.stride(0);
  if (needs_q) params.grad = grad.mutable_data_ptr();
  params.along = along.mutable_data_ptr<double>();
  launch_residual_gradient(params, type_of(x), stream());
  return {grad, needs_scale ? along.sum().to(at::kFloat) : at::empty({0}, kept.options())};
}

}  // namespace cl_kernels::cuda
