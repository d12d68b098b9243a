// A tile of products becomes its exponentials 2^(S - c), and their sums.
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
    const bool wanted = pairs.among == kSame;
    const int* of_columns = pairs.other_ids + column;
    for_columns([&](int x, int t) {
      const int id = column + 8 * t + x < pairs.m ? __ldg(of_columns + (8 * t + x)) : -2;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if ((ids.of[h] == id) != wanted) c[4 * t + 2 * h + x] = negative_infinity();
    });
  }
  if (on_edge(pairs, first_i, first_j, 16, 8 * kTiles)) {
    for_elements<kTiles>(first_i, first_j, [&](int t, int e, int i, int j) {
      if (!counts(pairs, i, j)) c[4 * t + e] = negative_infinity();
    });
  }
}

}  // namespace cl_kernels::cuda
