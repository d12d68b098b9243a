#include "similarity.h"

#include "fragment_store.h"
#include "tiles.h"

namespace cl_kernels::cuda {
namespace {

template <typename Loop>
__global__ void __launch_bounds__(Loop::kThreads, 2) similarity_kernel(const SimilarityParams p) {
  using T = typename Loop::Element;
  const int row = blockIdx.y, column = blockIdx.x * kColumnBlocksEach,
            column_blocks = ceil_div(p.features.m, kBlock);
  const float scale = p.scale.value();
  const int n = p.features.n, m = p.features.m;
  auto on_tile = [&](float (&c)[4 * Loop::kTiles], int first_i, int first_j) {
    if (p.x_rnorm != nullptr) {
      for_elements<Loop::kTiles>(first_i, first_j, [&](int t, int e, int i, int j) {
        c[4 * t + e] *= i < n && j < m ? __ldg(p.x_rnorm + i) * __ldg(p.y_rnorm + j) : 0.0f;
      });
    }
#pragma unroll
    for (float& x : c) x *= scale;
    store_fragment<T, Loop::kTiles>(c, static_cast<T*>(p.out), p.out_stride, n, m, first_i, first_j);
  };
  Loop::run(p.features, {row, row + 1, column, min(column + kColumnBlocksEach, column_blocks), 0, 0}, false,
            on_tile, [](int) {});
}

}  // namespace

void launch_similarity(const SimilarityParams& p, Type type, Precision precision, cudaStream_t stream) {
  const dim3 grid(ceil_div(ceil_div(p.features.m, kBlock), kColumnBlocksEach),
                  ceil_div(p.features.n, kBlock));
  dispatch_loop(type, precision, [&](auto loop) {
    using Loop = decltype(loop);
    launch(similarity_kernel<Loop>, grid, Loop::kThreads, Loop::kShared, stream, p);
  });
}

}  // namespace cl_kernels::cuda
