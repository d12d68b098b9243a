#include "../contrastive.h"

#include "engine.h"
#include "gradient_residual.h"
#include "tensors.h"

namespace cl_kernels {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_forward(
    const at::Tensor& q, const std::optional<at::Tensor>& k, const at::Tensor& scale, const Pairs& pairs,
    bool save_gradient) {
  cuda::Statistics out = cuda::engine_forward({q, k, scale, pairs}, save_gradient);
  return {out.lse, out.lse_cols, out.positive_sum, out.positive_count, out.residual};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_backward(
    const std::optional<at::Tensor>& grad_lse, const std::optional<at::Tensor>& grad_lse_cols,
    const std::optional<at::Tensor>& grad_positive_sum, const at::Tensor& q,
    const std::optional<at::Tensor>& k, const at::Tensor& scale, const Pairs& pairs, const at::Tensor& lse,
    const at::Tensor& lse_cols, const at::Tensor& residual, std::array<bool, 3> needs) {
  const auto [needs_q, needs_k, needs_bias] = needs;
  if (k && residual.numel() > 0 && !needs_k && !needs_bias) {
    const at::Tensor nothing = residual.new_empty({0});
    auto [grad_q, grad_scale] = cuda::gradient_from_residual(residual, q, *k, scale, pairs.positive_index,
                                                             grad_lse, grad_positive_sum, needs_q);
    return {grad_q, nothing, grad_scale, nothing};
  }
  cuda::Gradients out = cuda::engine_backward({q, k, scale, pairs}, grad_lse, grad_lse_cols,
                                              grad_positive_sum, lse, lse_cols, needs);
  return {out.q, out.k, out.scale, out.key_bias};
}

}  // namespace cl_kernels
