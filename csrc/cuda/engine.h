// The engine of the losses on GPU tensors: log-sum-exps, sums over positives, and their gradients.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "../contrastive.h"
#include "lse.h"

namespace cl_kernels::cuda {

struct Statistics {
  at::Tensor lse, lse_cols, positive_sum, positive_count;  // double
  at::Tensor residual;                                     // float
};

struct Gradients {
  at::Tensor q, k, scale, key_bias;
};

Statistics engine_forward(const Contrast&, bool save_gradient);

// The gradients of q and k in their type, or in float.
Gradients engine_backward(const ContrastIncoming&, const Contrast&, const ContrastSaved&,
                          std::array<bool, 4> needs, bool in_float = false);

// How features of this type multiply: float32 by torch.get_float32_matmul_precision(), "medium" as "high".
Precision precision_of(const at::Tensor& features);

}  // namespace cl_kernels::cuda
