// Hopper's main loop (sm_90a): tiles of S = x y^T by wgmma, fed by the bulk copy engine.
//
// A block of threads is one warpgroup whose first thread copies and two that multiply, each 64 of a tile's
// 128 rows. It walks strips of columns, kStrip tiles wide, and along each strip the rows. The features go by
// in chunks of 64: those of a strip's columns stay in shared memory until its last row, those of a row until
// its last tile, all in rings whose slots are refilled one by one, so that the copies run ahead across tiles
// and strips alike.
//
// The warpgroups take turns to multiply: while the tensor cores work for one, the other is busy with its
// tile. Where a strip does not fit, even one tile wide, the columns are copied for every tile (kStreamed),
// and the warpgroups share each chunk at once instead.
//
// A strip of two tiles, where the features are 256 at most, halves what a row brings from L2: a tile of 128 x
// 128 takes 8 d clocks and, of x, 256 d bytes, 32 a clock where it is alone in its strip and 16 where it is
// not.
#pragma once

#include "launch.h"
#include "lse.h"
#include "wgmma.h"

// Kernels of this file's loop trap on other architectures.
#if defined(CL_KERNELS_WGMMA) || defined(CL_KERNELS_EMULATED)
#define CL_KERNELS_HOPPER 1
#endif

namespace cl_kernels::cuda {

struct TensorMaps {
  TensorMap x, y;
};

// The meeting of a block of rows and a strip of columns.
struct Visit {
  Group group;
  int row, column, width;  // in blocks; the strip's width
  bool mirrored, last_row;

