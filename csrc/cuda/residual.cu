#include "residual.h"

#include "launch.h"
#include "quads.h"

namespace cl_kernels::cuda {
namespace {

constexpr int kThreads = 128;

// A warp a row. The positive, left out of the mean, comes back in float32 as (P - 1) k: rounded to half
// precision, a P close to 1 would drown the rest.
template <typename T>
__global__ void __launch_bounds__(kThreads) residual_kernel(const ResidualParams p) {
  const int i = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (i >= p.n) return;
  float most = kNothing;
  for (int split = lane; split < p.splits; split += kWarp)
    most = fmaxf(most, p.peak[static_cast<int64_t>(split) * p.n + i]);
  most = warp_max(most);
  double total = 0.0;
  for (int split = lane; split < p.splits; split += kWarp) {
    const int64_t at = static_cast<int64_t>(split) * p.n + i;
    total += static_cast<double>(p.total[at]) * exp2f(p.peak[at] - most);
  }
  total = warp_sum(total);
  const bool empty = total == 0.0;
  const double exact = empty ? 0.0 : log2(total) + most;

  const int index = p.index != nullptr ? p.index[i] : -1;
  float weight = 0.0f;
  if (index >= 0) weight = static_cast<float>(expm1((p.own_logit[i] - exact) * kLn2));
  if (lane == 0) {
    p.lse[i] = empty ? -HUGE_VAL : exact * kLn2;
    if (p.index != nullptr) {
      p.positive_sum[i] = index >= 0 ? p.index_logit[i] * kLn2 : 0.0;
      p.positive_count[i] = index >= 0 ? 1.0 : 0.0;
    }
  }

  const bool aligned = p.d % 4 == 0;
  const T* k = static_cast<const T*>(p.k) + max(index, 0) * p.k_stride;
  for (int column = 4 * lane; column < p.d; column += 4 * kWarp) {
    float sum[4] = {}, part[4];
#pragma unroll 4
    for (int split = 0; split < p.splits; ++split) {
      const int64_t at = static_cast<int64_t>(split) * p.n + i;
      const float fade = empty ? 0.0f : exp2f(static_cast<float>(p.peak[at] - exact));
      load_quad(part, p.mean + at * p.d, column, p.d, aligned);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] += part[e] * fade;
    }
    if (index >= 0) {
      load_quad(part, k, column, p.d, true);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] += part[e] * weight;
    }
    store_quad(p.residual + static_cast<int64_t>(i) * p.d, sum, column, p.d, aligned);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) gradient_kernel(const ResidualGradientParams p) {
  const int i = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (i >= p.n) return;
  const bool aligned = p.d % 4 == 0;
  const float scale = p.scale.value();
  const int index = p.index != nullptr ? p.index[i] : -1;
  const double of_lse = p.grad_lse != nullptr ? p.grad_lse[i * p.grad_lse_stride] : 0.0;
  const double of_positive = p.grad_positive != nullptr ? p.grad_positive[i * p.grad_positive_stride] : 0.0;
  const float factor = static_cast<float>(of_lse);
  const float weight = index >= 0 ? static_cast<float>(of_lse + of_positive) : 0.0f;
  const T* q = static_cast<const T*>(p.q) + i * p.q_stride;
  const T* k = static_cast<const T*>(p.k) + max(index, 0) * p.k_stride;
  double along = 0.0;
  for (int column = 4 * lane; column < p.d; column += 4 * kWarp) {
    float total[4], other[4];
    load_quad(total, p.residual + static_cast<int64_t>(i) * p.d, column, p.d, aligned);
#pragma unroll
    for (int e = 0; e < 4; ++e) total[e] *= factor;
    if (index >= 0) {
      load_quad(other, k, column, p.d, true);
#pragma unroll
      for (int e = 0; e < 4; ++e) total[e] += weight * other[e];
    }
    load_quad(other, q, column, p.d, true);
    float dot = 0.0f;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      dot += other[e] * total[e];
      total[e] *= scale;
    }
    along += dot;
    if (p.grad != nullptr)
      store_quad(static_cast<T*>(p.grad) + static_cast<int64_t>(i) * p.d, total, column, p.d, aligned);
  }
  along = warp_sum(along);
  if (lane == 0) p.along[i] = along;
}

}  // namespace

void launch_residual(const ResidualParams& p, Type type, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.n, kThreads / kWarp));
  dispatch_half(type, [&](auto t) { launch(residual_kernel<decltype(t)>, grid, kThreads, 0, stream, p); });
}

void launch_residual_gradient(const ResidualGradientParams& p, Type type, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.n, kThreads / kWarp));
  dispatch_type(type, [&](auto t) { launch(gradient_kernel<decltype(t)>, grid, kThreads, 0, stream, p); });
}

}  // namespace cl_kernels::cuda
