// A tile of products becomes its logits, and what sums of them need.
#pragma once

#include "lse.h"
#include "ptx.h"

namespace cl_kernels::cuda {

// c, products of rows first_i.. and columns first_j.., becomes logits in base 2 less `shift`; -inf where a
// pair does not count.
template <int kTiles>
__device__ __forceinline__ void logits_of_tile(float (&c)[4 * kTiles], const PairRules& pairs,
                                               const float* own_bias, const float* other_bias, int first_i,
                                               int first_j, float factor, float shift) {
  const Lane lane;
  const int column = first_j + lane.column;
  // f(x, t) for the columns `column` + 8 t + x of the thread. Addresses are one and an offset, not one a
  // column.
  auto for_columns = [&](auto f) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int x = 0; x < 2; ++x) f(x, t);
  };
  if (other_bias != nullptr || own_bias != nullptr) {
    const float* of_columns = other_bias + column;
    for_columns([&](int x, int t) {
      const bool given = other_bias != nullptr && column + 8 * t + x < pairs.m;
      const float of_column = given ? __ldg(of_columns + (8 * t + x)) : 0.0f;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = first_i + lane.row + 8 * h;
        const float bias = own_bias != nullptr && i < pairs.n ? __ldg(own_bias + i) : 0.0f;
        float& s = c[4 * t + 2 * h + x];
        s = s * factor + ((bias + of_column) * kLog2e - shift);
      }
    });
  } else {
#pragma unroll
    for (float& x : c) x = x * factor - shift;
  }
  if (pairs.among != kAll) {
    const RowIds ids(pairs, first_i);
    replace_by_ids<kTiles>(c, ids.of, pairs.other_ids + column, pairs.among == kDifferent,
                           negative_infinity());
  }
  if (on_edge(pairs, first_i, first_j, 16, 8 * kTiles)) {
    // In parts whose columns' bits fill a register.
    constexpr int kPart = kTiles < 8 ? kTiles : 8;
#pragma unroll
    for (int t = 0; t < kTiles; t += kPart)
      replace_what_does_not_count<kPart>(*reinterpret_cast<float (*)[4 * kPart]>(&c[4 * t]), pairs, first_i,
                                         first_j + 8 * t, negative_infinity());
  }
}

// A thread's pairs that are positives, as bits of its columns, of each of its two rows: those that count for
// the rows, and of mirrored tiles those that count for the columns, as rows of their own.
struct PositiveBits {
  uint32_t of_rows[2], of_columns[2];
};

template <int kTiles>
__device__ __forceinline__ PositiveBits positives_of_tile(const PositiveTerms& p, const PairRules& pairs,
                                                          int first_i, int first_j, bool mirrored) {
  const int row = first_i + Lane().row, column = first_j + Lane().column;
  PositiveBits bits = {};
  if (p.kind == kIndex) {
    // A positive by index counts even where it is excluded; mirrored tiles have the diagonal in their rows.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = row + 8 * h, index = i < pairs.n ? __ldg(p.index + i) : -1;
      if (!mirrored || index >= i) bits.of_rows[h] = bit_of_column<kTiles>(index - column);
    }
    if (!mirrored) return bits;
#pragma unroll
    for (int x = 0; x < 2 * kTiles; ++x) {
      const int j = column + x / 2 * 8 + x % 2, index = j < pairs.m ? __ldg(p.index + j) : -1;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (index == row + 8 * h && j > index) bits.of_columns[h] |= 1u << x;
    }
    return bits;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) bits.of_rows[h] = columns_that_count<kTiles>(pairs, row + 8 * h, column);
  if (p.kind == kLabels) {
    const RowIds ids(pairs, first_i);
    uint32_t equal[2] = {};
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int2 id = load_pair<int2>(pairs.other_ids + column + 8 * t);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (ids.of[h] == id.x) equal[h] |= 1u << 2 * t;
        if (ids.of[h] == id.y) equal[h] |= 2u << 2 * t;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) bits.of_rows[h] &= equal[h];
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) bits.of_columns[h] = mirrored ? bits.of_rows[h] : 0;
  return bits;
}

