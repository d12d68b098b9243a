// The engine of the losses on GPU tensors: log-sum-exps, sums over positives, and their gradients.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "../contrastive.h"
#include "lse.h"

namespace cl_kernels::cuda {

// The problem of the `contrastive` ops (cl_kernels/ops.py).
struct Contrast {
  at::Tensor q;                 // [N, D]
  std::optional<at::Tensor> k;  // [M, D], or none: q
  at::Tensor scale;             // 0-dim
  Pairs pairs;
};

struct Statistics {
  at::Tensor lse, lse_cols, positive_sum, positive_count;  // double
  at::Tensor residual;                                     // float
};

struct Gradients {
  at::Tensor q, k, scale, key_bias;
};

Statistics engine_forward(const Contrast&, bool save_gradient);

// The gradients of q and k in `type`, by default that of q.
Gradients engine_backward(const Contrast&, const std::optional<at::Tensor>& grad_lse,
                          const std::optional<at::Tensor>& grad_lse_cols,
                          const std::optional<at::Tensor>& grad_positive_sum, const at::Tensor& lse,
                          const at::Tensor& lse_cols, std::array<bool, 3> needs,
                          std::optional<at::ScalarType> type = std::nullopt);

// How features of this type multiply: float32 by torch.get_float32_matmul_precision(), "medium" as "high".
Precision precision_of(const at::Tensor& features);

}  // namespace cl_kernels::cuda
