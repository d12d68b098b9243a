#include "similarity_rows.h"

#include "launch.h"
#include "quads.h"

namespace cl_kernels::cuda {
namespace {

constexpr int kThreads = 128;  // a warp a row
constexpr int kRows = kThreads / kWarp;

template <typename T>
__global__ void __launch_bounds__(kThreads) row_norms_kernel(const RowNormsParams p) {
  constexpr int kSize = Vec<T>::kSize;
  const int i = blockIdx.x * kRows + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (i >= p.n) return;
  const T* row = static_cast<const T*>(p.x) + i * p.x_stride;
  float squares = 0.0f;
  for (int column = lane * kSize; column < p.d; column += kWarp * kSize) {
    float x[kSize];
    load_elements(x, row, column, p.d);
#pragma unroll
    for (int e = 0; e < kSize; ++e) squares += x[e] * x[e];
  }
  const float norm = __fsqrt_rn(warp_sum(squares));
  const float rnorm = norm == 0.0f ? 0.0f : __fdiv_rn(1.0f, norm);
  if (lane == 0) p.rnorm[i] = rnorm;
  if (p.unit == nullptr) return;
  T* unit = static_cast<T*>(p.unit) + i * p.unit_stride;
  for (int column = lane * kSize; column < p.unit_stride; column += kWarp * kSize) {
    float x[kSize];
    load_elements(x, row, column, p.d);
    Vec<T> v;
#pragma unroll
    for (int e = 0; e < kSize; ++e) v.x[e] = from_float<T>(x[e] * rnorm);
    store_vec(unit + column, v);
  }
}

// A warp a row, twice where both the product and the gradient are wanted: the second time from the cache.
template <typename T>
__global__ void __launch_bounds__(kThreads) row_gradient_kernel(const RowGradientParams p) {
  const int i = blockIdx.x * kRows + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (i >= p.n) return;
  const T* x = static_cast<const T*>(p.x) + i * p.x_stride;
  const float* grad = p.grad + static_cast<int64_t>(i) * p.d;
  const float rnorm = p.rnorm == nullptr ? 1.0f : p.rnorm[i];
  float dot = 0.0f;
  if (p.rnorm != nullptr || p.along != nullptr) {
    double sum = 0.0;
#pragma unroll 4
    for (int column = lane; column < p.d; column += kWarp)
      sum += static_cast<double>(grad[column] * (to_float(x[column]) * rnorm));
    sum = warp_sum(sum);
    dot = static_cast<float>(sum);
    if (p.along != nullptr && lane == 0) p.along[i] = p.share * sum;
  }
  if (p.out == nullptr) return;
  T* out = static_cast<T*>(p.out) + static_cast<int64_t>(i) * p.d;
  const float factor = p.factor * p.scale.value() * rnorm;
  const float along = p.rnorm == nullptr ? 0.0f : dot;
#pragma unroll 4
  for (int column = lane; column < p.d; column += kWarp)
    out[column] = from_float<T>((grad[column] - to_float(x[column]) * rnorm * along) * factor);
}

}  // namespace

void launch_row_norms(const RowNormsParams& p, Type type, cudaStream_t stream) {
  dispatch_type(type, [&](auto t) {
    launch(row_norms_kernel<decltype(t)>, dim3(ceil_div(p.n, kRows)), kThreads, 0, stream, p);
  });
}

void launch_row_gradient(const RowGradientParams& p, Type type, cudaStream_t stream) {
  dispatch_type(type, [&](auto t) {
    launch(row_gradient_kernel<decltype(t)>, dim3(ceil_div(p.n, kRows)), kThreads, 0, stream, p);
  });
}

}  // namespace cl_kernels::cuda
