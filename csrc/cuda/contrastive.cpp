#include "../contrastive.h"

#include "engine.h"
#include "gradient_residual.h"
#include "tensors.h"

namespace cl_kernels {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_forward(
    const Contrast& problem, bool save_gradient) {
  cuda::Statistics out = cuda::engine_forward(problem, save_gradient);
  return {out.lse, out.lse_cols, out.positive_sum, out.positive_count, out.residual};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_backward(
    const ContrastIncoming& incoming, const Contrast& problem, const ContrastSaved& saved,
    std::array<bool, 4> needs) {
  const auto [needs_q, needs_k, needs_scale, needs_bias] = needs;
  if (problem.k && saved.residual.numel() > 0 && !needs_k && !needs_bias) {
    auto [grad_q, grad_scale] =
        cuda::gradient_from_residual(incoming, problem, saved.residual, {needs_q, needs_scale});
    return {grad_q, saved.residual.new_empty({0}), grad_scale, saved.residual.new_empty({0})};
  }
  cuda::Gradients out = cuda::engine_backward(incoming, problem, saved, needs);
  return {out.q, out.k, out.scale, out.key_bias};
}

}  // namespace cl_kernels
