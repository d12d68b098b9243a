// Which tiles a program visits. Blocks of kBlock rows and of kBlock columns are gathered in groups; a program
// takes one group of each and sums over it, so that partial sums take (groups) x (rows) floats.
//
// A cluster of blocks of threads takes a program together: of the same rows each its own group of columns,
// one beside the other.
#pragma once

#include <algorithm>
#include <cstdint>

#ifndef __host__
#define __host__
#define __device__
#define __forceinline__ inline
#endif

namespace cl_kernels::cuda {

constexpr int kBlock = 128;
constexpr int kMostGroups = 96;  // their square fills any device, and they times N floats stay small

// The blocks [row, row_end) x [column, column_end) of a program, and the groups that they are; none where a
// cluster is wider than what is left.
struct Group {
  int row, row_end, column, column_end, row_group, column_group;
};

struct Schedule {
  int row_blocks, column_blocks;
  int rows_each, columns_each;  // blocks of a group
  int row_groups, column_groups, column_clusters;
  bool mirrored;  // columns are the rows: only groups on and above the diagonal
  int cluster;    // blocks of threads; where mirrored, their groups of columns are as wide as one of rows
  int at_once;    // programs

  __host__ __device__ __forceinline__ int64_t programs() const {
    return mirrored ? static_cast<int64_t>(row_groups) * (row_groups + 1) / 2
                    : static_cast<int64_t>(row_groups) * column_clusters;
  }

  // Of the block of this rank in its cluster.
  __host__ __device__ __forceinline__ Group group(int program, int rank = 0) const {
    int g, h;
    if (mirrored) {
      // Each unordered pair once: (one, one + step) around the circle.
      const int one = program % row_groups, two = (one + program / row_groups) % row_groups;
      g = one < two ? one : two, h = one < two ? two : one;
    } else {
      g = program / column_clusters, h = program % column_clusters;
    }
    h = h * cluster + rank;
    const int row_end = (g + 1) * rows_each, column = h * columns_each, column_end = column + columns_each;
    return {g * rows_each,
            row_end < row_blocks ? row_end : row_blocks,
            column < column_blocks ? column : column_blocks,
            column_end < column_blocks ? column_end : column_blocks,
            g,
            h};
  }
};

// Groups for n rows and m columns on a device that runs this many programs at once: the size of groups that
// takes the fewest steps, of rounds of programs with a tile's time each to begin, and keeps partial sums few.
inline Schedule schedule(int n, int m, bool mirrored, int at_once, int cluster = 1) {
  auto ceil = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  const int row_blocks = ceil(n, kBlock), column_blocks = ceil(m, kBlock);
  // Rows that two blocks of a cluster share may lie in pairs of blocks.
  const int of_rows = mirrored ? cluster : std::min(cluster, 2);
  Schedule best = {};
  int64_t fewest = 0;
  for (int each = 1;; ++each) {
    Schedule s = {row_blocks,
                  column_blocks,
                  std::min(of_rows * each, row_blocks),
                  std::min(each, column_blocks),
                  0,
                  0,
                  0,
                  mirrored,
                  cluster,
                  at_once};
    s.row_groups = ceil(row_blocks, s.rows_each), s.column_groups = ceil(column_blocks, s.columns_each);
    s.column_clusters = ceil(s.column_groups, cluster);
    const bool last = s.row_groups == 1 && s.column_clusters == 1;
    const int64_t partial = static_cast<int64_t>(s.column_groups) * row_blocks +
                            static_cast<int64_t>(s.row_groups) * column_blocks;
    if (!last && partial > int64_t{kMostGroups} * (row_blocks + column_blocks)) continue;
    const int64_t rounds = ceil(s.programs(), at_once);
    const int64_t steps = rounds * (static_cast<int64_t>(s.rows_each) * s.columns_each + 1);
    if (fewest == 0 || steps < fewest) fewest = steps, best = s;
    if (last || s.programs() <= at_once) return best;
  }
}

// Into how many parts to cut the column blocks of programs that each own a block of rows: what takes the
// fewest steps, of rounds of programs with a tile's time each to begin and another to leave its part, and of
// equals the fewest parts, which are added up afterwards.
inline int splits(int row_blocks, int column_blocks, int processors) {
  constexpr int kOverhead = 2, kMostRounds = 4;
  auto ceil = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  const int most = std::min(column_blocks, std::max(1, kMostRounds * processors / std::max(row_blocks, 1)));
  int best = 1;
  int64_t fewest = 0;
  for (int wanted = 1; wanted <= most; ++wanted) {
    const int each = ceil(column_blocks, wanted), parts = ceil(column_blocks, each);
    const int64_t steps = int64_t{each + kOverhead} * ceil(int64_t{row_blocks} * parts, processors);
    if (fewest == 0 || steps < fewest) fewest = steps, best = parts;
  }
  return best;
}

}  // namespace cl_kernels::cuda
