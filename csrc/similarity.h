// The N x M similarity matrix itself, scaled, of rows normalised on request.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace cl_kernels {

std::tuple<at::Tensor, at::Tensor, at::Tensor> similarity_forward(
    const at::Tensor& q,                 // [N, D]
    const std::optional<at::Tensor>& k,  // [M, D], or none: q
    const at::Tensor& scale,             // 0-dim
    bool normalize);
// -> out [N, M], q_rnorm [N] | [0], k_rnorm [M] | [0]

std::tuple<at::Tensor, at::Tensor, at::Tensor> similarity_backward(
    const at::Tensor& grad,  // [N, M]
    const at::Tensor& q, const std::optional<at::Tensor>& k, const at::Tensor& scale, bool normalize,
    const at::Tensor& q_rnorm, const at::Tensor& k_rnorm, std::array<bool, 2> needs);  // q, k
// -> grad_q [N, D], grad_k [M, D], grad_scale []

}  // namespace cl_kernels
