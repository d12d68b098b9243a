// Which pairs of owners (rows of a tile) and others (its columns) count, in the fragments that mma and wgmma
// leave in registers: a warp holds 16 rows and 8 kTiles columns; c[4 t + e] of lane l is at row l / 4 + 8 (e
// / 2) and column 8 t + 2 (l % 4) + e % 2.
#pragma once

#include "device.h"

namespace cl_kernels::cuda {

enum Among { kAll, kSame, kDifferent };
enum Positives { kNoPositives, kLabels, kIndex, kMask };

struct PairRules {
  int n, m;       // owners, others
  bool excludes;  // other i + offset is left out of owner i
  int offset;
  bool above;            // only others after the owner count: tiles that are mirrored
  Among among;           // others with any, equal or different labels
  const int* own_ids;    // [n] of labels, or null
  const int* other_ids;  // [m]
};

#ifdef CL_KERNELS_DEVICE

// The place of a thread's elements in its warp's 16 rows.
struct Lane {
  int row, column;  // of c[0]; c[2] is 8 rows below
  __device__ __forceinline__ Lane() : row(threadIdx.x % kWarp / 4), column(threadIdx.x % 4 * 2) {}
};

// Whether a tile of rows x columns holds pairs that do not count, labels apart.
__device__ __forceinline__ bool on_edge(const PairRules& rules, int first_i, int first_j, int rows,
                                        int columns) {
  bool edge = first_i + rows > rules.n || first_j + columns > rules.m;
  edge |= rules.above && first_j < first_i + rows;
  if (rules.excludes) {
    const int first = first_i + rules.offset;
    edge |= first < first_j + columns && first_j < first + rows;
  }
  return edge;
}

__device__ __forceinline__ bool counts(const PairRules& rules, int i, int j) {
  return i < rules.n && j < rules.m && !(rules.above && j <= i) && !(rules.excludes && j == i + rules.offset);
}

// f(t, e, i, j) for each element of a fragment whose warp starts at row first_i and column first_j.
template <int kTiles, typename F>
__device__ __forceinline__ void for_elements(int first_i, int first_j, F f) {
  const Lane lane;
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      f(t, e, first_i + lane.row + e / 2 * 8, first_j + 8 * t + lane.column + e % 2);
}

// The labels' ids of a fragment's pairs: those of the thread's two rows are kept, those of its columns loaded
// where they are used. An id is not negative; what lies outside has ids that equal no other.
struct RowIds {
  int of[2];
  __device__ __forceinline__ RowIds(const PairRules& rules, int first_i) {
    const Lane lane;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first_i + lane.row + 8 * h;
      of[h] = rules.own_ids != nullptr && i < rules.n ? __ldg(rules.own_ids + i) : -1;
    }
  }
};

__device__ __forceinline__ int column_id(const PairRules& rules, int j) {
  return j < rules.m ? __ldg(rules.other_ids + j) : -2;
}

// Sum over the lanes that hold a row of a fragment; over those that hold its columns.
__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float sum_of_column(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 4);
  x += __shfl_xor_sync(0xffffffffu, x, 8);
  return x + __shfl_xor_sync(0xffffffffu, x, 16);
}

#endif  // CL_KERNELS_DEVICE

}  // namespace cl_kernels::cuda
