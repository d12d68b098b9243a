// csrc/cuda/schedule.h for tests/cuda/test_schedule.py, without CUDA's headers.
#include "schedule.h"

using cl_kernels::cuda::Group;
using cl_kernels::cuda::Schedule;

// schedule: row_blocks, column_blocks, row_groups, column_groups, programs.
extern "C" void make_schedule(int n, int m, int mirrored, int at_once, int cluster, int64_t* schedule) {
  const Schedule s = cl_kernels::cuda::schedule(n, m, mirrored != 0, at_once, cluster);
  const int64_t values[] = {s.row_blocks, s.column_blocks, s.row_groups, s.column_groups, s.programs()};
  for (int i = 0; i < 5; ++i) schedule[i] = values[i];
}

extern "C" int make_splits(int row_blocks, int column_blocks, int processors) {
  return cl_kernels::cuda::splits(row_blocks, column_blocks, processors);
}

// groups [programs, cluster, 6]: first and last row block, first and last column block, groups of rows and of
// columns.
extern "C" void make_groups(int n, int m, int mirrored, int at_once, int cluster, int* groups) {
  const Schedule s = cl_kernels::cuda::schedule(n, m, mirrored != 0, at_once, cluster);
  for (int64_t program = 0; program < s.programs(); ++program)
    for (int rank = 0; rank < cluster; ++rank) {
      const Group g = s.group(static_cast<int>(program), rank);
      for (const int value : {g.row, g.row_end, g.column, g.column_end, g.row_group, g.column_group})
        *groups++ = value;
    }
}
