#include "gradient_tiles.h"

#include "fragment_store.h"
#include "tiles.h"

namespace cl_kernels::cuda {
namespace {

template <typename Loop>
__global__ void __launch_bounds__(Loop::kThreads, 2) gradient_tiles_kernel(const GradientTilesParams p) {
  const int row = p.first_row / kBlock + static_cast<int>(blockIdx.y),
            column = p.first_column / kBlock + static_cast<int>(blockIdx.x) * kColumnBlocksEach;
  const int column_blocks = ceil_div(p.features.m, kBlock);
  const float factor = p.rules.scale.value() * kLog2e, lift = half_lift(p.rules.bound);
  const OwnTerms own(p.rules, row * kBlock + static_cast<int>(threadIdx.x) / kWarp * 16);
  using T = typename Loop::Element;
  T* out = static_cast<T*>(p.out) - (p.first_row * p.out_stride + p.first_column);
  auto on_tile = [&](float (&c)[4 * Loop::kTiles], int first_i, int first_j) {
    float sums[2];
    gradient_of_tile<Loop::kTiles, false>(c, p.rules, own, others_of(p.rules, first_j), first_i, first_j,
                                          factor, lift, sums);
    store_fragment<T, Loop::kTiles>(c, out, p.out_stride, p.last_row, p.features.m, first_i, first_j);
  };
  Loop::run(p.features, {row, row + 1, column, min(column + kColumnBlocksEach, column_blocks), 0, 0}, false,
            on_tile, [](int) {});
}

template <typename Loop>
__global__ void __launch_bounds__(Loop::kThreads, 2) gradient_sums_kernel(const GradientSumsParams p) {
  const int row = blockIdx.x, column_blocks = ceil_div(p.features.m, kBlock);
  const float factor = p.rules.scale.value() * kLog2e, lift = half_lift(p.rules.bound);
  const int first_own = row * kBlock + static_cast<int>(threadIdx.x) / kWarp * 16;
  const OwnTerms own(p.rules, first_own);
  float sums[2] = {};
  auto on_tile = [&](float (&c)[4 * Loop::kTiles], int first_i, int first_j) {
    gradient_of_tile<Loop::kTiles, true>(c, p.rules, own, others_of(p.rules, first_j), first_i, first_j,
                                         factor, lift, sums);
  };
  Loop::run(p.features, {row, row + 1, 0, column_blocks, 0, 0}, false, on_tile, [](int) {});
  const Lane lane;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = sum_of_row(sums[h]) * exp2_fast(-lift);
    const int i = first_own + lane.row + 8 * h;
    if (lane.column == 0 && i < p.features.n) p.sums[i] = sum;
  }
}

}  // namespace

void launch_gradient_tiles(const GradientTilesParams& p, Type type, Precision precision,
                           cudaStream_t stream) {
  const dim3 grid(ceil_div(ceil_div(p.features.m - p.first_column, kBlock), kColumnBlocksEach),
                  ceil_div(p.last_row - p.first_row, kBlock));
  dispatch_loop(type, precision, [&](auto loop) {
    using Loop = decltype(loop);
    launch(gradient_tiles_kernel<Loop>, grid, Loop::kThreads, Loop::kShared, stream, p);
  });
}

void launch_gradient_sums(const GradientSumsParams& p, Type type, Precision precision, cudaStream_t stream) {
  dispatch_loop(type, precision, [&](auto loop) {
    using Loop = decltype(loop);
    launch(gradient_sums_kernel<Loop>, dim3(ceil_div(p.features.n, kBlock)), Loop::kThreads, Loop::kShared,
           stream, p);
  });
}

}  // namespace cl_kernels::cuda
