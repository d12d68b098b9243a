// What the gradient of the engine needs of each row (or column): the Terms of gradient.h.
#pragma once

#include "gradient.h"

namespace cl_kernels::cuda {

struct TermsParams {
  const double* lse;          // [n] natural units; read where there is `grad`
  const double* grad;         // [n] of the log-sum-exps, or null: no softmax
  const double* weight_grad;  // [n] of the sums over positives, or null: no positives
  int64_t grad_stride, weight_grad_stride;
  const int* index;  // [n] the positive of a row, -1: none; or null
  // [padded], zeros from n on
  float *shift, *coef, *weight, *level;
  // [padded / kTermsBlock]
  float *high, *low;
  int *index_low, *index_high;
  float* bound;                 // [1] rises to the largest coefficient or weight; or null
  const float* largest_weight;  // [1] of a mask, which weights multiply with; or null
  int n;
  int padded;  // round_up(n, kTermsPadding)
};

void launch_gradient_terms(const TermsParams&, cudaStream_t);

}  // namespace cl_kernels::cuda
