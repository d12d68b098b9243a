// The similarity matrix: out_ij = scale x_rnorm_i y_rnorm_j x_i.y_j.
#pragma once

#include "lse.h"

namespace cl_kernels::cuda {

struct SimilarityParams {
  Features features;
  Scalar scale;
  const float* x_rnorm;  // [n], or null: 1
  const float* y_rnorm;  // [m]
  void* out;             // [n, m], in the type of the features, of any alignment
  int64_t out_stride;
};
void launch_similarity(const SimilarityParams&, Type, Precision, cudaStream_t);
void launch_similarity_sm90(const SimilarityParams&, Type, cudaStream_t);

}  // namespace cl_kernels::cuda
