// Hopper's softmax of scale x y^T over frozen keys y, and the mean of the values v under it, in one pass with
// a running maximum, for half-precision features and values of at most kWidestRows. Where there are few rows
// the keys are split, and the parts combined afterwards.
#pragma once

#include "lse.h"

namespace cl_kernels::cuda {

struct AttentionParams {
  Features features;  // x: rows, y: keys
  const void* v;      // [m, width] values; y itself for the mean of the keys
  int64_t v_stride;
  int width;
  PairRules pairs;
  Scalar scale;
  const float* bias;  // [m] natural units, or null
  const int* index;   // [n] a key of each row, -1: none; or null
  int first_key;      // what the first key here is in `index`
  bool drop_index;    // that key is left out of the softmax; otherwise of the mean only
  int splits;         // each takes ceil(ceil(m / kBlock) / splits) blocks of keys
  // Parts: the maximum of the base-2 logits (kNothing without any), the sum of 2^(S - maximum), and the sum
  // of 2^(S - maximum) v.
  float* peak;         // [splits, n]
  float* total;        // [splits, n]
  float* mean;         // [splits, n, width]
  float* index_logit;  // [n] the base-2 logit of key `index` without bias, where it is among these keys
  float* own_logit;    // [n] the same with bias; or null
};
void launch_attention_sm90(const AttentionParams&, Type, cudaStream_t);

}  // namespace cl_kernels::cuda
