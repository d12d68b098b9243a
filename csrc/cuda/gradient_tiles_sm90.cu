#include "fragment_store.h"
#include "gradient_tiles.h"
#include "tiles_sm90.h"

namespace cl_kernels::cuda {
namespace {

// Rows and columns of the loop are those of the chunk.
template <typename Loop>
struct GradientEpilogue {
  __device__ static constexpr bool unrolled() { return false; }
  static constexpr int kTiles = Loop::kTiles;
  using T = typename Loop::Element;
  const GradientTilesParams& p;
  const float factor, lift;
  OwnTerms own;

  __device__ __forceinline__ explicit GradientEpilogue(const GradientTilesParams& p)
      : p(p),
        factor(p.rules.scale.value() * kLog2e),
        lift(half_lift(p.rules.bound)),
        own(p.rules, p.first_row) {}

  __device__ __forceinline__ void begin_rows(const Visit&, int first_i) {
    own = OwnTerms(p.rules, p.first_row + first_i);
  }

  __device__ __forceinline__ void tile(float (&c)[4 * kTiles], const Visit&, int, int first_i, int first_j) {
    // In the blocks that share a level: the same code for both, which leaves the tile in memory.
    constexpr int kPart = kTermsBlock / 8, kSize = 4 * kPart;
    static_assert(kTiles == 2 * kPart);
    float sums[2];
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      float part[kSize];
#pragma unroll
      for (int x = 0; x < kSize; ++x) part[x] = half == 0 ? c[x] : c[kSize + x];
      const int j = first_j + half * kTermsBlock, column = p.first_column + j;
      gradient_of_tile<kPart, false>(part, p.rules, own, others_of(p.rules, column), p.first_row + first_i,
                                     column, factor, lift, sums);
      store_fragment<T, kPart>(part, static_cast<T*>(p.out), p.out_stride, p.last_row - p.first_row,
                               p.features.m - p.first_column, first_i, j);
    }
  }

  __device__ __forceinline__ void end_rows(const Visit&, int) {}
  __device__ __forceinline__ void end_strip(const Visit&, int) {}
};

template <typename Loop>
__global__ void __launch_bounds__(Loop::kThreads, 1)
    gradient_tiles_kernel(const __grid_constant__ TensorMaps maps, const __grid_constant__ Schedule schedule,
                          const __grid_constant__ GradientTilesParams p) {
#ifdef CL_KERNELS_HOPPER
  Loop::template run<GradientEpilogue<Loop>>(maps, schedule, p.features.d, p);
#else
  __trap();
#endif
}

}  // namespace

void launch_gradient_tiles_sm90(const GradientTilesParams& p, Type type, cudaStream_t stream) {
  Features chunk = p.features;
  chunk.x = static_cast<const unsigned char*>(chunk.x) + p.first_row * chunk.x_stride * 2;
  chunk.n = p.last_row - p.first_row;
  chunk.y = static_cast<const unsigned char*>(chunk.y) + p.first_column * chunk.y_stride * 2;
  chunk.m -= p.first_column;
  dispatch_hopper_loop(chunk, type, [&](auto loop) {
    using Loop = decltype(loop);
    const auto kernel = gradient_tiles_kernel<Loop>;
    const Schedule tiles = hopper_schedule<Loop>(kernel, chunk, false, Loop::kShared);
    launch_hopper_loop<Loop>(kernel, tiles, Loop::kShared, stream, maps_of<Loop>(chunk), tiles, p);
  });
}

}  // namespace cl_kernels::cuda
