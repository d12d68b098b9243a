// The last step of a gradient: parts added up in a fixed order, scaled and rounded, and the gradient of the
// scale.
#pragma once

#include "device.h"

namespace cl_kernels::cuda {

struct GradientCombineParams {
  const float* parts;  // [splits, n, d]
  int splits, n, d;
  const void* x;  // [n, d] what the parts are the gradient of, in memory that row_major (tensors.h) accepts
  int64_t x_stride;
  Scalar scale;
  const float* bound;  // [1] the parts are times 2^half_lift(bound) (gradient.h); or null
  float share;         // of `along`: 1/2 where x stands for both factors of a product
  void* grad;          // [n, d] scale times the sum of parts, contiguous; or null
  double* along;       // [n] share x_i . (sum of parts)_i
};

// The gradient is of x's type, or float.
void launch_gradient_combine(const GradientCombineParams&, Type, bool in_float, cudaStream_t);

}  // namespace cl_kernels::cuda
