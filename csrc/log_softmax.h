// Masked log-softmax over the rows of a matrix.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace cl_kernels {

at::Tensor masked_log_softmax_forward(const at::Tensor& logits,                // [N, M]
                                      const std::optional<at::Tensor>& mask);  // [N, M] bool, true: included
// -> [N, M]: logits - LSE over the included columns; -inf elsewhere

at::Tensor masked_log_softmax_backward(const at::Tensor& grad,    // [N, M]
                                       const at::Tensor& output,  // [N, M], of the forward
                                       const std::optional<at::Tensor>& mask);

}  // namespace cl_kernels
