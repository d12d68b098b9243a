// What the gradient of the engine needs of each row and column: the Terms of gradient.h.
#pragma once

#include "gradient.h"

namespace cl_kernels::cuda {

// One side of the problem.
struct TermsParams {
  const double* lse;          // [n] natural units; read where there is `grad`
  const double* grad;         // [n] of the log-sum-exps, or null: no softmax
  const double* weight_grad;  // [n] of the sums over positives, or null: no positives
  int64_t grad_stride, weight_grad_stride;
  const int* ids;      // [n] of labels, or null
  const int* index;    // [n] the positive of a row, -1: none; or null
  const float* bias;   // [n] natural units, or null
  TermsBlock* blocks;  // [terms_blocks(n)]
  int n;
};

// Blocks for n rows: whole tiles.
__host__ __device__ constexpr int terms_blocks(int n) {
  return round_up(n, kTermsPadding) / kTermsBlock;
}

struct BothTermsParams {
  TermsParams rows, columns;    // columns.n = 0: none
  float* bound;                 // [1] rises to the largest coefficient or weight; or null
  const float* largest_weight;  // [1] of a mask, which weights multiply with; or null
};
void launch_gradient_terms(const BothTermsParams&, cudaStream_t);

}  // namespace cl_kernels::cuda
