#include "positive_rows.h"

#include <algorithm>

#include "launch.h"
#include "quads.h"

namespace cl_kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kAtOnce = 8;  // keys that a thread loads before it adds them

// The first of `count` labels that a thread's label equals, or m.
__device__ __forceinline__ int first_equal(const int64_t* labels, int count, int64_t label, int first,
                                           int m) {
  int column = m;
  for (int c = count - 1; c >= 0; --c) column = labels[c] == label ? first + c : column;
  return column;
}

__global__ void __launch_bounds__(kThreads) ids_kernel(const IdsParams p) {
  constexpr int64_t kNarrow = int64_t{1} << 30;
  __shared__ int64_t columns[kThreads];
  const bool of_rows = blockIdx.y == 1;
  const int64_t* labels = of_rows ? p.rows : p.cols;
  int* ids = of_rows ? p.row_ids : p.col_ids;
  const int n = of_rows ? p.n : p.m, i = blockIdx.x * kThreads + threadIdx.x;
  const int64_t label = i < n ? labels[i] : 0;
  const bool narrow = label >= -kNarrow && label < kNarrow;
  int column = p.m;
  for (int first = 0; first < p.m && __syncthreads_or(!narrow && column == p.m); first += kThreads) {
    const int j = first + threadIdx.x;
    if (j < p.m) columns[threadIdx.x] = p.cols[j];
    __syncthreads();
    if (column == p.m) column = first_equal(columns, min(kThreads, p.m - first), label, first, p.m);
  }
  const int id = narrow ? static_cast<int>(label + kNarrow) : -2 - column;
  if (i < round_up(n, kIdsPadding)) ids[i] = i < n ? id : -1;
}

// The first of sorted[0, m) that is not less than the label (or, `after`, that is greater).
__device__ __forceinline__ int bound(const int64_t* sorted, int m, int64_t label, bool after) {
  int low = 0, high = m;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    const int64_t there = sorted[middle];
    if (there < label || (after && there == label))
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

__global__ void __launch_bounds__(kThreads) classes_kernel(const ClassParams p) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= p.n) {
    if (i < round_up(p.n, kIdsPadding)) p.ids[i] = -1;
    return;
  }
  const int64_t label = p.labels[i];
  const int first = bound(p.sorted, p.m, label, false), end = bound(p.sorted, p.m, label, true);
  const int id = end > first ? first : p.m;
  const int64_t at = p.place == nullptr ? i : p.place[i];
  p.ids[at] = id;
  if (p.ids_as_is != nullptr) p.ids_as_is[i] = id;
  if (p.counts != nullptr) p.counts[at] = end - first;
}

// A block walks a chunk of the sorted columns, a thread a feature, and writes a sum wherever the class
// changes: at the class's place if it began in this chunk, else to the chunk's carry.
template <typename T>
__global__ void __launch_bounds__(kThreads) class_sums_kernel(const ClassSumsParams p) {
  const int f = blockIdx.y * kThreads + threadIdx.x, chunk = blockIdx.x;
  if (f >= p.d) return;
  const int begin = chunk * kClassChunk, end = min(begin + kClassChunk, p.m);
  const T* k = static_cast<const T*>(p.k) + f;
  auto flush = [&](int id, double sum) {
    if (id < begin)
      p.carry[static_cast<int64_t>(chunk) * p.d + f] = sum;
    else
      p.sums[id * p.stride + f] = static_cast<float>(sum);
  };
  double sum = 0.0;
  int current = p.ids[begin];
  for (int first = begin; first < end; first += kAtOnce) {
    float values[kAtOnce];
    int ids[kAtOnce];
#pragma unroll
    for (int at = 0; at < kAtOnce; ++at) {
      const int position = min(first + at, end - 1);
      ids[at] = p.ids[position];
      values[at] = to_float(k[p.order[position] * p.k_stride]);
    }
#pragma unroll
    for (int at = 0; at < kAtOnce; ++at) {
      if (first + at >= end) break;
      if (ids[at] != current) {
        flush(current, sum);
        current = ids[at];
        sum = 0.0;
      }
      sum += static_cast<double>(values[at]);
    }
  }
  flush(current, sum);
}

