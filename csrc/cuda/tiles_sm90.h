// Hopper's main loop (sm_90a): tiles of S = x y^T by wgmma, fed by the bulk copy engine.
//
// A block of threads is one warpgroup whose first thread copies and two that multiply, each 64 of a tile's
// 128 rows. It walks strips of columns, kStrip tiles wide, and along each strip the rows. The features go by
// in chunks of 64: those of a strip's columns stay in shared memory until its last row, those of a row until
// its last tile, all in rings whose slots are refilled one by one, so that the copies run ahead across tiles
// and strips alike. The warpgroups take turns to multiply: while the tensor cores work for one, the other is
// busy with its tile.
//
// A tile of 128 x 128 takes 8 d clocks and, of x, 256 d bytes: 32 a clock where a block of threads is alone
// with its strip of one tile. A strip of two tiles, where the features are 256 at most, halves what a row
// brings from L2. Up to 512 features two blocks of threads do, a cluster whose strips lie side by side: each
// copies half of a row for both. Of more features not even one tile's columns stay: streamed_sm90.h.
#pragma once

#include "launch.h"
#include "streamed_sm90.h"

// Kernels of this file's loops trap on other architectures.
#if defined(CL_KERNELS_WGMMA) || defined(CL_KERNELS_EMULATED)
#define CL_KERNELS_HOPPER 1
#endif

