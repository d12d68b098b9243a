// The gradient of the queries of frozen keys, from the residual of the forward.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>

namespace cl_kernels::cuda {

// grad_q [N, D] ([0] unless needs_q) and grad_scale [].
std::pair<at::Tensor, at::Tensor> gradient_from_residual(
    const at::Tensor& residual,                       // [N, D]
    const at::Tensor& q,                              // [N, D]
    const at::Tensor& k,                              // [M, D]
    const at::Tensor& scale,                          // 0-dim
    const std::optional<at::Tensor>& positive_index,  // [N], -1: none
    const std::optional<at::Tensor>& grad_lse,        // [N]
    const std::optional<at::Tensor>& grad_positive,   // [N]
    bool needs_q);

}  // namespace cl_kernels::cuda
