#include "columns.h"

#include <algorithm>

#include "launch.h"

namespace cl_kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;          // rows and columns that are transposed at once
constexpr int kPitch = kTile + 1;  // of the tile in shared memory, against conflicts
constexpr int kMostBlocks = 64;    // that share the columns of a tile

// Sums over kThreads / kWarp values of each of kWarp columns, in a fixed order; all threads get those of
// their lane.
__device__ __forceinline__ float sum_over_warps(float x) {
  __shared__ float of_warps[kThreads / kWarp][kWarp];
  const int lane = threadIdx.x % kWarp;
  __syncthreads();
  of_warps[threadIdx.x / kWarp][lane] = x;
  __syncthreads();
  float total = of_warps[0][lane];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarp; ++warp) total += of_warps[warp][lane];
  return total;
}

// A block takes a chunk of the rows of 32 columns: their sum relative to the column's first entry, and the
// squares about the chunk's own mean. Relative to the first row a mean much larger than the spread takes no
// digits, and a constant column is exactly one.
template <typename T>
__global__ void __launch_bounds__(kThreads) column_sums_kernel(const StandardiseParams p) {
  const int view = blockIdx.y, chunk = blockIdx.x % column_chunks(p.n);
  const int column = blockIdx.x / column_chunks(p.n) * kWarp + threadIdx.x % kWarp;
  const bool inside = column < p.d;
  const int begin = chunk * kColumnChunk, end = min(begin + kColumnChunk, p.n);
  const int64_t stride = view == 0 ? p.z_stride[0] : p.z_stride[1];
  const T* z = static_cast<const T*>(view == 0 ? p.z[0] : p.z[1]) + (inside ? column : 0);
  const float first = to_float(z[0]);

  float sum = 0.0f;
#pragma unroll 8
  for (int row = begin + static_cast<int>(threadIdx.x) / kWarp; row < end; row += kThreads / kWarp)
    sum += to_float(z[row * stride]) - first;
  sum = sum_over_warps(sum);
  const float offset = sum / static_cast<float>(end - begin);

  float squares = 0.0f;
#pragma unroll 8
  for (int row = begin + static_cast<int>(threadIdx.x) / kWarp; row < end; row += kThreads / kWarp) {
    const float apart = (to_float(z[row * stride]) - first) - offset;
    squares += apart * apart;
  }
  squares = sum_over_warps(squares);
  if (threadIdx.x >= kWarp || !inside) return;
  float* parts = p.parts + (static_cast<int64_t>(view) * column_chunks(p.n) + chunk) * 2 * p.d;
  parts[column] = sum;
  parts[p.d + column] = squares;
}

// What the entries of a column are shifted and multiplied by.
struct Standard {
  float first, offset, rnorm;
};

// From the chunks' sums, as if all had been taken about the column's mean.
template <typename T>
__device__ __forceinline__ Standard combine_chunks(const StandardiseParams& p, int view, int column) {
  const int chunks = column_chunks(p.n);
  const float* parts = p.parts + static_cast<int64_t>(view) * chunks * 2 * p.d + column;
  double sum = 0.0;
  for (int chunk = 0; chunk < chunks; ++chunk) sum += static_cast<double>(parts[int64_t{chunk} * 2 * p.d]);
  const double offset = sum / p.n;
  double squares = 0.0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const float* part = parts + int64_t{chunk} * 2 * p.d;
    const double rows = min(kColumnChunk, p.n - chunk * kColumnChunk);
    const double apart = static_cast<double>(part[0]) / rows - offset;
    squares += static_cast<double>(part[p.d]) + rows * apart * apart;
  }
  Standard s;
  s.first = to_float(static_cast<const T*>(view == 0 ? p.z[0] : p.z[1])[column]);
  s.offset = static_cast<float>(offset);
  const float norm = static_cast<float>(sqrt(squares));
  s.rnorm = norm <= p.noise * fabsf(s.first + s.offset) ? 0.0f : static_cast<float>(1.0 / sqrt(squares));
  return s;
}

// A block puts the statistics of 64 columns together, and transposes tiles of them, [64 rows, 64 columns],
// through shared memory: both sides go by in whole rows.
template <typename T>
__global__ void __launch_bounds__(kThreads) standardise_kernel(const StandardiseParams p) {
  __shared__ Standard standards[kTile];
  __shared__ float tile[kTile * kPitch];  // [column, row]
  constexpr int kSize = Vec<T>::kSize, kVecs = kTile / kSize;
  const int view = blockIdx.z, first_column = blockIdx.y * kTile;
  if (threadIdx.x < kTile) {
    const int column = first_column + threadIdx.x;
    const Standard s = column < p.d ? combine_chunks<T>(p, view, column) : Standard{};
    standards[threadIdx.x] = s;
    if (blockIdx.x == 0 && column < p.d) {
      p.mean[view * p.d + column] = s.first + s.offset;
      p.rnorm[view * p.d + column] = s.rnorm;
    }
  }
  __syncthreads();
  const int64_t stride = view == 0 ? p.z_stride[0] : p.z_stride[1];
  const T* z = static_cast<const T*>(view == 0 ? p.z[0] : p.z[1]);
  T* x = static_cast<T*>(p.x) + static_cast<int64_t>(view) * p.d * p.x_stride;
  for (int first_row = blockIdx.x * kTile; first_row < p.x_stride; first_row += gridDim.x * kTile) {
    const int local = threadIdx.x % kTile, column = first_column + local;
    const Standard s = standards[local];
#pragma unroll
    for (int at = threadIdx.x / kTile; at < kTile; at += kThreads / kTile) {
      const int row = first_row + at;
      float value = 0.0f;
      if (row < p.n && column < p.d)
        value = ((to_float(z[row * stride + column]) - s.first) - s.offset) * s.rnorm;
      tile[local * kPitch + at] = value;
    }
    __syncthreads();
#pragma unroll
    for (int at = threadIdx.x; at < kTile * kVecs; at += kThreads) {
      const int of_tile = at / kVecs, row = at % kVecs * kSize;
      if (first_column + of_tile < p.d && first_row + row < p.x_stride) {
        Vec<T> v;
#pragma unroll
        for (int e = 0; e < kSize; ++e) v.x[e] = from_float<T>(tile[of_tile * kPitch + row + e]);
        store_vec(x + (first_column + of_tile) * p.x_stride + first_row + row, v);
      }
    }
    __syncthreads();
  }
}

