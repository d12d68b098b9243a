// DimCL's columns: brought to mean 0 and unit length, as rows, and the gradient through that.
#pragma once

#include "device.h"

namespace cl_kernels::cuda {

constexpr int kColumnChunk = 256;  // rows of z whose sums one block takes

__host__ __device__ inline int column_chunks(int n) {
  return ceil_div(n, kColumnChunk);
}

struct StandardiseParams {
  const void* z[2];     // [n, d]
  int64_t z_stride[2];  // from one row to the next
  int n, d;
  float noise;       // the norm, relative to the mean, up to which a column is constant
  float* parts;      // [2, column_chunks(n), 2, d]
  float* mean;       // [2, d]
  float* rnorm;      // [2, d] 1 / ||column - mean||, 0 for a constant column
  void* x;           // [2d, x_stride], zeros from column n on
  int64_t x_stride;  // a multiple of 16 bytes, less than 16 bytes more than n elements
};
void launch_standardise(const StandardiseParams&, Type, cudaStream_t);

struct ColumnGradientParams {
  const float* grad;  // [2d, n]
  const void* x;      // [2d, n]
  int64_t x_stride;
  const float* rnorm;  // [2, d]
  int n, d;
  float* along;     // [2, 2d] x . grad of each row, and the mean of grad - x (x . grad)
  void* grad_z[2];  // [n, d] in the type of x
};
void launch_column_gradient(const ColumnGradientParams&, Type, cudaStream_t);

}  // namespace cl_kernels::cuda