// A sum of logits in base 2, less `base`. Whole parts and rests are summed apart: with weights of 1 the
// former are exact, and the latter small.
struct LogitSum {
  float whole = 0.0f, rest = 0.0f;
  __device__ __forceinline__ void add(float weight, float logit, float base) {
    constexpr float kRounds = 0x1.8p23f;
    const float near = (logit + kRounds) - kRounds;
    whole += weight * (near - base);
    rest += weight * (logit - near);
  }
  __device__ __forceinline__ bool any() const { return whole != 0.0f || rest != 0.0f; }
  __device__ __forceinline__ double total() const { return static_cast<double>(whole) + rest; }
};

// Where the logits of positives are added up, less `base`.
struct PositiveSums {
  float base;
  double* rows;     // [n]
  double* columns;  // the warp's own, of a tile's columns where tiles are mirrored; or null
};

// Adds up the logits s of a tile's positives, base 2 and without bias. One loop serves every kind of
// positives, which bits tell, so that the code of a tile stays small.
template <int kTiles>
__device__ __forceinline__ void add_positives(const float (&s)[4 * kTiles], const PositiveTerms& p,
                                              const PairRules& pairs, int first_i, int first_j,
                                              const PositiveSums& out) {
  const Lane lane;
  const int i = first_i + lane.row, j = first_j + lane.column;
  const PositiveBits bits = positives_of_tile<kTiles>(p, pairs, first_i, first_j, out.columns != nullptr);
  const bool masked = p.kind == kMask;
  auto add = [&](LogitSum& sum, bool counts, const float* weight, float logit) {
    float by_mask = 1.0f;
    if (counts && masked) by_mask = __ldg(weight);
    if (counts && by_mask != 0.0f) sum.add(by_mask, logit, out.base);
  };

  if (__any_sync(0xffffffffu, (bits.of_rows[0] | bits.of_rows[1]) != 0)) {
    const float* weights[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) weights[h] = p.mask + int64_t{(i + 8 * h) % p.mask_rows} * p.mask_columns;
    LogitSum sums[2];
    Remainder column(p.mask_columns, j);
#pragma unroll
    for (int t = 0; t < kTiles; ++t, column.advance())
#pragma unroll
      for (int e = 0; e < 4; ++e)
        add(sums[e / 2], bits.of_rows[e / 2] >> (2 * t + e % 2) & 1, weights[e / 2] + column.of(e),
            s[4 * t + e]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const LogitSum sum{sum_of_row(sums[h].whole), sum_of_row(sums[h].rest)};
      // Only this thread adds here, one tile after the other: the order is fixed.
      if (lane.column == 0 && i + 8 * h < pairs.n && sum.any()) atomicAdd(out.rows + i + 8 * h, sum.total());
    }
  }

  if (out.columns != nullptr && __any_sync(0xffffffffu, (bits.of_columns[0] | bits.of_columns[1]) != 0)) {
    const float* weights[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) weights[h] = p.mask + (i + 8 * h) % p.mask_columns;
    Remainder row(p.mask_rows, j);
#pragma unroll
    for (int first = 0; first < 2 * kTiles; first += 8) {
      float whole[8], rest[8];
#pragma unroll
      for (int x = first; x < first + 8; ++x) {
        const int64_t offset = int64_t{row.of(x)} * p.mask_columns;
        if (x % 2 == 1) row.advance();
        LogitSum sum;
#pragma unroll
        for (int h = 0; h < 2; ++h)
          add(sum, bits.of_columns[h] >> x & 1, weights[h] + offset, s[x / 2 * 4 + 2 * h + x % 2]);
        whole[x - first] = sum.whole, rest[x - first] = sum.rest;
      }
      const LogitSum sum{sum_of_columns(whole), sum_of_columns(rest)};
      out.columns[lane.column_of(first + lane.row)] += sum.total();
    }
  }
}

}  // namespace cl_kernels::cuda
