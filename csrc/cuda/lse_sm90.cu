#include "lse_tile.h"
#include "tiles_sm90.h"

namespace cl_kernels::cuda {
namespace {

template <typename Loop, bool kColumnSums>
struct LseEpilogue {
  __device__ static constexpr bool unrolled() { return kColumnSums; }
  static constexpr int kTiles = Loop::kTiles;
  const LseParams& p;
  float factor, shift;
  float rows[2] = {};
  float columns[kColumnSums ? Loop::kStripTiles : 1][2 * kTiles] = {};

  __device__ __forceinline__ explicit LseEpilogue(const LseParams& p) : p(p) {
    const float scale = p.scale.value();
    factor = scale * kLog2e;
    shift = fixed_shift(*p.bounds, scale);
  }

  __device__ __forceinline__ void begin_rows(const Visit&, int) { rows[0] = rows[1] = 0.0f; }

  __device__ __forceinline__ void tile(float (&c)[4 * kTiles], const Visit&, int strip, int first_i,
                                       int first_j) {
    auto add = [&](int x, float e) {
      rows[x / 2 % 2] += e;
      if constexpr (kColumnSums) columns[strip][x / 4 * 2 + x % 2] += e;
    };
    // Most tiles are plain: their exponentials start at once.
    if (p.bias == nullptr && p.pairs.among == kAll && !on_edge(p.pairs, first_i, first_j, 16, kBlock)) {
#pragma unroll
      for (int x = 0; x < 4 * kTiles; ++x) add(x, exp2_fast(c[x] * factor - shift));
      return;
    }
    logits_of_tile<kTiles>(c, p.pairs, nullptr, p.bias, first_i, first_j, factor, shift);
#pragma unroll
    for (int x = 0; x < 4 * kTiles; ++x) add(x, exp2_fast(c[x]));
  }

  __device__ __forceinline__ void end_rows(const Visit& v, int first_i) {
    const Lane lane;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = sum_of_row(rows[h]);
      const int i = first_i + lane.row + 8 * h;
      // Only this thread adds here, one strip after the other: the order is fixed.
      if (lane.column == 0 && i < p.pairs.n)
        atomicAdd(p.row_sums + static_cast<int64_t>(v.group.column_group) * p.pairs.n + i, sum);
    }
  }

  // The two warpgroups add to the same sums, zeros before: of two terms the order does not matter.
  __device__ __forceinline__ void end_strip(const Visit& v, int warpgroup) {
    if constexpr (kColumnSums) {
      const Lane lane;
      const int thread = threadIdx.x % kWarpgroup, warp = thread / kWarp;
      float* of_warps = reinterpret_cast<float*>(dynamic_shared() + Loop::kShared) + warpgroup * 4 * kBlock;
#pragma unroll
      for (int strip = 0; strip < Loop::kStripTiles; ++strip) {
        if (strip >= v.width) continue;
        sync(warpgroup);
        float (&sums)[2 * kTiles] = columns[strip];
        exchange<kTiles>(sums);
#pragma unroll
        for (int x = 0; x < 4; ++x)
          of_warps[warp * kBlock + (4 * lane.row + x) / 2 * 8 + lane.column + x % 2] = sums[x];
#pragma unroll
        for (float& sum : sums) sum = 0.0f;
        sync(warpgroup);
        const int j = (v.column + strip) * kBlock + thread;
        float total = 0.0f;
#pragma unroll
        for (int from = 0; from < 4; ++from) total += of_warps[from * kBlock + thread];
        if (j < p.pairs.m)
          atomicAdd(p.column_sums + static_cast<int64_t>(v.group.row_group) * p.pairs.m + j, total);
      }
    }
  }

  // The eight lanes that hold a column share its sum: in each round a lane gives half of its columns away and
  // adds what it gets to the rest. Lane l ends with the columns 4 (l / 4).. of `sums`.
  template <int kRest>
  __device__ __forceinline__ static void exchange(float (&sums)[2 * kTiles]) {
    const bool high = (threadIdx.x & kRest) != 0;
#pragma unroll
    for (int x = 0; x < kRest; ++x) {
      const float first = sums[x], second = sums[x + kRest];
      sums[x] = (high ? second : first) + __shfl_xor_sync(0xffffffffu, high ? first : second, kRest);
    }
    if constexpr (kRest > 4) exchange<kRest / 2>(sums);
  }

  __device__ __forceinline__ static void sync(int warpgroup) {
    if (warpgroup == 0)
      named_barrier<1>(kWarpgroup);
    else
      named_barrier<2>(kWarpgroup);
  }
};

template <typename Loop, bool kColumnSums>
__global__ void __launch_bounds__(Loop::kThreads, 1)
    lse_kernel(const __grid_constant__ TensorMaps maps, const __grid_constant__ LseParams p) {
#ifdef CL_KERNELS_HOPPER
  Loop::template run<LseEpilogue<Loop, kColumnSums>>(maps, p.schedule, p.features.d, p);
#else
  __trap();
#endif
}

template <typename Loop>
constexpr size_t kSharedWithColumns = Loop::kShared + 8 * kBlock * sizeof(float);

}  // namespace

Schedule lse_schedule_sm90(const Features& features, Type type, bool mirrored) {
  return dispatch_hopper_loop(features, type, [&](auto loop) {
    using Loop = decltype(loop);
    return hopper_schedule<Loop>(lse_kernel<Loop, true>, features, mirrored, kSharedWithColumns<Loop>);
  });
}

void launch_lse_sm90(const LseParams& p, Type type, cudaStream_t stream) {
  dispatch_hopper_loop(p.features, type, [&](auto loop) {
    using Loop = decltype(loop);
    const TensorMaps maps = maps_of<Loop>(p.features);
    if (p.column_sums != nullptr)
      launch_hopper_loop<Loop>(lse_kernel<Loop, true>, p.schedule, kSharedWithColumns<Loop>, stream, maps, p);
    else
      launch_hopper_loop<Loop>(lse_kernel<Loop, false>, p.schedule, Loop::kShared, stream, maps, p);
  });
}

}  // namespace cl_kernels::cuda
