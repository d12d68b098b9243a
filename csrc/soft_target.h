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

// The problem of both ops, as cl_kernels/problem.py has it.
struct SoftTarget {
  at::Tensor q;                         // [N, D]
  at::TensorList k;                     // segments [M_s, D], of any strides
  at::Tensor target_q;                  // [N, E]
  at::TensorList target_k;              // segments [M_s, E]
  at::Tensor scale, target_scale;       // 0-dim
  std::optional<at::Tensor> positive;   // [N] int64, a column of the concatenated segments, -1: none
  std::string_view positive_in_target;  // "exclude" | "zero"
};

// What came in for a backward, [N] each, none where nothing did.
struct SoftTargetIncoming {
  std::optional<at::Tensor> lse, target_lse, cross, positive_sum;
};

// What the forward left for it.
struct SoftTargetSaved {
  at::Tensor lse, target_lse, cross, positive_sum;  // [N], the last [0] without positives
  at::Tensor mean_key, mean_target_key;             // [N, D] | [0]
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> soft_target_forward(
    const SoftTarget&, bool save_gradient);
// -> the fields of SoftTargetSaved

std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor>
soft_target_backward(const SoftTargetIncoming&, const SoftTarget&, const SoftTargetSaved&,
                     std::array<bool, 4> needs);  // q, k, target_q, target_k
// -> grad_q [N, D], grad_k [M_s, D] each, grad_target_q [N, E], grad_target_k [M_s, E] each, grad_scale [],
// grad_target_scale []

}  // namespace cl_kernels
