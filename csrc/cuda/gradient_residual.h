// The gradient of the queries of frozen keys, from the residual of the forward.
#pragma once

#include <utility>

#include "../contrastive.h"

namespace cl_kernels::cuda {

// grad_q [N, D] and grad_scale [], [0] unless needed.
std::pair<at::Tensor, at::Tensor> gradient_from_residual(const ContrastIncoming&, const Contrast&,
                                                         const at::Tensor& residual,  // [N, D]
                                                         std::array<bool, 2> needs);

}  // namespace cl_kernels::cuda