// Completes the class that begins in a chunk and goes on in the next ones: warps take turns at their carries.
__global__ void __launch_bounds__(256) class_carry_kernel(const ClassSumsParams p) {
  constexpr int kWarps = 256 / kWarp;
  __shared__ double of_warps[kWarps][kWarp];
  const int chunk = blockIdx.x, next = (chunk + 1) * kClassChunk;
  if (next >= p.m) return;
  const int id = p.ids[next];
  if (p.ids[next - 1] != id || id < chunk * kClassChunk) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, f = blockIdx.y * kWarp + lane;
  const int chunks = ceil_div(p.m, kClassChunk);
  double sum = 0.0;
#pragma unroll 4
  for (int from = chunk + 1 + warp; from < chunks; from += kWarps) {
    if (p.ids[from * kClassChunk] != id) break;
    if (f < p.d) sum += p.carry[static_cast<int64_t>(from) * p.d + f];
  }
  of_warps[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || f >= p.d) return;
  sum = static_cast<double>(p.sums[id * p.stride + f]);
#pragma unroll
  for (int from = 0; from < kWarps; ++from) sum += of_warps[from][lane];
  p.sums[id * p.stride + f] = static_cast<float>(sum);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) fold_kernel(const FoldParams p) {
  const int f = blockIdx.y * kThreads + threadIdx.x, column = blockIdx.x;
  if (f >= p.stride) return;
  double sum = 0.0;
  if (f < p.d) {
    const T* k = static_cast<const T*>(p.k) + f;
    for (int64_t j = column; j < p.m; j += p.columns) sum += static_cast<double>(to_float(k[j * p.k_stride]));
  }
  p.out[column * p.stride + f] = static_cast<float>(sum);
}

__global__ void __launch_bounds__(kThreads) mask_counts_kernel(const MaskCountsParams p) {
  const float* mask = p.mask + blockIdx.x * p.mask_stride;
  const int whole = p.m / p.columns, left = p.m % p.columns;
  double count = 0.0;
  for (int column = threadIdx.x; column < p.columns; column += kThreads)
    count += static_cast<double>(mask[column]) * (whole + (column < left ? 1 : 0));
  count = block_sum<kThreads>(count);
  if (threadIdx.x == 0) p.counts[blockIdx.x] = count;
}

// A warp's product of row i with its prototype and `weight` times a key (-1: none), in double: exact but for
// the sum. The key is taken off the prototype before they multiply: of a class of one that leaves 0.
template <typename T>
__device__ __forceinline__ double product_of(const PositiveRowsParams& p, int i, const float* prototype,
                                             int key, double weight) {
  constexpr int kSize = Vec<T>::kSize;
  const T* q = static_cast<const T*>(p.q) + i * p.q_stride;
  const T* k = static_cast<const T*>(p.k) + key * p.k_stride;
  double sum = 0.0;
  for (int column = threadIdx.x % kWarp * kSize; column < p.d; column += kWarp * kSize) {
    float x[kSize];
    load_elements(x, q, column, p.d);
    float y[kSize] = {};
    if (key >= 0) load_elements(y, k, column, p.d);
#pragma unroll
    for (int quad = 0; quad < kSize; quad += 4) {
      float of_prototype[4] = {};
      if (prototype != nullptr) load_quad(of_prototype, prototype, column + quad, p.d, true);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const double other = static_cast<double>(of_prototype[e]) + weight * static_cast<double>(y[quad + e]);
        sum += static_cast<double>(x[quad + e]) * other;
      }
    }
  }
  return warp_sum(sum) * static_cast<double>(p.scale.value());
}

