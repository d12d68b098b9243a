// The gradient of the queries of frozen keys, from the residual of the forward.
#pragma once

#include <utility>

#include "../contrastive.h"

namespace cl_kernels::cuda {

// grad_q [N, D] ([0] unless needs_q) and grad_scale [].
std::pair<at::Tensor, at::Tensor> gradient_from_residual(const ContrastIncoming&, const Contrast&,
                                                         const at::Tensor& residual,  // [N, D]
                                                         bool needs_q);

}  // namespace cl_kernels::cuda
