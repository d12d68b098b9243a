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

// What the gradient takes of kTermsBlock rows (gradient_terms.cu). Zeros past the last row and where nothing
// is given, -1 for ids and indices: a tile reads its columns without asking, and a bulk copy takes them
// whole.
struct alignas(16) TermsBlock {
  float level[kTermsBlock];   // coef at the block's highest shift: coef 2^(high - shift)
  float weight[kTermsBlock];  // of the row's positives
  int id[kTermsBlock];        // of the row's label
  int index[kTermsBlock];     // the positive of the row, -1: none
  float shift[kTermsBlock];
  float coef[kTermsBlock];
  float bias[kTermsBlock];  // natural units
  float high;               // the highest shift; kNothing without any
  float low;                // the lowest shift whose coefficient counts; -kNothing without any
  int index_low;            // the first and the last positive's index; INT_MAX and -1 without any
  int index_high;
};

// The terms of owners or others.
struct Terms {
  const TermsBlock* blocks;  // up to a multiple of kTermsPadding rows
  bool softmax;              // whether any coefficient counts
  bool positives;            // whether any weight counts
};

struct GradientRules {
  PairRules pairs;
  Scalar scale;
  Terms own, other;
  bool biased;
  Positives positives;
  const float* mask;  // weight of owner i and other j at mask[i % rows, j % columns]
  int mask_rows, mask_columns;
  int mask_row_stride, mask_column_stride;
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
  int id[2], index[2];
  __device__ __forceinline__ OwnTerms(const GradientRules& rules, int first_i) : low(-kNothing) {
    const Lane lane;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first_i + lane.row + 8 * h, at = i % kTermsBlock;
      const TermsBlock& block = rules.own.blocks[i / kTermsBlock];
      // Without a coefficient no exponential may overflow: infinity times zero.
      shift[h] = rules.own.softmax ? block.shift[at] : -kNothing;
      coef[h] = rules.own.softmax ? block.coef[at] : 0.0f;
      weight[h] = rules.own.positives ? block.weight[at] : 0.0f;
      id[h] = block.id[at];
      index[h] = rules.own.positives ? block.index[at] : -1;
      if (coef[h] != 0.0f) low = fminf(low, shift[h]);
    }
  }
};

// The terms of the others in a tile that starts at first_j.
__device__ __forceinline__ const TermsBlock& others_of(const GradientRules& rules, int first_j) {
  return rules.other.blocks[first_j / kTermsBlock];
}

// What element e of a fragment's tile takes of its two columns.
__device__ __forceinline__ float of_pair(const float2& pair, int e) {
  return e % 2 == 0 ? pair.x : pair.y;
}
__device__ __forceinline__ int of_pair(const int2& pair, int e) {
  return e % 2 == 0 ? pair.x : pair.y;
}

// c, products times `factor`, becomes the softmax part of G times 2^lift. `at` is the thread's first column
// in the others' block.
//
// No logit that counts exceeds `top`, the highest shift of the others' block, so where no shift of either
// side lies further below it than 2^60, one exponential 2^(S - top) serves both: what underflows then is
// below 2^-66 of any row. Where the others have no softmax an owner's shift takes the place of `top`.
template <int kTiles>
__device__ __forceinline__ void softmax_of_tile(float (&c)[4 * kTiles], const OwnTerms& own,
                                                const TermsBlock& others, bool others_count, int at,
                                                float factor, float lift) {
  const float top = others.high;
  if (!others_count || top - fminf(own.low, others.low) <= 60.0f) {
    float base[2], own_level[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float reference = others_count ? top : own.shift[h];
      base[h] = lift - reference;
      own_level[h] = own.coef[h] * exp2_fast(fminf(reference - own.shift[h], 60.0f));
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const float2 level = load_pair<float2>(others.level + at + 8 * t);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        c[4 * t + e] =
            exp2_fast(c[4 * t + e] * factor + base[e / 2]) * (own_level[e / 2] + of_pair(level, e));
    }
  } else {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const float2 shift = load_pair<float2>(others.shift + at + 8 * t);
      const float2 coef = load_pair<float2>(others.coef + at + 8 * t);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float s = c[4 * t + e] * factor + lift;
        c[4 * t + e] = exp2_fast(s - own.shift[e / 2]) * own.coef[e / 2] +
                       exp2_fast(s - of_pair(shift, e)) * of_pair(coef, e);
      }
    }
  }
}

