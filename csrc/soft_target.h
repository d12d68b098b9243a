// Soft-target cross-entropy (SCE): the student's and the teacher's softmax over the same keys, without either
// matrix.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace cl_kernels {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> soft_target_forward(
    const at::Tensor& q,                        // [N, D]
    at::TensorList k,                           // segments [M_s, D], of any strides
    const at::Tensor& target_q,                 // [N, E]
    at::TensorList target_k,                    // segments [M_s, E]
    const at::Tensor& scale,                    // 0-dim
    const at::Tensor& target_scale,             // 0-dim
    const std::optional<at::Tensor>& positive,  // [N] int64, a column of the concatenated segments, -1: none
    std::string_view positive_in_target,        // "exclude" | "zero"
    bool save_gradient);  // -> lse [N], target_lse [N], cross [N], positive_sum [N] | [0], mean_key,
                          // mean_target_key [N, D] | [0]

std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor>
soft_target_backward(const std::optional<at::Tensor>& grad_lse,  // [N], as the next three
                     const std::optional<at::Tensor>& grad_target_lse,
                     const std::optional<at::Tensor>& grad_cross,
                     const std::optional<at::Tensor>& grad_positive_sum, const at::Tensor& q,
                     at::TensorList k, const at::Tensor& target_q, at::TensorList target_k,
                     const at::Tensor& scale, const at::Tensor& target_scale,
                     const std::optional<at::Tensor>& positive, std::string_view positive_in_target,
                     const at::Tensor& lse, const at::Tensor& target_lse, const at::Tensor& cross,
                     const at::Tensor& positive_sum, const at::Tensor& mean_key,
                     const at::Tensor& mean_target_key,
                     std::array<bool, 4> needs);  // q, k, target_q, target_k
// -> grad_q [N, D], grad_k [M_s, D] each, grad_target_q [N, E], grad_target_k [M_s, E] each, grad_scale [],
// grad_target_scale []

}  // namespace cl_kernels
