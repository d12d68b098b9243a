// What similarity does row by row: norms, unit rows, and the gradient through them.
#pragma once

#include "device.h"

namespace cl_kernels::cuda {

struct RowNormsParams {
  const void* x;  // [n, d], rows at multiples of 16 bytes
  int64_t x_stride;
  int n, d;
  float* rnorm;  // [n] 1 / ||row||, 0 for a zero row
  void* unit;    // [n, unit_stride] the rows at unit length, in the type of x, zeros from d on; or null
  int64_t unit_stride;  // a multiple of 16 bytes
};
void launch_row_norms(const RowNormsParams&, Type, cudaStream_t);

// With u the row x at unit length: out = factor scale rnorm (g - u (u . g)), along = share u . g. Without
// rnorm u is x, and out = factor scale g.
struct RowGradientParams {
  const float* grad;  // [n, d] of the unit rows
  const void* x;      // [n, d], rows at multiples of 16 bytes
  int64_t x_stride;
  const float* rnorm;  // [n] or null
  int n, d;
  Scalar scale;
  float factor;   // of out
  double share;   // of along
  void* out;      // [n, d] in the type of x, or null
  double* along;  // [n] or null
};
void launch_row_gradient(const RowGradientParams&, Type, cudaStream_t);

}  // namespace cl_kernels::cuda