// Adds the weights of positives by mask: an owner's times the mask at (i, j), another's times that at (j, i).
template <int kTiles>
__device__ __forceinline__ void add_masked(float (&c)[4 * kTiles], const GradientRules& rules,
                                           const OwnTerms& own, const TermsBlock& others, int at, int first_i,
                                           int first_j, float unit) {
  const Lane lane;
  const int i = first_i + lane.row, j = first_j + lane.column;
  if (rules.own.positives) {
    const float* rows[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      rows[h] = rules.mask + int64_t{(i + 8 * h) % rules.mask_rows} * rules.mask_row_stride;
    Remainder column(rules.mask_columns, j);
#pragma unroll
    for (int t = 0; t < kTiles; ++t, column.advance())
#pragma unroll
      for (int e = 0; e < 4; ++e)
        c[4 * t + e] +=
            own.weight[e / 2] * unit * __ldg(rows[e / 2] + int64_t{column.of(e)} * rules.mask_column_stride);
  }
  if (rules.other.positives) {
    const float* columns[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      columns[h] = rules.mask + int64_t{(i + 8 * h) % rules.mask_columns} * rules.mask_column_stride;
    Remainder row(rules.mask_rows, j);
#pragma unroll
    for (int t = 0; t < kTiles; ++t, row.advance()) {
      const float2 weight = load_pair<float2>(others.weight + at + 8 * t);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        c[4 * t + e] +=
            of_pair(weight, e) * unit * __ldg(columns[e / 2] + int64_t{row.of(e)} * rules.mask_row_stride);
    }
  }
}

// Adds the weights of positives by index, in the few tiles that have any.
template <int kTiles>
__device__ __forceinline__ void add_indexed(float (&c)[4 * kTiles], const GradientRules& rules,
                                            const OwnTerms& own, const TermsBlock& others, int at,
                                            int first_i, int first_j, float unit) {
  const int column = first_j + Lane().column;
  bool hit = false;
#pragma unroll
  for (int h = 0; h < 2; ++h) hit |= own.index[h] >= first_j && own.index[h] < first_j + 8 * kTiles;
  if (__any_sync(0xffffffffu, hit)) {
#pragma unroll
    for (int x = 0; x < 4 * kTiles; ++x)
      if (own.index[x / 2 % 2] == column + x / 4 * 8 + x % 2) c[x] += own.weight[x / 2 % 2] * unit;
  }
  if (!rules.other.positives || others.index_low >= first_i + 16 || others.index_high < first_i) return;
  const int i = first_i + Lane().row;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int2 index = load_pair<int2>(others.index + at + 8 * t);
    const float2 weight = load_pair<float2>(others.weight + at + 8 * t);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (of_pair(index, e) == i + e / 2 * 8) c[4 * t + e] += of_pair(weight, e) * unit;
  }
}

// c, products of owners first_i.. and others first_j.., becomes G times 2^lift. With kSums it is the softmax
// part alone, of which sums[h] gains that of the thread's two rows. `others` are the terms of the block that
// first_j lies in. Weights are added first and taken back where a pair does not count: so there is nothing to
// ask of an element but in tiles on an edge.
template <int kTiles, bool kSums>
__device__ __forceinline__ void gradient_of_tile(float (&c)[4 * kTiles], const GradientRules& rules,
                                                 const OwnTerms& own, const TermsBlock& others, int first_i,
                                                 int first_j, float factor, float lift, float (&sums)[2]) {
  constexpr int kColumns = 8 * kTiles;
  static_assert(kTermsBlock % kColumns == 0, "a level refers to the highest shift of its own block");
  const PairRules& pairs = rules.pairs;
  const int at = (kColumns == kTermsBlock ? 0 : first_j % kTermsBlock) + Lane().column;

  if (rules.biased) {
    const int row = first_i % kTermsBlock + Lane().row;
    const float* of_rows = rules.own.blocks[first_i / kTermsBlock].bias + row;
    const float own_bias[2] = {of_rows[0], of_rows[8]};
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const float2 bias = load_pair<float2>(others.bias + at + 8 * t);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        c[4 * t + e] = c[4 * t + e] * factor + (own_bias[e / 2] + of_pair(bias, e)) * kLog2e;
    }
    factor = 1.0f;
  }
  softmax_of_tile<kTiles>(c, own, others, rules.other.softmax, at, factor, lift);
  if (pairs.among != kAll) replace_by_ids<kTiles>(c, own.id, others.id + at, pairs.among == kDifferent, 0.0f);

  const float unit = exp2_fast(lift);
  if (!kSums && rules.positives == kLabels) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int2 id = load_pair<int2>(others.id + at + 8 * t);
      const float2 weight = load_pair<float2>(others.weight + at + 8 * t);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float of_both = own.weight[e / 2] + of_pair(weight, e);
        if (own.id[e / 2] == of_pair(id, e)) c[4 * t + e] += of_both * unit;
      }
    }
  }
  if (!kSums && rules.positives == kMask)
    add_masked<kTiles>(c, rules, own, others, at, first_i, first_j, unit);
  if (on_edge(pairs, first_i, first_j, 16, kColumns))
    replace_what_does_not_count<kTiles>(c, pairs, first_i, first_j, 0.0f);
  // A positive by index counts even where it is excluded.
  if (!kSums && rules.positives == kIndex)
    add_indexed<kTiles>(c, rules, own, others, at, first_i, first_j, unit);
  if constexpr (kSums) {
#pragma unroll
    for (int x = 0; x < 4 * kTiles; ++x) sums[x / 2 % 2] += c[x];
  }
}

#endif  // CL_KERNELS_DEVICE

}  // namespace cl_kernels::cuda
