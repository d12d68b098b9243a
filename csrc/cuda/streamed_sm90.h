// Hopper's loop over tiles of any width (sm_90a): both sides of S = x y^T go by in chunks of 64 features.
//
// A tile is 256 x 128, each warpgroup's half a block of rows, in two fragments of 64 rows. Four blocks of
// threads are a cluster: their tiles lie side by side, and each copies a quarter of the 256 rows for all of
// them. So a tile takes 16 d clocks and of the L2 128 d bytes of x and 256 d of y: 24 bytes a clock. What is
// copied for all may be overwritten when all have multiplied it.
#pragma once

#include "visits_sm90.h"

namespace cl_kernels::cuda {

template <typename T>
struct StreamedLoop {
  using Element = T;
  static constexpr int kCluster = 4;
  using Together = Cluster<kCluster>;
  static constexpr int kStripTiles = 1;
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int kTiles = kBlock / 8;  // of a fragment
  static constexpr int kFragmentRows = 64, kRows = 2 * kBlock;
  static constexpr int kBoxRows = kRows / kCluster;
  static constexpr int kSlots = 4;
  static constexpr int kBytesX = kRows * 128, kBytesY = kBlock * 128;

  struct Barriers {
    uint64_t full[kSlots], empty[kSlots];
  };
  static constexpr size_t kSlotBytes = kSlots * (kBytesX + kBytesY);
  static constexpr size_t kShared = kSlotBytes + round_up<size_t>(sizeof(Barriers), 128);

  __device__ __forceinline__ static Barriers& barriers() {
    return *reinterpret_cast<Barriers*>(dynamic_shared() + kSlotBytes);
  }
  __device__ __forceinline__ static unsigned char* x_slot(int slot) {
    return dynamic_shared() + slot * (kBytesX + kBytesY);
  }
  __device__ __forceinline__ static unsigned char* y_slot(int slot) { return x_slot(slot) + kBytesX; }

  // Epilogue as in tiles_sm90.h: a strip is one tile wide.
  template <typename Epilogue, typename Params>
  __device__ __forceinline__ static void run(const TensorMaps& maps, const Schedule& schedule, int d,
                                             const Params& params) {
    const int chunks = ceil_div(d, kBoxColumns);
    if (threadIdx.x == 0) {
      Barriers& b = barriers();
      for (int slot = 0; slot < kSlots; ++slot) {
        mbarrier_init(&b.full[slot], 1);
        mbarrier_init(&b.empty[slot], kCluster * 2 * kWarpgroup / kWarp);
      }
      mbarrier_init_fence();
      tma_prefetch(&maps.x);
      tma_prefetch(&maps.y);
    }
    Together::sync();
    if (threadIdx.x < kWarpgroup) {
      registers_down<40>();
      if (threadIdx.x == 0) copy(maps, schedule, chunks);
    } else {
      registers_up<232>();
      multiply<Epilogue>(schedule, chunks, params);
    }
    Together::sync();  // no block ends while another still arrives at its barriers
  }

 private:
  __device__ __forceinline__ static void copy(const TensorMaps& maps, const Schedule& schedule, int chunks) {
    Barriers& b = barriers();
    Place<kSlots> at;
    for_visits<1, 2, kCluster>(schedule, [&](const Visit& v) {
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk) {
        uint64_t* full = &b.full[at.slot];
        Together::wait(&b.empty[at.slot], at.parity ^ 1);
        mbarrier_arrive_expect(full, kBytesX + kBytesY);
        tma_load(y_slot(at.slot), &maps.y, chunk * kBoxColumns, v.column * kBlock, full);
        Together::template load<kRows>(x_slot(at.slot), &maps.x, chunk * kBoxColumns, v.row * kBlock, full);
        at.advance(1);
      }
    });
  }

  template <typename Epilogue, typename Params>
  __device__ __forceinline__ static void multiply(const Schedule& schedule, int chunks,
                                                  const Params& params) {
    Barriers& b = barriers();
    const int warpgroup = warpgroup_of_thread() - 1;
    const int warp_row = warpgroup * kBlock + static_cast<int>(threadIdx.x) / kWarp % 4 * 16;
    Epilogue epilogue(params);
    Place<kSlots> at;
    float c[2][4 * kTiles];

    for_visits<1, 2, kCluster>(schedule, [&](const Visit& v) {
      if (v.has(0, warpgroup)) {
        int done = 0;
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) {
          mbarrier_wait(&b.full[at.slot], at.parity);
          const uint64_t left =
              descriptor(shared_address(x_slot(at.slot) + warpgroup * (kBytesX / 2)), 0, 1024);
          const uint64_t right = descriptor(shared_address(y_slot(at.slot)), 0, 1024);
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < 4; ++step)  // 32 bytes each
#pragma unroll
            for (int part = 0; part < 2; ++part)
              wgmma<T, kBlock>(c[part], left + (part * kFragmentRows * 128 + 32 * step) / 16,
                               right + 2 * step, step > 0 || chunk > 0);
          wgmma_commit();
          if (chunk > 0) {
            wgmma_wait<1>();
            Together::arrive(&b.empty[done]);
          }
          done = at.slot;
          at.advance(1);
        }
        wgmma_wait<0>();
        wgmma_keep(c[0]);
        wgmma_keep(c[1]);
        Together::arrive(&b.empty[done]);
        // The same code for both fragments: twice the code would not stay in the instruction caches.
#pragma unroll 1
        for (int part = 0; part < 2; ++part) {
          const int first_i = v.row * kBlock + warp_row + part * kFragmentRows;
          epilogue.begin_rows(v, first_i);
          int first[] = {first_i, v.column * kBlock};
          wgmma_keep(first);  // as in tiles_sm90.h: addresses are not to be computed ahead
          epilogue.tile(c[0], v, 0, first[0], first[1]);
          epilogue.end_rows(v, first_i);
#pragma unroll
          for (int x = 0; x < 4 * kTiles; ++x) c[0][x] = c[1][x];
        }
      } else {
        // Others of the cluster, or the other warpgroup, multiply what goes by.
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) {
          mbarrier_wait(&b.full[at.slot], at.parity);
          Together::arrive(&b.empty[at.slot]);
          at.advance(1);
        }
      }
      if (v.last_row) epilogue.end_strip(v, warpgroup);
    });
  }
};

}  // namespace cl_kernels::cuda
