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

// Adds up the logits s of a tile's positives, base 2 and without bias: of its rows to `rows`, of its columns
// where tiles are mirrored to `columns` [8 kTiles], which belongs to the warp. Whole parts and rests are
// summed apart: with weights of 1 the former are exact, and the latter small.
template <int kTiles>
__device__ __forceinline__ void add_positives(const float (&s)[4 * kTiles], const PositiveTerms& p,
                                              const PairRules& pairs, int first_i, int first_j, float scale,
                                              double* rows, double* columns) {
  const Lane lane;
  const float base = reference(p.bounds, scale);
  struct Sum {
    float whole = 0.0f, rest = 0.0f;
    __device__ __forceinline__ void add(float weight, float logit, float base) {
      if (weight == 0.0f) return;
      constexpr float kRounds = 0x1.8p23f;
      const float near = (logit + kRounds) - kRounds;
      whole += weight * (near - base);
      rest += weight * (logit - near);
    }
    __device__ __forceinline__ bool any() const { return whole != 0.0f || rest != 0.0f; }
    __device__ __forceinline__ double total() const { return static_cast<double>(whole) + rest; }
  };
  // weight(e, i, j) of elements e of a tile of 16 x 8, at (i, j).
  auto sum_rows = [&](auto weight) {
    Sum sums[2];
    for_elements<kTiles>(first_i, first_j, [&](int t, int e, int i, int j) {
      sums[e / 2].add(weight(e, i, j), s[4 * t + e], base);
    });
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first_i + lane.row + 8 * h;
      const Sum sum{sum_of_row(sums[h].whole), sum_of_row(sums[h].rest)};
      // Only this thread adds here, one tile after the other: the order is fixed.
      if (lane.column == 0 && i < pairs.n && sum.any()) atomicAdd(rows + i, sum.total());
    }
  };
  auto sum_columns = [&](auto weight) {
#pragma unroll
    for (int x = 0; x < 2 * kTiles; ++x) {
      const int column = x / 2 * 8 + lane.column + x % 2;
      Sum sum;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int e = 2 * h + x % 2;
        sum.add(weight(e, first_i + lane.row + 8 * h, first_j + column), s[x / 2 * 4 + e], base);
      }
      if (!__any_sync(0xffffffffu, sum.any())) continue;
      sum = {sum_of_column(sum.whole), sum_of_column(sum.rest)};
      if (lane.row == 0) columns[column] += sum.total();
    }
  };

  if (p.kind == kLabels) {
    const RowIds ids(pairs, first_i);
    auto weight = [&](int e, int i, int j) {
      return ids.of[e / 2] == __ldg(pairs.other_ids + j) && counts(pairs, i, j) ? 1.0f : 0.0f;
    };
    sum_rows(weight);
    if (pairs.above) sum_columns(weight);
  } else if (p.kind == kMask) {
    auto weight_at = [&](int i, int j) {
      return __ldg(p.mask + (static_cast<int64_t>(i % p.mask_rows) * p.mask_columns + j % p.mask_columns));
    };
    sum_rows([&](int, int i, int j) { return counts(pairs, i, j) ? weight_at(i, j) : 0.0f; });
    if (pairs.above)
      sum_columns([&](int, int i, int j) { return counts(pairs, i, j) ? weight_at(j, i) : 0.0f; });
  } else if (p.kind == kIndex) {
    // A positive by index counts even where it is excluded; mirrored tiles have the diagonal in their rows.
    int index[2];
    bool found = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first_i + lane.row + 8 * h;
      index[h] = i < pairs.n ? __ldg(p.index + i) : -1;
      if (pairs.above && index[h] < i) index[h] = -1;
      found |= index[h] >= first_j && index[h] < first_j + 8 * kTiles;
    }
    if (__any_sync(0xffffffffu, found))
      sum_rows([&](int e, int, int j) { return index[e / 2] == j ? 1.0f : 0.0f; });
    if (!pairs.above) return;
    found = false;
#pragma unroll
    for (int j = first_j + static_cast<int>(threadIdx.x) % kWarp; j < first_j + 8 * kTiles; j += kWarp) {
      const int of_column = j < pairs.m ? __ldg(p.index + j) : -1;
      found |= of_column >= first_i && of_column < first_i + 16;
    }
    if (!__any_sync(0xffffffffu, found)) return;
    sum_columns(
        [&](int, int i, int j) { return j > i && j < pairs.m && __ldg(p.index + j) == i ? 1.0f : 0.0f; });
  }
}

}  // namespace cl_kernels::cuda
