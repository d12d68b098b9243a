// The engine: log-sum-exp over similarities, and the sums over positives, without the N x M matrix. These
// statistics of rows are float64, so that lse - S of a converged row, a difference of equals, keeps its
// digits.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace cl_kernels {

// Which pairs (i, j) count, shared by the forward and the backward.
struct Pairs {
  std::optional<int64_t> exclude;            // column i + exclude is left out of row i
  std::optional<at::Tensor> row_labels;      // [N] int64
  std::optional<at::Tensor> col_labels;      // [M] int64
  std::string_view among;                    // "all" | "same" | "different"
  bool label_positives;                      // positives: equal labels
  std::optional<at::Tensor> positive_index;  // [N] int64, -1: none
  std::optional<at::Tensor> positive_mask;   // [R, C] weights, read at [i % R, j % C]
  std::optional<at::Tensor> key_bias;        // [M], added to the logits
  bool both_axes;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_forward(
    const at::Tensor& q,                 // [N, D]
    const std::optional<at::Tensor>& k,  // [M, D], or none: q
    const at::Tensor& scale,             // 0-dim
    const Pairs& pairs, bool save_gradient);
// -> lse [N], lse_cols [M] | [0], positive_sum [N] | [0], positive_count [N] | [0], residual [N, D] | [0]

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_backward(
    const std::optional<at::Tensor>& grad_lse,           // [N]
    const std::optional<at::Tensor>& grad_lse_cols,      // [M]
    const std::optional<at::Tensor>& grad_positive_sum,  // [N]
    const at::Tensor& q, const std::optional<at::Tensor>& k, const at::Tensor& scale, const Pairs& pairs,
    const at::Tensor& lse,       // [N]
    const at::Tensor& lse_cols,  // [M] | [0]
    const at::Tensor& residual,  // [N, D] | [0]
    std::array<bool, 3>
        needs);  // q, k, key_bias -> grad_q [N, D], grad_k [M, D], grad_scale [], grad_key_bias [M]

}  // namespace cl_kernels
