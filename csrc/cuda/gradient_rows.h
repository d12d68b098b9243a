// The gradient of the engine by rows on Hopper, for half-precision features of at most kWidestRows: sum_j
// G_ij y_j in registers, nothing of G in memory. Programs share no output; where there are few owners the
// others are split, and the parts added up by gradient_combine.
#pragma once

#include "gradient.h"
#include "lse.h"

namespace cl_kernels::cuda {

constexpr int kWidestRows = 256;

struct GradientRowsParams {
  Features features;  // x: owners, y: others
  GradientRules rules;
  int splits;  // each takes ceil(ceil(m / kBlock) / splits) blocks of others
  float* out;  // [splits, n, d], 2^lift taken off
};
void launch_gradient_rows_sm90(const GradientRowsParams&, Type, cudaStream_t);

}  // namespace cl_kernels::cuda
