// The ends of the attention over frozen keys (attention.h): its parts combined, and the gradient of the
// queries from what is kept of it, without a pass over the pairs.
#pragma once

#include "device.h"

namespace cl_kernels::cuda {

struct ResidualParams {
  const float* peak;   // [splits, n] as in AttentionParams, and the next two
  const float* total;  // [splits, n]
  const float* mean;   // [splits, n, d]
  int splits, n, d;
  const int* index;          // [n] the positive of a row, -1: none; or null
  const float* index_logit;  // [n] base 2; read where there is an index, and the next
  const float* own_logit;    // [n]
  const void* k;             // [m, d] keys, in memory that row_major (tensors.h) accepts
  int64_t k_stride;
  double* lse;             // [n]
  double* positive_sum;    // [n]; written where there is an index, and the next
  double* positive_count;  // [n]
  float* residual;         // [n, d] (P - W) k, W the positive
};
void launch_residual(const ResidualParams&, Type, cudaStream_t);  // half precision

// grad_q = scale (g_lse residual + (g_lse + g_positive) k[index])
struct ResidualGradientParams {
  const float* residual;  // [n, d]
  const void* q;          // [n, d], and the keys [m, d]: in memory that row_major accepts
  const void* k;
  int64_t q_stride, k_stride;
  int n, d;
  Scalar scale;
  const int* index;             // [n], or null
  const double* grad_lse;       // [n], or null
  const double* grad_positive;  // [n], or null
  int64_t grad_lse_stride, grad_positive_stride;
  void* grad;     // [n, d] in the type of q, contiguous; or null
  double* along;  // [n] q_i . grad_i / scale
};
void launch_residual_gradient(const ResidualGradientParams&, Type, cudaStream_t);

}  // namespace cl_kernels::cuda