  // Tiles below the diagonal are left out.
  __device__ __forceinline__ bool has(int strip) const { return !mirrored || row <= column + strip; }
};

// f(visit) for the programs of a block of threads, in the order that all its warpgroups follow.
template <int kStrip, typename F>
__device__ __forceinline__ void for_visits(const Schedule& schedule, F f) {
  const int64_t programs = schedule.programs();
  for (int64_t program = blockIdx.x; program < programs; program += gridDim.x) {
    const Group group = schedule.group(static_cast<int>(program));
    for (int column = group.column; column < group.column_end; column += kStrip) {
      const int width = min(kStrip, group.column_end - column);
      const int row_end = schedule.mirrored ? min(group.row_end, column + width) : group.row_end;
      for (int row = group.row; row < row_end; ++row)
        f(Visit{group, row, column, width, schedule.mirrored, row + 1 == row_end});
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

template <typename T, int kStrip, bool kStreamed>
struct HopperLoop {
  using Element = T;
  static constexpr int kStripTiles = kStrip;
  static constexpr int kWarpgroup = 128;
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int kRows = kBlock / 2;   // of a warpgroup
  static constexpr int kTiles = kBlock / 8;  // of a fragment
  static constexpr int kSlotsX = 11, kSlotsY = 8;
  static constexpr int kBytesX = kRows * 128, kBytesY = kBlock * 128;

  struct Barriers {
    uint64_t full_x[kSlotsX], empty_x[kSlotsX], full_y[kSlotsY], empty_y[kSlotsY], turn[2];
  };
  static constexpr size_t kSlotBytes = kSlotsX * kBytesX + kSlotsY * kBytesY;
  static constexpr size_t kShared = kSlotBytes + round_up<size_t>(sizeof(Barriers), 128);

  __device__ __forceinline__ static Barriers& barriers() {
    return *reinterpret_cast<Barriers*>(dynamic_shared() + kSlotBytes);
  }
  __device__ __forceinline__ static unsigned char* y_slot(int slot) {
    return dynamic_shared() + slot * kBytesY;
  }
  __device__ __forceinline__ static unsigned char* x_slot(int slot) {
    return dynamic_shared() + kSlotsY * kBytesY + slot * kBytesX;
  }

  // Epilogue(params), in the threads that multiply, sees the tiles:
  //   begin_rows(visit, first_i)             before the products of a warp's 16 rows with a strip
  //   tile(c, visit, strip, first_i, first_j)  each tile's fragment; strip is constant where kUnrolled
  //   end_rows(visit, first_i)
  //   end_strip(visit, warpgroup)            after a strip's last row
  template <typename Epilogue, typename Params>
  __device__ __forceinline__ static void run(const TensorMaps& maps, const Schedule& schedule, int d,
                                             const Params& params) {
    const int chunks = ceil_div(d, kBoxColumns);
    if (threadIdx.x == 0) {
      Barriers& b = barriers();
      for (int slot = 0; slot < kSlotsX; ++slot) {
        mbarrier_init(&b.full_x[slot], 1);
        mbarrier_init(&b.empty_x[slot], kWarpgroup / kWarp);
      }
      for (int slot = 0; slot < kSlotsY; ++slot) {
        mbarrier_init(&b.full_y[slot], 1);
        mbarrier_init(&b.empty_y[slot], 2 * kWarpgroup / kWarp);
      }
      for (uint64_t& turn : b.turn) mbarrier_init(&turn, kWarpgroup / kWarp);
      mbarrier_init_fence();
      tma_prefetch(&maps.x);
      tma_prefetch(&maps.y);
    }
    __syncthreads();
    if (threadIdx.x < kWarpgroup) {
      registers_down<40>();
      if (threadIdx.x == 0) copy(maps, schedule, chunks);
    } else {
      registers_up<232>();
      multiply<Epilogue>(schedule, chunks, params);
    }
    __syncthreads();
  }

 private:
  __device__ __forceinline__ static void copy(const TensorMaps& maps, const Schedule& schedule, int chunks) {
    Barriers& b = barriers();
    Place<kSlotsX> x;
    Place<kSlotsY> y;
    auto copy_x = [&](int row, int warpgroup, int chunk) {
      mbarrier_wait(&b.empty_x[x.slot], x.parity ^ 1);
      mbarrier_arrive_expect(&b.full_x[x.slot], kBytesX);
      tma_load(x_slot(x.slot), &maps.x, chunk * kBoxColumns, row * kBlock + warpgroup * kRows,
               &b.full_x[x.slot]);
      x.advance(1);
    };
    auto copy_y = [&](int column, int chunk) {
      mbarrier_wait(&b.empty_y[y.slot], y.parity ^ 1);
      mbarrier_arrive_expect(&b.full_y[y.slot], kBytesY);
      tma_load(y_slot(y.slot), &maps.y, chunk * kBoxColumns, column * kBlock, &b.full_y[y.slot]);
      y.advance(1);
    };
    // In the order of their use.
    for_visits<kStrip>(schedule, [&](const Visit& v) {
      const bool enters = v.row == v.group.row;
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk) {
        if (kStreamed || enters) copy_y(v.column, chunk);
        copy_x(v.row, 0, chunk);
        if (kStreamed) copy_x(v.row, 1, chunk);
      }
      if constexpr (!kStreamed) {
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) copy_x(v.row, 1, chunk);
        for (int strip = 1; enters && strip < v.width; ++strip)
#pragma unroll 1
          for (int chunk = 0; chunk < chunks; ++chunk) copy_y(v.column + strip, chunk);
      }
    });
  }

  // An arrival of the warp, after what its threads did.
  __device__ __forceinline__ static void arrive(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) mbarrier_arrive(barrier);
  }

  template <typename Epilogue, typename Params>
  __device__ __forceinline__ static void multiply(const Schedule& schedule, int chunks,
                                                  const Params& params) {
    Barriers& b = barriers();
    const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
    const int warp_row = warpgroup * kRows + static_cast<int>(threadIdx.x) / kWarp % 4 * 16;
    Epilogue epilogue(params);
    Place<kSlotsX> x;
    Place<kSlotsY> y;
    x.advance(kStreamed ? warpgroup : warpgroup * chunks);
    float c[4 * kTiles];       // one for all tiles, so that they share its registers
    int turn = warpgroup ^ 1;  // the first warpgroup has the first

    for_visits<kStrip>(schedule, [&](const Visit& v) {
      const int first_i = v.row * kBlock + warp_row;
      epilogue.begin_rows(v, first_i);
      const Place<kSlotsX> x_begin = x;
      Place<kSlotsY> y_at = y;
      const bool leaves_y = kStreamed || v.last_row;
#pragma unroll(Epilogue::kUnrolled ? kStrip : 1)
      for (int strip = 0; strip < kStrip; ++strip) {
        if (strip >= v.width) continue;
        if (!v.has(strip)) {
#pragma unroll 1
          for (int chunk = 0; chunk < chunks; ++chunk) {
            if (leaves_y) arrive(&b.empty_y[y_at.slot]);
            y_at.advance(1);
          }
          continue;
        }
        const bool leaves_x = strip + 1 == v.width;
        x = x_begin;
        Place<kSlotsX> x_done = x;
        Place<kSlotsY> y_done = y_at;
        auto leave = [&] {
          if (leaves_x) arrive(&b.empty_x[x_done.slot]);
          if (leaves_y) arrive(&b.empty_y[y_done.slot]);
        };
        if (!kStreamed) mbarrier_wait(&b.turn[warpgroup], turn);
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) {
          mbarrier_wait(&b.full_y[y_at.slot], y_at.parity);
          mbarrier_wait(&b.full_x[x.slot], x.parity);
          const uint64_t left = descriptor(shared_address(x_slot(x.slot)), 0, 1024);
          const uint64_t right = descriptor(shared_address(y_slot(y_at.slot)), 0, 1024);
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < 4; ++step)  // 32 bytes each
            wgmma<T, kBlock>(c, left + 2 * step, right + 2 * step, step > 0 || chunk > 0);
          wgmma_commit();
          if (chunk > 0) {
            wgmma_wait<1>();
            leave();
            x_done = x, y_done = y_at;
          }
          x.advance(kStreamed ? 2 : 1);
          y_at.advance(1);
        }
        if (!kStreamed) {
          arrive(&b.turn[warpgroup ^ 1]);
          turn ^= 1;
        }
        wgmma_wait<0>();
        wgmma_keep(c);
        leave();
        // Hidden from the compiler, which would otherwise compute the addresses of all of a strip's columns
        // ahead, and not have the registers to keep them in.
        int first[] = {first_i, (v.column + strip) * kBlock};
        wgmma_keep(first);
        epilogue.tile(c, v, strip, first[0], first[1]);
      }
      if (!kStreamed) x.advance(chunks);  // the other warpgroup's
      if (leaves_y) y = y_at;
      epilogue.end_rows(v, first_i);
      if (v.last_row) epilogue.end_strip(v, warpgroup);
    });
  }
};

