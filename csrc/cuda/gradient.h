// The gradient of the engine in a tile. Owners are the rows of S (for dq), its columns (dk, the transposed
// problem), or with keys equal to queries both at once:
//   G_ij = own_coef_i 2^(S_ij - own_shift_i) + other_coef_j 2^(S_ij - other_shift_j) [over Den] + weights of
//   positives
// S in base 2. The log-sum-exp L (double) of a row is rounded to the float32 shift; what rounding leaves goes
// into the coefficient, g 2^(shift - L), so that exp(S - L) keeps its digits.
#pragma once

#include "pairs.h"
#ifdef CL_KERNELS_DEVICE
#include "ptx.h"
#endif

namespace cl_kernels::cuda {

constexpr int kTermsBlock = 64;     // rows that share a range of shifts
constexpr int kTermsPadding = 128;  // no tile is wider

// The terms of owners or others (gradient_terms.cu), by row; zeros up to a multiple of kTermsPadding.
struct Terms {
  const float* shift;
  const float* coef;
  const float* weight;  // of the row's positives
  const float* level;   // coef at the highest shift of its block: coef 2^(high - shift)
  // [blocks of kTermsBlock rows]
  const float* high;     // the highest shift; kNothing without any
  const float* low;      // the lowest shift whose coefficient counts; -kNothing without any
  const int* index_low;  // the first and the last positive's index; INT_MAX and -1 without any
  const int* index_high;
  bool softmax;    // whether any coefficient counts
  bool positives;  // whether any weight counts
};

struct GradientRules {
  PairRules pairs;
  Scalar scale;
  Terms own, other;
  const float* own_bias;    // [n], natural units, or null
  const float* other_bias;  // [m]
  Positives positives;
  const int* own_index;    // [n] the positive of an owner, -1: none
  const int* other_index;  // [m] the positive of another, an owner
  const float* mask;       // weight of owner i and other j at mask[i % rows, j % columns]
  int mask_rows, mask_columns;
  int64_t mask_row_stride, mask_column_stride;
  const float* bound;  // [1] the largest coefficient or weight, for float16, or null
};

#ifdef CL_KERNELS_DEVICE

// The exponent that brings float16's G to at most 2^10: no overflow, and digits down to 2^-24 of the largest.
__device__ __forceinline__ float half_lift(const float* bound) {
  return bound == nullptr ? 0.0f : 10.0f - ceilf(log2f(fmaxf(*bound, 1e-30f)));
}

// What a thread keeps of its two rows.
struct OwnTerms {
  float shift[2], coef[2], weight[2], low;
  int index[2];
  __device__ __forceinline__ OwnTerms(const GradientRules& rules, int first_i) : low(-kNothing) {
    const Lane lane;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first_i + lane.row + 8 * h;
      const bool inside = i < rules.pairs.n;
      // Without a coefficient no exponential may overflow: infinity times zero.
      shift[h] = inside && rules.own.softmax ? rules.own.shift[i] : -kNothing;
      coef[h] = inside && rules.own.softmax ? rules.own.coef[i] : 0.0f;
      weight[h] = inside && rules.own.positives ? rules.own.weight[i] : 0.0f;
      index[h] = inside && rules.positives == kIndex && rules.own.positives ? rules.own_index[i] : -1;
      if (coef[h] != 0.0f) low = fminf(low, shift[h]);
    }
  }
};

