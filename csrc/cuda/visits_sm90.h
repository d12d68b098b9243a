// What Hopper's loops over tiles share (tiles_sm90.h, streamed_sm90.h): the order of the tiles, rings of
// slots in shared memory, and clusters of blocks of threads that bring each other the rows they have in
// common.
#pragma once

#include "lse.h"
#include "wgmma.h"

namespace cl_kernels::cuda {

struct TensorMaps {
  TensorMap x, y;
};

// The meeting of one or more blocks of rows and a strip of columns.
struct Visit {
  Group group;
  int row, column, width;  // in blocks; the strip's width
  bool mirrored, last_row;

  // Whether the block of rows `below` the first has a tile: those below the diagonal are left out.
  __device__ __forceinline__ bool has(int strip, int below = 0) const {
    const int i = row + below, j = column + strip;
    return i < group.row_end && j < group.column_end && (!mirrored || i <= j);
  }
};

// f(visit) for the programs of a block of threads, kRowBlocks of rows at a time, in the order that all its
// warpgroups follow. All blocks of a cluster have visits of the same rows, be it that one has no tile there.
template <int kStrip, int kRowBlocks, int kCluster, typename F>
__device__ __forceinline__ void for_visits(const Schedule& schedule, F f) {
  static_assert(kStrip == 1 || kCluster == 1);
  const int64_t programs = schedule.programs();
  const int rank = static_cast<int>(blockIdx.x) % kCluster;
  for (int64_t program = blockIdx.x / kCluster; program < programs; program += gridDim.x / kCluster) {
    const Group first = schedule.group(static_cast<int>(program));
    const Group group = kCluster == 1 ? first : schedule.group(static_cast<int>(program), rank);
    for (int at = 0; first.column + at < first.column_end; at += kStrip) {
      const int width = kStrip == 1 ? 1 : min(kStrip, group.column_end - group.column - at);
      const int last_column = first.column + (kCluster - 1) * schedule.columns_each + at + width - 1;
      const int row_end = schedule.mirrored ? min(group.row_end, last_column + 1) : group.row_end;
      for (int row = group.row; row < row_end; row += kRowBlocks)
        f(Visit{group, row, group.column + at, width, schedule.mirrored, row + kRowBlocks >= row_end});
    }
  }
}

// A place in a ring of slots, and the parity of the phase that fills it.
template <int kSlots>
struct Place {
  int slot = 0, parity = 0;
  __device__ __forceinline__ void advance(int by) {  // by at most kSlots
    slot += by;
    if (slot >= kSlots) slot -= kSlots, parity ^= 1;
  }
};

// What a block of threads has to do with the others of its cluster; with kSize 1 it is alone.
template <int kSize>
struct Cluster {
  __device__ __forceinline__ static void sync() {
    if constexpr (kSize == 1)
      __syncthreads();
    else
      cluster_sync();
  }
  // An arrival of the warp, after what its threads did, at the barrier of each block.
  __device__ __forceinline__ static void arrive(uint64_t* barrier) {
    __syncwarp();
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if constexpr (kSize == 1) {
      if (lane == 0) mbarrier_arrive(barrier);
    } else {
      if (lane < kSize) mbarrier_arrive_at(barrier, lane);
    }
  }
  // A wait for arrivals of all blocks.
  __device__ __forceinline__ static void wait(uint64_t* barrier, int parity) {
    if constexpr (kSize == 1)
      mbarrier_wait(barrier, parity);
    else
      mbarrier_wait_cluster(barrier, parity);
  }
  // kRows rows from `row` on to `to` in each block, of which this one copies a part for all, `map`'s box; the
  // bytes of all parts arrive at the barrier.
  template <int kRows>
  __device__ __forceinline__ static void load(unsigned char* to, const TensorMap* map, int column, int row,
                                              uint64_t* barrier) {
    if constexpr (kSize == 1) {
      tma_load(to, map, column, row, barrier);
    } else {
      const int first = static_cast<int>(blockIdx.x) % kSize * (kRows / kSize);
      tma_load_multicast(to + first * 128, map, column, row + first, barrier, (1 << kSize) - 1);
    }
  }
};

}  // namespace cl_kernels::cuda