namespace cl_kernels::cuda {

template <typename T, int kStrip, int kCluster_>
struct HopperLoop {
  using Element = T;
  static constexpr int kCluster = kCluster_;
  using Together = Cluster<kCluster>;
  static constexpr int kStripTiles = kStrip;
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int kRows = kBlock / 2;  // of a warpgroup
  static constexpr int kBoxRows = kRows / kCluster;
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
  //   begin_rows(visit, first_i)             before the tiles of a warp's 16 rows in a strip
  //   tile(c, visit, strip, first_i, first_j)  each tile's fragment; strip is constant where unrolled()
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
        mbarrier_init(&b.empty_x[slot], kCluster * kWarpgroup / kWarp);
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
    Place<kSlotsX> x;
    Place<kSlotsY> y;
    auto copy_x = [&](int row, int warpgroup, int chunk) {
      Together::wait(&b.empty_x[x.slot], x.parity ^ 1);
      mbarrier_arrive_expect(&b.full_x[x.slot], kBytesX);
      Together::template load<kRows>(x_slot(x.slot), &maps.x, chunk * kBoxColumns,
                                     row * kBlock + warpgroup * kRows, &b.full_x[x.slot]);
      x.advance(1);
    };
    auto copy_y = [&](int column, int chunk) {
      mbarrier_wait(&b.empty_y[y.slot], y.parity ^ 1);
      mbarrier_arrive_expect(&b.full_y[y.slot], kBytesY);
      tma_load(y_slot(y.slot), &maps.y, chunk * kBoxColumns, column * kBlock, &b.full_y[y.slot]);
      y.advance(1);
    };
    // In the order of their use.
    for_visits<kStrip, 1, kCluster>(schedule, [&](const Visit& v) {
      const bool enters = v.row == v.group.row;
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk) {
        if (enters) copy_y(v.column, chunk);
        copy_x(v.row, 0, chunk);
      }
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk) copy_x(v.row, 1, chunk);
      for (int strip = 1; enters && strip < v.width; ++strip)
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) copy_y(v.column + strip, chunk);
    });
  }

  // An arrival of the warp, after what its threads did.
  __device__ __forceinline__ static void arrive(uint64_t* barrier) { Cluster<1>::arrive(barrier); }

  template <typename Epilogue, typename Params>
  __device__ __forceinline__ static void multiply(const Schedule& schedule, int chunks,
                                                  const Params& params) {
    Barriers& b = barriers();
    const int warpgroup = warpgroup_of_thread() - 1;
    const int warp_row = warpgroup * kRows + static_cast<int>(threadIdx.x) / kWarp % 4 * 16;
    Epilogue epilogue(params);
    Place<kSlotsX> x;
    Place<kSlotsY> y;
    x.advance(warpgroup * chunks);
    float c[4 * kTiles];       // one for all tiles, so that they share its registers
    int turn = warpgroup ^ 1;  // the first warpgroup has the first

    for_visits<kStrip, 1, kCluster>(schedule, [&](const Visit& v) {
      const int first_i = v.row * kBlock + warp_row;
      epilogue.begin_rows(v, first_i);
      const Place<kSlotsX> x_begin = x;
      Place<kSlotsY> y_at = y;
      const bool leaves_y = v.last_row;
#pragma unroll(Epilogue::unrolled() ? kStrip : 1)
      for (int strip = 0; strip < kStrip; ++strip) {
        if (strip >= v.width) continue;
        if (!v.has(strip)) {
#pragma unroll 1
          for (int chunk = 0; chunk < chunks; ++chunk) {
            if constexpr (kCluster > 1) {  // the others multiply these rows
              mbarrier_wait(&b.full_y[y_at.slot], y_at.parity);
              mbarrier_wait(&b.full_x[x.slot], x.parity);
              Together::arrive(&b.empty_x[x.slot]);
              x.advance(1);
            }
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
          if (leaves_x) Together::arrive(&b.empty_x[x_done.slot]);
          if (leaves_y) arrive(&b.empty_y[y_done.slot]);
        };
        mbarrier_wait(&b.turn[warpgroup], turn);
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
          x.advance(1);
          y_at.advance(1);
        }
        arrive(&b.turn[warpgroup ^ 1]);
        turn ^= 1;
        wgmma_wait<0>();
        wgmma_keep(c);
        leave();
        // Hidden from the compiler, which would otherwise compute the addresses of all of a strip's columns
        // ahead, and not have the registers to keep them in.
        int first[] = {first_i, (v.column + strip) * kBlock};
        wgmma_keep(first);
        epilogue.tile(c, v, strip, first[0], first[1]);
      }
      x.advance(chunks);  // the other warpgroup's
      if (leaves_y) y = y_at;
      if (kCluster == 1 || v.has(0)) epilogue.end_rows(v, first_i);
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

// f(loop) for the loop of these features.
template <typename F>
auto dispatch_hopper_loop(const Features& features, Type type, F f) {
  auto dispatch = [&](auto t) {
    using T = decltype(t);
    const int chunks = ceil_div(features.d, kBoxColumns);
    if (chunks <= 4) return f(HopperLoop<T, 2, 1>());
    if (chunks <= 8) return f(HopperLoop<T, 1, 2>());
    return f(StreamedLoop<T>());
  };
  return type == Type::kBf16 ? dispatch(bf16_t()) : dispatch(half_t());
}

template <typename Loop>
TensorMaps maps_of(const Features& features) {
  constexpr bool kBfloat16 = std::is_same_v<typename Loop::Element, bf16_t>;
  return {make_tensor_map(features.x, features.x_stride, features.n, features.d, Loop::kBoxRows, kBfloat16),
          make_tensor_map(features.y, features.y_stride, features.m, features.d, kBlock, kBfloat16)};
}

// For a kernel of this loop on this device.
template <typename Loop, typename Kernel>
Schedule hopper_schedule(Kernel kernel, const Features& features, bool mirrored, size_t shared_bytes) {
  const int at_once = Loop::kCluster == 1
                          ? multiprocessors_here()
                          : clusters_at_once(Loop::kCluster, kernel, Loop::kThreads, shared_bytes);
  return schedule(features.n, features.m, mirrored, at_once, Loop::kCluster);
}

// A kernel of this loop: a cluster for each program, or for as many as run at once.
template <typename Loop, typename... Parameters, typename... Arguments>
void launch_hopper_loop(void (*kernel)(Parameters...), const Schedule& schedule, size_t shared_bytes,
                        cudaStream_t stream, const Arguments&... arguments) {
  const int64_t clusters = std::min<int64_t>(schedule.programs(), schedule.at_once);
  launch_clusters(Loop::kCluster, kernel, dim3(static_cast<unsigned>(clusters * Loop::kCluster)),
                  Loop::kThreads, shared_bytes, stream, arguments...);
}

}  // namespace cl_kernels::cuda