// c, products of owners first_i.. and others first_j.., becomes G times 2^lift; sums[h] gains the softmax
// part of the thread's two rows where kSums.
//
// No logit that counts exceeds `top`, the highest shift of the others' block, so where no shift of either
// side lies further below it than 2^60, one exponential 2^(S - top) serves both: what underflows then is
// below 2^-66 of any row.
template <int kTiles, bool kSums>
__device__ __forceinline__ void gradient_of_tile(float (&c)[4 * kTiles], const GradientRules& rules,
                                                 const OwnTerms& own, int first_i, int first_j, float factor,
                                                 float lift, float (&sums)[2]) {
  constexpr int kColumns = 8 * kTiles;
  static_assert(kColumns <= kTermsBlock, "a level refers to the highest shift of its own block");
  const PairRules& pairs = rules.pairs;
  const int column = first_j + Lane().column;

  if (rules.own_bias != nullptr || rules.other_bias != nullptr) {
    for_elements<kTiles>(first_i, first_j, [&](int t, int e, int i, int j) {
      float bias = rules.own_bias != nullptr && i < pairs.n ? __ldg(rules.own_bias + i) : 0.0f;
      if (rules.other_bias != nullptr && j < pairs.m) bias += __ldg(rules.other_bias + j);
      c[4 * t + e] = c[4 * t + e] * factor + bias * kLog2e;
    });
    factor = 1.0f;
  }

  if (rules.other.softmax) {
    float top = kNothing, low = own.low;
#pragma unroll
    for (int block = first_j / kTermsBlock; block <= (first_j + kColumns - 1) / kTermsBlock; ++block) {
      if (block * kTermsBlock >= pairs.m) break;
      top = fmaxf(top, __ldg(rules.other.high + block));
      low = fminf(low, __ldg(rules.other.low + block));
    }
    if (top - low <= 60.0f) {
      float own_level[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) own_level[h] = own.coef[h] * exp2_fast(fminf(top - own.shift[h], 60.0f));
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const float2 level = __ldg(reinterpret_cast<const float2*>(rules.other.level + column + 8 * t));
#pragma unroll
        for (int e = 0; e < 4; ++e)
          c[4 * t + e] = exp2_fast(c[4 * t + e] * factor + (lift - top)) *
                         (own_level[e / 2] + (e % 2 == 0 ? level.x : level.y));
      }
    } else {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const float2 shift = __ldg(reinterpret_cast<const float2*>(rules.other.shift + column + 8 * t));
        const float2 coef = __ldg(reinterpret_cast<const float2*>(rules.other.coef + column + 8 * t));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float s = c[4 * t + e] * factor + lift;
          c[4 * t + e] = exp2_fast(s - own.shift[e / 2]) * own.coef[e / 2] +
                         exp2_fast(s - (e % 2 == 0 ? shift.x : shift.y)) * (e % 2 == 0 ? coef.x : coef.y);
        }
      }
    }
  } else {
#pragma unroll
    for (int x = 0; x < 4 * kTiles; ++x)
      c[x] = exp2_fast(c[x] * factor + (lift - own.shift[x / 2 % 2])) * own.coef[x / 2 % 2];
  }

  const bool edge = on_edge(pairs, first_i, first_j, 16, kColumns);
  if (pairs.among != kAll) {
    const RowIds ids(pairs, first_i);
    const bool wanted = pairs.among == kSame;
    for_elements<kTiles>(first_i, first_j, [&](int t, int e, int, int j) {
      if ((ids.of[e / 2] == column_id(pairs, j)) != wanted) c[4 * t + e] = 0.0f;
    });
  }
  if (edge) {
    for_elements<kTiles>(first_i, first_j, [&](int t, int e, int i, int j) {
      if (!counts(pairs, i, j)) c[4 * t + e] = 0.0f;
    });
  }
  if constexpr (kSums) {
#pragma unroll
    for (int x = 0; x < 4 * kTiles; ++x) sums[x / 2 % 2] += c[x];
  }

  if (rules.positives == kNoPositives) return;
  const float unit = exp2_fast(lift);
  const float own_weight[2] = {own.weight[0] * unit, own.weight[1] * unit};
  auto other_weight = [&](int j) {
    return rules.other.positives ? __ldg(rules.other.weight + j) * unit : 0.0f;
  };
  if (rules.positives == kLabels) {
    const RowIds ids(pairs, first_i);
    for_elements<kTiles>(first_i, first_j, [&](int t, int e, int i, int j) {
      if (ids.of[e / 2] == column_id(pairs, j) && (!edge || counts(pairs, i, j)))
        c[4 * t + e] += own_weight[e / 2] + other_weight(j);
    });
  } else if (rules.positives == kMask) {
    auto weight = [&](int row, int column) {
      return __ldg(rules.mask + row % rules.mask_rows * rules.mask_row_stride +
                   column % rules.mask_columns * rules.mask_column_stride);
    };
    for_elements<kTiles>(first_i, first_j, [&](int t, int e, int i, int j) {
      if (edge && !counts(pairs, i, j)) return;
      if (rules.own.positives) c[4 * t + e] += own_weight[e / 2] * weight(i, j);
      if (rules.other.positives) c[4 * t + e] += other_weight(j) * weight(j, i);
    });
  } else {
    if (rules.own.positives) {
#pragma unroll
      for (int x = 0; x < 4 * kTiles; ++x)
        if (own.index[x / 2 % 2] == column + x / 4 * 8 + x % 2) c[x] += own_weight[x / 2 % 2];
    }
    if (rules.other.positives) {
      bool hit = false;
#pragma unroll
      for (int block = first_j / kTermsBlock; block <= (first_j + kColumns - 1) / kTermsBlock; ++block) {
        if (block * kTermsBlock >= pairs.m) break;
        hit |= __ldg(rules.other.index_low + block) < first_i + 16 &&
               __ldg(rules.other.index_high + block) >= first_i;
      }
      if (hit) {
        for_elements<kTiles>(first_i, first_j, [&](int t, int e, int i, int j) {
          if (j < pairs.m && __ldg(rules.other_index + j) == i) c[4 * t + e] += other_weight(j);
        });
      }
    }
  }
}

#endif  // CL_KERNELS_DEVICE

}  // namespace cl_kernels::cuda