// Of a row of x: its product with the gradient, and the mean of the gradient once its part along x is off.
// The mean goes last: rounding leaves x itself a mean where a column hardly varies.
template <typename T>
__global__ void __launch_bounds__(kThreads) column_products_kernel(const ColumnGradientParams p) {
  const int64_t row = blockIdx.x;
  const float* grad = p.grad + row * p.n;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  double of_grad = 0.0, of_x = 0.0, dot = 0.0;
  constexpr int kAtOnce = 8;
  for (int first = threadIdx.x; first < p.n; first += kAtOnce * kThreads) {
    float sums[3] = {};
#pragma unroll
    for (int at = 0; at < kAtOnce; ++at) {
      const int i = first + at * kThreads;
      if (i < p.n) {
        const float g = grad[i], value = to_float(x[i]);
        sums[0] += g;
        sums[1] += value;
        sums[2] += g * value;
      }
    }
    of_grad += static_cast<double>(sums[0]);
    of_x += static_cast<double>(sums[1]);
    dot += static_cast<double>(sums[2]);
  }
  of_grad = block_sum<kThreads>(of_grad);
  of_x = block_sum<kThreads>(of_x);
  dot = block_sum<kThreads>(dot);
  if (threadIdx.x != 0) return;
  p.along[row] = static_cast<float>(dot);
  p.along[2 * p.d + row] = static_cast<float>((of_grad - dot * of_x) / p.n);
}

// grad_z = rnorm (g - x (x . g) - mean of that), transposed back.
template <typename T>
__global__ void __launch_bounds__(kThreads) column_gradient_kernel(const ColumnGradientParams p) {
  __shared__ float tile[kTile * kPitch];  // [row of z, column]
  const int view = blockIdx.z, first_column = blockIdx.y * kTile, first_row = blockIdx.x * kTile;
  const int local = threadIdx.x % kTile, row = first_row + local;
#pragma unroll
  for (int at = threadIdx.x / kTile; at < kTile; at += kThreads / kTile) {
    const int column = first_column + at;
    if (row >= p.n || column >= p.d) continue;
    const int64_t of_x = view * p.d + column;
    const float g = p.grad[of_x * p.n + row],
                x = to_float(static_cast<const T*>(p.x)[of_x * p.x_stride + row]);
    tile[local * kPitch + at] = (g - x * p.along[of_x] - p.along[2 * p.d + of_x]) * p.rnorm[of_x];
  }
  __syncthreads();
  T* grad_z = static_cast<T*>(view == 0 ? p.grad_z[0] : p.grad_z[1]);
  const int column = first_column + local;
#pragma unroll
  for (int at = threadIdx.x / kTile; at < kTile; at += kThreads / kTile) {
    if (first_row + at >= p.n || column >= p.d) continue;
    grad_z[static_cast<int64_t>(first_row + at) * p.d + column] = from_float<T>(tile[at * kPitch + local]);
  }
}

}  // namespace

void launch_standardise(const StandardiseParams& p, Type type, cudaStream_t stream) {
  const dim3 sums(ceil_div(p.d, kWarp) * column_chunks(p.n), 2);
  const dim3 tiles(std::min(ceil_div(static_cast<int>(p.x_stride), kTile), kMostBlocks), ceil_div(p.d, kTile),
                   2);
  dispatch_type(type, [&](auto t) {
    launch(column_sums_kernel<decltype(t)>, sums, kThreads, 0, stream, p);
    launch(standardise_kernel<decltype(t)>, tiles, kThreads, 0, stream, p);
  });
}

void launch_column_gradient(const ColumnGradientParams& p, Type type, cudaStream_t stream) {
  const dim3 tiles(ceil_div(p.n, kTile), ceil_div(p.d, kTile), 2);
  dispatch_type(type, [&](auto t) {
    launch(column_products_kernel<decltype(t)>, dim3(2 * p.d), kThreads, 0, stream, p);
    launch(column_gradient_kernel<decltype(t)>, tiles, kThreads, 0, stream, p);
  });
}

}  // namespace cl_kernels::cuda
