// Which pairs of owners (rows of a tile) and others (its columns) count, in the fragments that mma and wgmma
// leave in registers: a warp holds 16 rows and 8 kTiles columns; c[4 t + e] of lane l is at row l / 4 + 8 (e
// / 2) and column 8 t + 2 (l % 4) + e % 2.
#pragma once

#include "device.h"

namespace cl_kernels::cuda {

enum Among { kAll, kSame, kDifferent };
enum Positives { kNoPositives, kLabels, kIndex, kMask };

constexpr int kIdsPadding = 128;  // ids lie in whole tiles: -1 past the last

struct PairRules {
  int n, m;       // owners, others
  bool excludes;  // other i + offset is left out of owner i
  int offset;
  bool above;            // only others after the owner count: tiles that are mirrored
  Among among;           // others with any, equal or different labels
  const int* own_ids;    // [n, padded] of labels, or null
  const int* other_ids;  // [m, padded]
};

#ifdef CL_KERNELS_DEVICE

// The place of a thread's elements in its warp's 16 rows.
struct Lane {
  int row, column;  // of c[0]; c[2] is 8 rows below
  __device__ __forceinline__ Lane() : row(threadIdx.x % kWarp / 4), column(threadIdx.x % 4 * 2) {}
  // The thread's x-th column.
  __device__ __forceinline__ int column_of(int x) const { return x / 2 * 8 + column + x % 2; }
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

// A thread's 2 kTiles columns as bits: of bit 2 t + x the column is the first + 8 t + x. Here the bit of the
// one that is `distance` from the first, 0 where it is none of them.
template <int kTiles>
__device__ __forceinline__ uint32_t bit_of_column(int distance) {
  const bool own = distance >= 0 && distance < 8 * kTiles && distance % 8 < 2;
  return own ? 1u << (distance / 8 * 2 + distance % 8) : 0;
}

// Which of the thread's columns from `column` on count for row i.
template <int kTiles>
__device__ __forceinline__ uint32_t columns_that_count(const PairRules& rules, int i, int column) {
  static_assert(kTiles < 16, "a bit a column");
  if (i >= rules.n) return 0;
  // Those of the first `columns` columns.
  auto first = [](int columns) {
    const int inside = max(0, min(columns, 8 * kTiles));
    return (1u << (inside / 8 * 2 + min(inside % 8, 2))) - 1;
  };
  uint32_t bits = first(rules.m - column);
  if (rules.above) bits &= ~first(i + 1 - column);
  const int excluded = i + rules.offset - column;
  if (rules.excludes && excluded >= 0 && excluded < 8 * kTiles && excluded % 8 < 2)
    bits &= ~(1u << (excluded / 8 * 2 + excluded % 8));
  return bits;
}

// Elements of pairs that do not count become `value`, in a tile that is on_edge.
template <int kTiles>
__device__ __forceinline__ void replace_what_does_not_count(float (&c)[4 * kTiles], const PairRules& rules,
                                                            int first_i, int first_j, float value) {
  const Lane lane;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t bits =
        columns_that_count<kTiles>(rules, first_i + lane.row + 8 * h, first_j + lane.column);
#pragma unroll
    for (int x = 0; x < 2 * kTiles; ++x)
      if ((bits >> x & 1) == 0) c[4 * (x / 2) + 2 * h + x % 2] = value;
  }
}

// j % period as j goes up by 8, or by 1 from there.
struct Remainder {
  int period, step, now;
  __device__ __forceinline__ Remainder(int period, int j)
      : period(period), step(8 % period), now(j % period) {}
  __device__ __forceinline__ void advance() {
    now += step;
    if (now >= period) now -= period;
  }
  // Of element e of a fragment's tile.
  __device__ __forceinline__ int of(int e) const {
    return e % 2 == 0 ? now : now + 1 == period ? 0 : now + 1;
  }
};

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

// The ids of the thread's two rows; those of its columns are loaded where they are used.
struct RowIds {
  int of[2];
  __device__ __forceinline__ RowIds(const PairRules& rules, int first_i) : of{-1, -1} {
    if (rules.own_ids == nullptr) return;
    const int* ids = rules.own_ids + first_i + Lane().row;
    of[0] = __ldg(ids), of[1] = __ldg(ids + 8);
  }
};

// Elements of pairs whose ids are equal, or with `equal` false are not, become `value`. `column_ids` are
// those of the thread's columns.
template <int kTiles>
__device__ __forceinline__ void replace_by_ids(float (&c)[4 * kTiles], const int (&row_ids)[2],
                                               const int* column_ids, bool equal, float value) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int2 ids = load_pair<int2>(column_ids + 8 * t);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if ((row_ids[e / 2] == (e % 2 == 0 ? ids.x : ids.y)) == equal) c[4 * t + e] = value;
  }
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
// Of eight columns at once, by recursive halving: the lane of row r gets the sum of x[r].
__device__ __forceinline__ float sum_of_columns(float (&x)[8]) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool high = (Lane().row & half) != 0;
#pragma unroll
    for (int at = 0; at < half; ++at) {
      const float kept = high ? x[at + half] : x[at], given = high ? x[at] : x[at + half];
      x[at] = kept + __shfl_xor_sync(0xffffffffu, given, 4 * half);
    }
  }
  return x[0];
}

#endif  // CL_KERNELS_DEVICE

}  // namespace cl_kernels::cuda
