// Losses that are a sum or a mean of cross-entropies, with their gradients: one op in place of an op, the
// arithmetic of rows and the op of the backward. Only the CPU has them.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

#include "../contrastive.h"

namespace cl_kernels::cpu {

struct LossOptions {
  double factor;              // of the loss
  bool mean;                  // over the rows, in place of their sum
  bool drop;                  // rows without positives are not counted by the mean
  bool at_least_zero;         // a row's loss below 0 is rounding, and is 0
  std::array<bool, 3> needs;  // q, k, scale
};

// The losses of rows, reduced, and the gradients of what they are made of.
struct RowLosses {
  double loss = 0;
  at::Tensor grad_lse, grad_lse_cols, grad_positive_sum;  // double, [N] | undefined

  // lse - positive_sum / positive_count of each row; with lse_cols the mean of both in place of lse.
  RowLosses(const at::Tensor& lse, const at::Tensor& lse_cols, const at::Tensor& positive_sum,
            const at::Tensor& positive_count, const LossOptions& options);
};

// unit: over q's rows at unit length, a zero row staying zero; then k is none.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_loss(const Contrast&, bool unit,
                                                                            const LossOptions&);
// -> loss [], grad_q [N, D] | [0], grad_k [M, D] | [0], grad_scale [] | [0], in the type of sums

// The dimension-wise contrast, as csrc/dimcl.h has it, of which needs are z0, z1 and the scale.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> dimcl_loss(
    const at::Tensor& z0, const at::Tensor& z1, const at::Tensor& scale,
    const std::optional<at::Tensor>& positive_mask, const LossOptions&);
// -> loss [], grad_z0, grad_z1 [N, D] | [0], grad_scale [] | [0], in the type of sums

// The soft-target cross-entropy over keys that get no gradient: S = scale q k^T over the concatenated
// segments of k, T = target_scale target_q k^T. Each row has a positive: a column of S, which T leaves out
// (or where T is 0), or a key of its own beside them.
struct KeyLoss {
  at::Tensor q;                                   // [N, D]
  at::TensorList k;                               // segments [M_s, D]
  std::optional<at::Tensor> target_q;             // [N, D], none: no target, as with coeff 1
  at::Tensor scale;                               // 0-dim
  std::optional<at::Tensor> target_scale, coeff;  // 0-dim, with a target
  std::optional<at::Tensor> own;                  // [N, D], the positives beside k
  std::optional<at::Tensor> positive;             // [N] int64, or the columns they are
  bool positive_is_zero;                          // in T, in place of left out
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> key_loss(const KeyLoss&, bool mean,
                                                        std::array<bool, 2> needs);  // q, scale
// -> loss [], grad_q [N, D] | [0], grad_scale [] | [0], in the type of sums

}  // namespace cl_kernels::cpu
