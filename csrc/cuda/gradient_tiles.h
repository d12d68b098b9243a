// The final G of a chunk of owners, in the type of the features, for library products.
#pragma once

#include "gradient.h"
#include "lse.h"

namespace cl_kernels::cuda {

struct GradientTilesParams {
  Features features;  // x: owners, y: others
  GradientRules rules;
  int first_row, last_row;  // of the chunk; first_row a multiple of kBlock
  int first_column;         // a multiple of kBlock
  void* out;                // [last_row - first_row, m - first_column], G 2^lift
  int64_t out_stride;       // a multiple of 8
};
void launch_gradient_tiles(const GradientTilesParams&, Type, Precision, cudaStream_t);
void launch_gradient_tiles_sm90(const GradientTilesParams&, Type, cudaStream_t);

// Sums over the others of the softmax part of G, 2^lift taken off: sums [n].
struct GradientSumsParams {
  Features features;
  GradientRules rules;
  float* sums;
};
void launch_gradient_sums(const GradientSumsParams&, Type, Precision, cudaStream_t);

}  // namespace cl_kernels::cuda
