// Log-sum-exps of the rows (and of the columns) of scale x y^T.
//
// One shift c serves all: with every base-2 logit at most B, a bound from the largest norms, c = max(0, B -
// 100). Sums of 2^(S - c) neither overflow nor, unless they come out below 2^-100, lose digits; partial sums
// are then added as they are, and one exponential serves a pair's row and its column. Rows whose sum comes
// out smaller are computed again with a maximum of their own.
#pragma once

#include "pairs.h"
#include "schedule.h"

namespace cl_kernels::cuda {

constexpr float kMostSum = 0x1p126f;  // sums past this may have overflowed
constexpr float kSafe = 100.0f;       // |base-2 logits| up to which sums of 2^S need no shift

// How float32 features multiply; half-precision features always as they are.
enum class Precision { kHalf, kTf32, kTf32x3 };

// Two matrices whose rows are multiplied, in memory that row_major (tensors.h) accepts.
struct Features {
  const void* x;  // [n, d]
  const void* y;  // [m, d]
  int64_t x_stride, y_stride;
  int n, m, d;
};

// The largest squared norms of a row of x and of y, and the largest bias (0 without).
struct Bounds {
  float x, y, bias;
};

// Which pairs are positives of float32 features, and where the tiles add their logits up. Summed apart from
// the log-sum-exps these would be rounded apart, and not cancel with them in a converged row.
struct PositiveTerms {
  Positives kind;
  const int* index;   // [n] the positive of a row, -1: none
  const float* mask;  // [mask_rows, mask_columns] weight of row i and column j at [i % rows, j % columns]
  int mask_rows, mask_columns;
  const Bounds* bounds;  // of reference()
  // Zeros before; base-2 logits without bias, less the reference, times their weights. Columns: of mirrored
  // tiles, whose pairs serve both of their rows.
  double* rows;     // [column groups or splits, n]
  double* columns;  // [row groups, m]
};

struct LseParams {
  Features features;
  PairRules pairs;
  Scalar scale;
  const float* bias;     // [m] natural units, or null
  const Bounds* bounds;  // on the device
  Schedule schedule;
  float* row_sums;     // [column groups, n], zeros before
  float* column_sums;  // [row groups, m], zeros before, or null
  PositiveTerms positives;
};

void launch_bounds(const Features&, const float* bias, Bounds* bounds, Type,
                   cudaStream_t);  // bounds: zeros before
void launch_lse(const LseParams&, Type, Precision, cudaStream_t);
// Of half-precision features on Hopper.
Schedule lse_schedule_sm90(const Features&, Type, bool mirrored);
void launch_lse_sm90(const LseParams&, Type, cudaStream_t);

// Adds the partial sums up, in a fixed order: lse = ln(sum) + c; a sum too small or too large to trust, or
// NaN, becomes NaN with all bits set, for launch_lse_online.
struct CombineParams {
  const float* parts;     // [slots, n]
  const float* mirrored;  // [more slots, n], or null
  int slots, more_slots, n;
  Scalar scale;
  bool biased;
  const Bounds* bounds;
  double* lse;  // [n]
};
void launch_lse_combine(const CombineParams&, cudaStream_t);

// Log-sum-exps of the rows in one launch, with a running maximum: of small problems, and again of what
// launch_lse_combine does not trust.
struct OnlineParams {
  Features features;
  PairRules pairs;
  Scalar scale;
  const float* own_bias;    // [n] or null
  const float* other_bias;  // [m] or null
  int splits;               // each takes ceil(ceil(m / kBlock) / splits) blocks of columns
  float2* parts;            // [splits, n] maxima and sums
  int* tickets;             // [ceil(n / kBlock)], zeros before
  bool only_untrusted;
  double* lse;  // [n]
  PositiveTerms positives;
};
void launch_lse_online(const OnlineParams&, Type, Precision, cudaStream_t);

#ifdef CL_KERNELS_DEVICE
// No logit without its bias is larger.
__device__ __forceinline__ float largest_logit(const Bounds& bounds, float scale) {
  return fabsf(scale) * sqrtf(bounds.x) * sqrtf(bounds.y) * 1.0001f;
}

// A whole number, so that it takes no digits from a logit near the bound.
__device__ __forceinline__ float fixed_shift(const Bounds& bounds, float scale) {
  return fmaxf(ceilf((largest_logit(bounds, scale) + bounds.bias) * kLog2e - kSafe), 0.0f);
}

// What the logits of positives are summed relative to: a whole number near the largest, or 0 without bounds.
__device__ __forceinline__ float reference(const Bounds* bounds, float scale) {
  if (bounds == nullptr) return 0.0f;
  const float most = largest_logit(*bounds, scale) * kLog2e;
  return most < 0x1p20f ? rintf(most) : 0.0f;
}
#endif

}  // namespace cl_kernels::cuda
