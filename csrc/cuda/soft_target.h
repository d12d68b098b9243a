// The row kernels of the soft-target op (cl_kernels/ops.py): S = scale q k^T of the student, T = target_scale
// t u^T of the teacher. On Hopper half-precision features of at most kWidestRows take two attentions
// (attention.h), whose parts are combined here; everything else has whole rows of logits in memory, made by
// library products.
#pragma once

#include "device.h"

namespace cl_kernels::cuda {

// The statistics of rows, natural units.
struct SoftTargetRows {
  double* lse;           // [n]
  double* target_lse;    // [n]
  double* cross;         // [n] mean of S under softmax(T)
  double* positive_sum;  // [n] S at the positive; or null
};

// From the parts of both attentions, which leave the positive out.
struct SoftTargetCombineParams {
  const float* peak;          // [slots, n] as in AttentionParams, of S, and the next two
  const float* total;         // [slots, n]
  const float* mean;          // [slots, n, d] of k
  const float* target_peak;   // [slots, n] the same of T
  const float* target_total;  // [slots, n]
  const float* target_mean;   // [slots, n, d] of k
  int slots, n, d;
  const int* positive;  // [n] a column, -1: none; or null
  int columns;          // of all segments
  const float* logit;   // [n] S at the positive, base 2; read where there is one
  bool zero;            // the teacher's logit there is 0, not left out
  Scalar scale;
  const void* q;  // [n, d] in memory that row_major (tensors.h) accepts
  int64_t q_stride;
  SoftTargetRows rows;
  float* mean_key;         // [n, d] softmax(S) k without the positive; or null
  float* mean_target_key;  // [n, d] softmax(T) k without the positive; or null
};
void launch_soft_target_combine(const SoftTargetCombineParams&, Type, cudaStream_t);  // half precision

// Rows of q k^T and t u^T in memory. Columns of -infinity, the same in both, fill segments up.
struct SoftTargetLogits {
  float* s;      // [n, width]
  float* t;      // [n, width]
  int n, width;  // width: a multiple of 4
  Scalar scale, target_scale;
  const int* positive;  // [n] a column, -1: none; or null
  bool zero;
};

struct SoftTargetStatisticsParams {
  SoftTargetLogits logits;
  SoftTargetRows rows;
};
void launch_soft_target_statistics(const SoftTargetStatisticsParams&, cudaStream_t);

// The gradient of a statistic of rows.
struct RowGradient {
  const double* values;  // [n], or null: 0
  int64_t stride;
  __device__ __forceinline__ double at(int64_t i) const {
    return values != nullptr ? values[i * stride] : 0.0;
  }
};

struct SoftTargetGradients {
  const double* lse;  // [n], and the next three
  const double* target_lse;
  const double* cross;
  const double* positive_sum;  // or null
  RowGradient of_lse, of_target_lse, of_cross, of_positive;
};

// In place of the logits,
//
//     G = g_lse softmax(S) + g_cross softmax(T) + g_positive [j = positive]
//     H = softmax(T) (g_target_lse + g_cross (S - cross)), 0 at the positive
//
// or, as weights of means, softmax(S) and softmax(T), 0 at the positive. They are of the features' type, from
// the start of each row of logits on, times powers of two that keep float16 from underflow.
struct SoftTargetMatricesParams {
  SoftTargetLogits logits;
  SoftTargetGradients gradients;
  bool means;
  Scalar factor, target_factor;
  bool write_g, write_h;
  double* along;         // [n] sums of G o (q k^T); or null
  double* target_along;  // [n] sums of H o (t u^T); or null
};
void launch_soft_target_matrices(const SoftTargetMatricesParams&, Type, cudaStream_t);

// factors [2]: powers of two that bring the largest possible elements of G and of H near 2^14.
struct SoftTargetFactorsParams {
  SoftTargetGradients gradients;
  int n;
  float* factors;
};
void launch_soft_target_factors(const SoftTargetFactorsParams&, cudaStream_t);

// With keys and target frozen:
//
//     grad_q = scale (g_lse mean_key + g_cross mean_target_key + weight k[positive])
//     weight = g_lse P_positive + g_positive [+ g_cross exp(-target_lse): "zero"]
constexpr int kMostSegments = 8;
struct SoftTargetFromMeansParams {
  SoftTargetGradients gradients;
  const float* mean_key;         // [n, d]
  const float* mean_target_key;  // [n, d]
  const void* q;                 // [n, d] of any strides, as the keys
  int64_t q_stride, q_step;      // from row to row, from column to column
  int n, d;
  Scalar scale;
  const int* positive;  // [n], or null
  bool zero;
  int segments;
  struct {
    const void* k;  // [columns, d]
    int64_t stride, step;
    int first, columns;
  } segment[kMostSegments];
  void* grad;     // [n, d] in the type of q, contiguous; or null
  double* along;  // [n] q_i . grad_i / scale
};
void launch_soft_target_from_means(const SoftTargetFromMeansParams&, Type, cudaStream_t);

}  // namespace cl_kernels::cuda
