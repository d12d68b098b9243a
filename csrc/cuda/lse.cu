#include "lse_tile.h"
#include "quads.h"
#include "tiles.h"

namespace cl_kernels::cuda {
namespace {

// A warp a row: the largest squared norm of any, as the bits of a float, which are ordered as it is.
template <typename T>
__global__ void __launch_bounds__(256) bounds_kernel(const Features f, const float* bias, Bounds* bounds) {
  const int lane = threadIdx.x % kWarp;
  const bool same = f.x == f.y && f.x_stride == f.y_stride && f.n == f.m;
  float most_x = 0.0f, most_y = 0.0f, most_bias = 0.0f;
  const int warps = gridDim.x * (256 / kWarp);
  for (int row = blockIdx.x * (256 / kWarp) + threadIdx.x / kWarp; row < f.n + f.m; row += warps) {
    const bool of_x = row < f.n;
    if (!of_x && same) break;
    const T* x = of_x ? static_cast<const T*>(f.x) + row * f.x_stride
                      : static_cast<const T*>(f.y) + (row - f.n) * f.y_stride;
    float sum = 0.0f;
    for (int column = lane * Vec<T>::kSize; column < f.d; column += kWarp * Vec<T>::kSize) {
      float values[Vec<T>::kSize];
      load_elements(values, x, column, f.d);
#pragma unroll
      for (float value : values) sum += value * value;
    }
    sum = warp_sum(sum);
    (of_x ? most_x : most_y) = fmaxf(of_x ? most_x : most_y, sum);
  }
  if (same) most_y = most_x;
  if (bias != nullptr)
    for (int j = blockIdx.x * 256 + threadIdx.x; j < f.m; j += gridDim.x * 256)
      most_bias = fmaxf(most_bias, bias[j]);
  most_x = block_max<256>(most_x);
  most_y = block_max<256>(most_y);
  most_bias = block_max<256>(most_bias);
  if (threadIdx.x == 0) {
    atomicMax(reinterpret_cast<int*>(&bounds->x), __float_as_int(most_x));
    atomicMax(reinterpret_cast<int*>(&bounds->y), __float_as_int(most_y));
    atomicMax(reinterpret_cast<int*>(&bounds->bias), __float_as_int(most_bias));
  }
}

// Where a tile's logits are rounded before anything is summed, and those of positives with the others.
template <typename Loop>
constexpr bool kWithPositives = std::is_same_v<typename Loop::Element, float>;

// c, products of a tile, becomes its logits, and the sums of the positives among them are taken.
template <typename Loop>
__device__ __forceinline__ void round_logits(float (&c)[4 * Loop::kTiles], const PositiveTerms& positives,
                                             const PairRules& pairs, int first_i, int first_j, float factor,
                                             const PositiveSums& sums) {
#pragma unroll
  for (float& x : c) x = __fmul_rn(x, factor);
  if (positives.kind != kNoPositives)
    add_positives<Loop::kTiles>(c, positives, pairs, first_i, first_j, sums);
}

template <typename Loop, bool kColumnSums>
__global__ void __launch_bounds__(Loop::kThreads, 2) lse_kernel(const LseParams p) {
  const Group group = p.schedule.group(blockIdx.x);
  const float scale = p.scale.value();
  const float factor = scale * kLog2e, shift = fixed_shift(*p.bounds, scale);
  const Lane lane;
  const int warp = threadIdx.x / kWarp;
  float* row_sums = p.row_sums + static_cast<int64_t>(group.column_group) * p.pairs.n;
  // Sums of columns stay in registers, or where positives take these in shared memory, of each warp its own.
  constexpr bool kInRegisters = !kWithPositives<Loop>;
  float columns[kColumnSums && kInRegisters ? 2 * Loop::kTiles : 1] = {};
  float* of_warps = reinterpret_cast<float*>(dynamic_shared() + Loop::kShared);
  double* positives = reinterpret_cast<double*>(of_warps + Loop::kWarps * Loop::kColumns);
  if constexpr (kColumnSums && !kInRegisters) {
#pragma unroll
    for (int at = threadIdx.x; at < Loop::kWarps * Loop::kColumns; at += Loop::kThreads)
      of_warps[at] = 0.0f, positives[at] = 0.0;
  }

  const PositiveSums positive_sums{
      reference(p.positives.bounds, scale),
      p.positives.rows + static_cast<int64_t>(group.column_group) * p.pairs.n,
      kColumnSums && p.pairs.above ? positives + warp * Loop::kColumns : nullptr};

  auto on_tile = [&](float (&c)[4 * Loop::kTiles], int first_i, int first_j) {
    float unit = factor;
    if constexpr (kWithPositives<Loop>) {
      round_logits<Loop>(c, p.positives, p.pairs, first_i, first_j, factor, positive_sums);
      unit = 1.0f;
    }
    logits_of_tile<Loop::kTiles>(c, p.pairs, nullptr, p.bias, first_i, first_j, unit, shift);
    float rows[2] = {};
#pragma unroll
    for (int x = 0; x < 4 * Loop::kTiles; ++x) {
      c[x] = exp2_fast(c[x]);
      rows[x / 2 % 2] += c[x];
      if constexpr (kColumnSums && kInRegisters) columns[x / 4 * 2 + x % 2] += c[x];
    }
    if constexpr (kColumnSums && !kInRegisters) {
#pragma unroll
      for (int first = 0; first < 2 * Loop::kTiles; first += 8) {
        float sums[8];
#pragma unroll
        for (int x = first; x < first + 8; ++x)
          sums[x - first] = c[x / 2 * 4 + x % 2] + c[x / 2 * 4 + x % 2 + 2];
        of_warps[warp * Loop::kColumns + lane.column_of(first + lane.row)] += sum_of_columns(sums);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = sum_of_row(rows[h]);
      const int i = first_i + lane.row + 8 * h;
      // Only this thread adds here, one tile after the other: the order is fixed.
      if (lane.column == 0 && i < p.pairs.n) atomicAdd(row_sums + i, sum);
    }
  };
  auto on_column = [&](int first_j) {
    if constexpr (kColumnSums) {
      if constexpr (kInRegisters) {
#pragma unroll
        for (int first = 0; first < 2 * Loop::kTiles; first += 8) {
          float sums[8];
#pragma unroll
          for (int x = 0; x < 8; ++x) sums[x] = columns[first + x], columns[first + x] = 0.0f;
          of_warps[warp * Loop::kColumns + lane.column_of(first + lane.row)] = sum_of_columns(sums);
        }
      }
      __syncthreads();
      const int j = first_j + threadIdx.x;
      if (threadIdx.x < Loop::kColumns) {
        const int64_t at = static_cast<int64_t>(group.row_group) * p.pairs.m + j;
        auto sum_over_warps = [&](auto* of_warps) {
          auto total = of_warps[threadIdx.x];
#pragma unroll
          for (int from = 1; from < Loop::kWarps; ++from)
            total += of_warps[from * Loop::kColumns + threadIdx.x];
          if constexpr (!kInRegisters) {
#pragma unroll
            for (int from = 0; from < Loop::kWarps; ++from) of_warps[from * Loop::kColumns + threadIdx.x] = 0;
          }
          return total;
        };
        const float total = sum_over_warps(of_warps);
        if (j < p.pairs.m) p.column_sums[at] = total;
        if constexpr (!kInRegisters) {
          const double of_positives = sum_over_warps(positives);
          if (j < p.pairs.m && p.positives.columns != nullptr) p.positives.columns[at] = of_positives;
        }
      }
      __syncthreads();
    }
  };
  Loop::run(p.features, group, p.schedule.mirrored, on_tile, on_column);
}

// Marks a sum that is too small to trust.
__device__ __forceinline__ double untrusted() {
  return __longlong_as_double(-1);
}
__device__ __forceinline__ bool is_untrusted(double x) {
  return __double_as_longlong(x) == -1;
}

__global__ void __launch_bounds__(128) combine_kernel(const CombineParams p) {
  const int i = blockIdx.x * 128 + threadIdx.x;
  if (i >= p.n) return;
  double total = 0.0;
  for (int slot = 0; slot < p.slots; ++slot) total += p.parts[static_cast<int64_t>(slot) * p.n + i];
  for (int slot = 0; slot < p.more_slots; ++slot) total += p.mirrored[static_cast<int64_t>(slot) * p.n + i];
  const float shift = fixed_shift(*p.bounds, p.scale.value());
  // Without a shift and a bias no sum of anything is so small. What overflowed or is NaN is computed again in
  // any case.
  const bool large_enough = total >= 0x1p-100 || (shift == 0.0f && !p.biased);
  const bool trusted = large_enough && total < static_cast<double>(kMostSum);
  p.lse[i] = trusted ? (log2(total) + shift) * kLn2 : untrusted();
}

// A block of rows and a part of the columns a program; the last of a block of rows to finish combines its
// parts, in their order.
template <typename Loop>
__global__ void __launch_bounds__(Loop::kThreads, 2) online_kernel(const OnlineParams p) {
  const int row = blockIdx.x, own = row * Loop::kRows + static_cast<int>(threadIdx.x), n = p.pairs.n;
  const bool is_own = threadIdx.x < Loop::kRows && own < n;
  if (p.only_untrusted && !__syncthreads_or(is_own && is_untrusted(p.lse[own]))) return;
  const float scale = p.scale.value(), factor = scale * kLog2e;
  const int column_blocks = ceil_div(p.pairs.m, kBlock), each = ceil_div(column_blocks, p.splits);
  const int first_column = min(static_cast<int>(blockIdx.y) * each, column_blocks);
  float peak[2] = {kNothing, kNothing}, total[2] = {};
  const PositiveSums positive_sums{reference(p.positives.bounds, scale),
                                   p.positives.rows + static_cast<int64_t>(blockIdx.y) * n, nullptr};
  auto on_tile = [&](float (&c)[4 * Loop::kTiles], int first_i, int first_j) {
    float unit = factor;
    if constexpr (kWithPositives<Loop>) {
      round_logits<Loop>(c, p.positives, p.pairs, first_i, first_j, factor, positive_sums);
      unit = 1.0f;
    }
    logits_of_tile<Loop::kTiles>(c, p.pairs, p.own_bias, p.other_bias, first_i, first_j, unit, 0.0f);
    float before[2] = {peak[0], peak[1]};
#pragma unroll
    for (int x = 0; x < 4 * Loop::kTiles; ++x) peak[x / 2 % 2] = fmaxf(peak[x / 2 % 2], c[x]);
#pragma unroll
    for (int h = 0; h < 2; ++h) total[h] *= exp2_fast(before[h] - peak[h]);
#pragma unroll
    for (int x = 0; x < 4 * Loop::kTiles; ++x) total[x / 2 % 2] += exp2_fast(c[x] - peak[x / 2 % 2]);
  };
  Loop::run(p.features, {row, row + 1, first_column, min(first_column + each, column_blocks), 0, 0}, false,
            on_tile, [](int) {});
  const Lane lane;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float most = max_of_row(peak[h]);
    const float sum = sum_of_row(total[h] * exp2_fast(peak[h] - most));
    const int i = row * Loop::kRows + static_cast<int>(threadIdx.x) / kWarp * 16 + lane.row + 8 * h;
    if (lane.column == 0 && i < n) p.parts[static_cast<int64_t>(blockIdx.y) * n + i] = make_float2(most, sum);
  }
  __threadfence();
  __syncthreads();
  const bool ends = threadIdx.x == 0 && atomicAdd(p.tickets + row, 1) == p.splits - 1;
  if (!__syncthreads_or(ends) || !is_own) return;
  if (p.only_untrusted && !is_untrusted(p.lse[own])) return;
  __threadfence();
  float most = kNothing;
  for (int split = 0; split < p.splits; ++split)
    most = fmaxf(most, __ldcg(p.parts + static_cast<int64_t>(split) * n + own).x);
  double sum = 0.0;
  for (int split = 0; split < p.splits; ++split) {
    const float2 part = __ldcg(p.parts + static_cast<int64_t>(split) * n + own);
    sum += static_cast<double>(part.y * exp2_fast(part.x - most));
  }
  p.lse[own] = (log2(sum) + most) * kLn2;
}

}  // namespace

void launch_bounds(const Features& f, const float* bias, Bounds* bounds, Type type, cudaStream_t stream) {
  const int blocks = std::min(ceil_div(f.n + f.m, 8), 1024);
  dispatch_type(type, [&](auto t) {
    launch(bounds_kernel<decltype(t)>, dim3(blocks), 256, 0, stream, f, bias, bounds);
  });
}

void launch_lse(const LseParams& p, Type type, Precision precision, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.schedule.programs()));
  dispatch_loop(type, precision, [&](auto loop) {
    using Loop = decltype(loop);
    constexpr size_t kEach = sizeof(float) + (kWithPositives<Loop> ? sizeof(double) : 0);
    if (p.column_sums != nullptr)
      launch(lse_kernel<Loop, true>, grid, Loop::kThreads,
             Loop::kShared + Loop::kWarps * Loop::kColumns * kEach, stream, p);
    else
      launch(lse_kernel<Loop, false>, grid, Loop::kThreads, Loop::kShared, stream, p);
  });
}

void launch_lse_combine(const CombineParams& p, cudaStream_t stream) {
  launch(combine_kernel, dim3(ceil_div(p.n, 128)), 128, 0, stream, p);
}

void launch_lse_online(const OnlineParams& p, Type type, Precision precision, cudaStream_t stream) {
  dispatch_loop(type, precision, [&](auto loop) {
    using Loop = decltype(loop);
    launch(online_kernel<Loop>, dim3(ceil_div(p.pairs.n, Loop::kRows), p.splits), Loop::kThreads,
           Loop::kShared, stream, p);
  });
}

}  // namespace cl_kernels::cuda
