#include "fragment_store.h"
#include "similarity.h"
#include "tiles_sm90.h"

namespace cl_kernels::cuda {
namespace {

template <typename Loop>
struct SimilarityEpilogue {
  __device__ static constexpr bool unrolled() { return false; }
  static constexpr int kTiles = Loop::kTiles;
  using T = typename Loop::Element;
  const SimilarityParams& p;
  const float scale;
  float of_row[2];

  __device__ __forceinline__ explicit SimilarityEpilogue(const SimilarityParams& p)
      : p(p), scale(p.scale.value()) {}

  __device__ __forceinline__ void begin_rows(const Visit&, int first_i) {
    const Lane lane;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first_i + lane.row + 8 * h;
      of_row[h] = scale * (p.x_rnorm != nullptr && i < p.features.n ? __ldg(p.x_rnorm + i) : 1.0f);
    }
  }

  __device__ __forceinline__ void tile(float (&c)[4 * kTiles], const Visit&, int, int first_i, int first_j) {
#pragma unroll
    for (int x = 0; x < 4 * kTiles; ++x) c[x] *= of_row[x / 2 % 2];
    if (p.y_rnorm != nullptr) {
      for_elements<kTiles>(first_i, first_j, [&](int t, int e, int, int j) {
        if (j < p.features.m) c[4 * t + e] *= __ldg(p.y_rnorm + j);
      });
    }
    store_fragment<T, kTiles>(c, static_cast<T*>(p.out), p.out_stride, p.features.n, p.features.m, first_i,
                              first_j);
  }

  __device__ __forceinline__ void end_rows(const Visit&, int) {}
  __device__ __forceinline__ void end_strip(const Visit&, int) {}
};

template <typename Loop>
__global__ void __launch_bounds__(Loop::kThreads, 1)
    similarity_kernel(const __grid_constant__ TensorMaps maps, const __grid_constant__ Schedule schedule,
                      const __grid_constant__ SimilarityParams p) {
#ifdef CL_KERNELS_HOPPER
  Loop::template run<SimilarityEpilogue<Loop>>(maps, schedule, p.features.d, p);
#else
  __trap();
#endif
}

}  // namespace

void launch_similarity_sm90(const SimilarityParams& p, Type type, cudaStream_t stream) {
  dispatch_hopper_loop(p.features, type, [&](auto loop) {
    using Loop = decltype(loop);
    const auto kernel = similarity_kernel<Loop>;
    const Schedule tiles = hopper_schedule<Loop>(kernel, p.features, false, Loop::kShared);
    launch_hopper_loop<Loop>(kernel, tiles, Loop::kShared, stream, maps_of<Loop>(p.features), tiles, p);
  });
}

}  // namespace cl_kernels::cuda