// The same of `count` positives from the tiles' parts.
__device__ __forceinline__ double sum_of_tiles(const PositiveRowsParams& p, int i, double count) {
  const TileSums& tiles = p.tiles;
  const int lane = threadIdx.x % kWarp;
  double sum = 0.0;
  for (int slot = lane; slot < tiles.slots; slot += kWarp)
    sum += tiles.rows[static_cast<int64_t>(slot) * p.n + i];
  for (int slot = lane; slot < tiles.more_slots; slot += kWarp)
    sum += tiles.columns[static_cast<int64_t>(slot) * p.n + i];
  return (warp_sum(sum) + count * reference(tiles.bounds, p.scale.value())) * kLn2;
}

// A warp a row.
template <typename T>
__global__ void __launch_bounds__(kThreads) positive_rows_kernel(const PositiveRowsParams p) {
  const int i = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (i >= p.n) return;
  const float* prototype = nullptr;
  int key = -1;  // the row of k that counts besides, `weight` times
  double weight = 1.0;
  double count = 0.0;
  if (p.index != nullptr) {
    key = p.index[i];
    count = key >= 0 ? 1.0 : 0.0;
  } else {
    const int group = p.row_ids != nullptr ? p.row_ids[i] : i % p.groups;
    count = p.counts[p.row_ids != nullptr ? i : group];
    if (p.row_ids == nullptr || group < p.m) prototype = p.prototypes + group * p.prototype_stride;
    const int64_t excluded = static_cast<int64_t>(i) + p.offset;
    if (p.excludes && excluded >= 0 && excluded < p.m) {
      weight = p.row_ids != nullptr ? (group == p.col_ids[excluded] ? -1.0 : 0.0)
                                    : -static_cast<double>(p.excluded_weight[i]);
      if (weight != 0.0) key = static_cast<int>(excluded);
      count += weight;
    }
  }
  double sum;
  if constexpr (std::is_same_v<T, float>)
    sum = sum_of_tiles(p, i, count);
  else
    sum = product_of<T>(p, i, prototype, key, weight);
  if (lane != 0) return;
  p.sum[i] = sum;
  p.count[i] = count;
}

}  // namespace

void launch_ids(const IdsParams& p, cudaStream_t stream) {
  const bool apart = p.rows != nullptr;
  const int blocks = ceil_div(round_up(apart ? std::max(p.n, p.m) : p.m, kIdsPadding), kThreads);
  launch(ids_kernel, dim3(blocks, apart ? 2 : 1), kThreads, 0, stream, p);
}

void launch_classes(const ClassParams& p, cudaStream_t stream) {
  launch(classes_kernel, dim3(ceil_div(round_up(p.n, kIdsPadding), kThreads)), kThreads, 0, stream, p);
}

void launch_class_sums(const ClassSumsParams& p, Type type, cudaStream_t stream) {
  const int chunks = ceil_div(p.m, kClassChunk);
  dispatch_half(type, [&](auto t) {
    launch(class_sums_kernel<decltype(t)>, dim3(chunks, ceil_div(p.d, kThreads)), kThreads, 0, stream, p);
  });
  if (chunks > 1) launch(class_carry_kernel, dim3(chunks - 1, ceil_div(p.d, kWarp)), 256, 0, stream, p);
}

void launch_fold(const FoldParams& p, Type type, cudaStream_t stream) {
  const dim3 grid(p.columns, ceil_div(static_cast<int>(p.stride), kThreads));
  dispatch_half(type, [&](auto t) { launch(fold_kernel<decltype(t)>, grid, kThreads, 0, stream, p); });
}

void launch_mask_counts(const MaskCountsParams& p, cudaStream_t stream) {
  launch(mask_counts_kernel, dim3(p.rows), kThreads, 0, stream, p);
}

void launch_positive_rows(const PositiveRowsParams& p, Type type, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.n, kThreads / kWarp));
  dispatch_type(type,
                [&](auto t) { launch(positive_rows_kernel<decltype(t)>, grid, kThreads, 0, stream, p); });
}

}  // namespace cl_kernels::cuda
