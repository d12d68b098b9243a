#include "gradient_combine.h"

#include "gradient.h"
#include "launch.h"
#include "quads.h"

namespace cl_kernels::cuda {
namespace {

constexpr int kThreads = 128;

// A warp a row.
template <typename X, typename G>
__global__ void __launch_bounds__(kThreads) combine_kernel(const GradientCombineParams p) {
  const int i = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (i >= p.n) return;
  const bool aligned = p.d % 4 == 0;
  const float scale = p.scale.value();
  const float unit = exp2f(-half_lift(p.bound));
  const X* x = static_cast<const X*>(p.x) + i * p.x_stride;
  const float* parts = p.parts + static_cast<int64_t>(i) * p.d;
  const int64_t part_stride = static_cast<int64_t>(p.n) * p.d;
  double along = 0.0;
  for (int column = 4 * lane; column < p.d; column += 4 * kWarp) {
    float total[4] = {}, part[4], own[4];
#pragma unroll 4
    for (int split = 0; split < p.splits; ++split) {
      load_quad(part, parts + split * part_stride, column, p.d, aligned);
#pragma unroll
      for (int e = 0; e < 4; ++e) total[e] += part[e];
    }
    load_quad(own, x, column, p.d, true);
    float dot = 0.0f;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      total[e] *= unit;
      dot += own[e] * total[e];
      total[e] *= scale;
    }
    along += dot;
    if (p.grad != nullptr)
      store_quad(static_cast<G*>(p.grad) + static_cast<int64_t>(i) * p.d, total, column, p.d, aligned);
  }
  along = warp_sum(along);
  if (lane == 0) p.along[i] = along * p.share;
}

}  // namespace

void launch_gradient_combine(const GradientCombineParams& p, Type type, bool in_float, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.n, kThreads / kWarp));
  dispatch_type(type, [&](auto t) {
    using T = decltype(t);
    launch(in_float ? combine_kernel<T, float> : combine_kernel<T, T>, grid, kThreads, 0, stream, p);
  });
}

}  // namespace cl_kernels::cuda
