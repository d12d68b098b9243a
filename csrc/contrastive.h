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

// The problem of both ops, as cl_kernels/problem.py has it: S_ij = scale q_i.k_j + key_bias_j, and which
// pairs (i, j) count.
struct Contrast {
  at::Tensor q;                              // [N, D]
  std::optional<at::Tensor> k;               // [M, D], or none: q
  at::Tensor scale;                          // 0-dim
  std::optional<int64_t> exclude;            // column i + exclude is left out of row i
  std::optional<at::Tensor> row_labels;      // [N] int64
  std::optional<at::Tensor> col_labels;      // [M] int64
  std::string_view among = "all";            // "all" | "same" | "different", by label, else by mask
  bool label_positives = false;              // positives: equal labels
  std::optional<at::Tensor> positive_index;  // [N] int64, -1: none
  std::optional<at::Tensor> positive_mask;   // [R, C] weights, read at [i % R, j % C]
  std::optional<at::Tensor> key_bias;        // [M], added to the logits
  bool both_axes = false;
};

// What came in for a backward, none where nothing did.
struct ContrastIncoming {
  std::optional<at::Tensor> lse, lse_cols, positive_sum;  // [N], [M], [N]
};

// What the forward left for it.
struct ContrastSaved {
  at::Tensor lse, lse_cols, residual;  // [N], [M] | [0], [N, D] | [0]
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_forward(
    const Contrast&, bool save_gradient);
// -> lse [N], lse_cols [M] | [0], positive_sum [N] | [0], positive_count [N] | [0], residual [N, D] | [0]

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_backward(
    const ContrastIncoming&, const Contrast&, const ContrastSaved&,
    std::array<bool, 4> needs);  // q, k, scale, key_bias
// -> grad_q [N, D], grad_k [M, D], grad_scale [], grad_key_bias [M]; [0] what was not asked for

}  // namespace cl_kernels