inline int multiprocessors_here() {
#ifdef CL_KERNELS_EMULATED
  return 2;
#else
  int device, count;
  check_status(cudaGetDevice(&device), "looking for the device");
  check_status(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
               "counting multiprocessors");
  return count;
#endif
}

// f(loop, maps) for the loop of these features.
template <typename F>
void dispatch_hopper_loop(const Features& features, Type type, F f) {
  const bool bf16 = type == Type::kBf16;
  const TensorMaps maps = {
      make_tensor_map(features.x, features.x_stride, features.n, features.d, kBlock / 2, bf16),
      make_tensor_map(features.y, features.y_stride, features.m, features.d, kBlock, bf16)};
  auto dispatch = [&](auto t) {
    using T = decltype(t);
    const int chunks = ceil_div(features.d, kBoxColumns);
    if (chunks <= 4) return f(HopperLoop<T, 2, false>(), maps);
    if (chunks <= 8) return f(HopperLoop<T, 1, false>(), maps);
    f(HopperLoop<T, 1, true>(), maps);
  };
  bf16 ? dispatch(bf16_t()) : dispatch(half_t());
}

// A block of threads for each multiprocessor, or for each program if they are fewer.
inline dim3 hopper_grid(const Schedule& schedule) {
  return dim3(static_cast<unsigned>(std::min<int64_t>(schedule.programs(), multiprocessors_here())));
}

}  // namespace cl_kernels::cuda
