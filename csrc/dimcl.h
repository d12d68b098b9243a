// DimCL: the engine over the feature axis, on the Pearson correlations of the columns of two views.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace cl_kernels {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dimcl_forward(
    const at::Tensor& z0,                             // [N, D]
    const at::Tensor& z1,                             // [N, D]
    const at::Tensor& scale,                          // 0-dim
    const std::optional<at::Tensor>& positive_mask);  // [2D, 2D] bool: positives beside (r, r + D mod 2D)
// -> lse [2D], positive_sum [2D], positive_count [2D], mean [2, D], rnorm [2, D]

std::tuple<at::Tensor, at::Tensor, at::Tensor> dimcl_backward(
    const std::optional<at::Tensor>& grad_lse,           // [2D]
    const std::optional<at::Tensor>& grad_positive_sum,  // [2D]
    const at::Tensor& z0, const at::Tensor& z1, const at::Tensor& scale,
    const std::optional<at::Tensor>& positive_mask, const at::Tensor& lse, const at::Tensor& mean,
    const at::Tensor& rnorm, bool needs_scale);
// -> grad_z0 [N, D], grad_z1 [N, D], grad_scale [] | [0]

}  // namespace cl_kernels
