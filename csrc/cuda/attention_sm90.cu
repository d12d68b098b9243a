#include "attention.h"
#include "ptx.h"
#include "rows_sm90.h"

namespace cl_kernels::cuda {

namespace {

struct AttentionKernelParams {
  RowMaps maps;
  AttentionParams problem;
};

// In float16 the weights are scaled by 2^15: they keep their digits down to 2^-29 of the largest.
template <typename T>
constexpr float kHeadroom = std::is_same_v<T, half_t> ? 15.0f : 0.0f;

// A running softmax of a thread's two rows; `total` is of the thread's own columns only.
template <typename T, int kColumns>
struct WeighBySoftmax {
  static constexpr int kSize = kColumns / 2;

  const AttentionParams& p;
  int first_i;
  float factor;
  RowIds ids;
  int index[2];
  float peak[2], total[2], fade[2];
  bool fades;

  __device__ __forceinline__ WeighBySoftmax(const AttentionParams& problem, int first)
      : p(problem),
        first_i(first),
        factor(problem.scale.value() * kLog2e),
        ids(problem.pairs, first),
        peak{kNothing, kNothing},
        total{0.0f, 0.0f},
        fades(false) {
    const Lane lane;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first_i + lane.row + 8 * h;
      index[h] = -1;
      if (p.index != nullptr && i < p.pairs.n) {
        const int key = __ldg(p.index + i) - p.first_key;
        if (key < p.pairs.m) index[h] = key;
      }
    }
  }

  __device__ __forceinline__ void tile(float (&c)[kSize], int first_j, const void*) {
    const bool edge = on_edge(p.pairs, first_i, first_j, 16, kColumns);
    bool hit = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) hit |= index[h] >= first_j && index[h] < first_j + kColumns;
    hit = __any_sync(0xffffffffu, hit);
    float unit = factor;
    if (edge || hit || p.bias != nullptr || p.pairs.among != kAll) {
      finish_logits(c, first_j, edge, hit);
      unit = 1.0f;
    }

    float most[2] = {c[0], c[2]};
    if (unit >= 0.0f) {
#pragma unroll
      for (int x = 0; x < kSize; ++x) most[x / 2 % 2] = fmaxf(most[x / 2 % 2], c[x]);
    } else {
#pragma unroll
      for (int x = 0; x < kSize; ++x) most[x / 2 % 2] = fminf(most[x / 2 % 2], c[x]);
    }
    fades = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float now = fmaxf(peak[h], max_of_row(most[h] * unit) - kHeadroom<T>);
      fade[h] = exp2_fast(peak[h] - now);
      fades |= now > peak[h];
      peak[h] = now;
      total[h] *= fade[h];
    }
    fades = __any_sync(0xffffffffu, fades);
#pragma unroll
    for (int x = 0; x < kSize; ++x) {
      c[x] = exp2_fast(c[x] * unit - peak[x / 2 % 2]);
      total[x / 2 % 2] += c[x];
    }
    if (hit && !p.drop_index) {
      const int column = first_j + Lane().column;
#pragma unroll
      for (int x = 0; x < kSize; ++x)
        if (index[x / 2 % 2] == column + x / 4 * 8 + x % 2) c[x] = 0.0f;
    }
  }

  // c, products, become the logits of what counts, -inf for the rest; in parts, to need fewer registers.
  __device__ __forceinline__ void finish_logits(float (&c)[kSize], int first_j, bool edge, bool hit) const {
#pragma unroll
    for (int part = 0; part < kColumns / 32; ++part) {
      float (&logits)[16] = *reinterpret_cast<float (*)[16]>(c + 16 * part);
      finish_part(logits, first_j + 32 * part, edge, hit);
      wgmma_keep(c);
    }
  }

  __device__ __forceinline__ void finish_part(float (&c)[16], int first_j, bool edge, bool hit) const {
#pragma unroll
    for (int x = 0; x < 16; ++x) c[x] *= factor;
    if (hit) {
      for_elements<4>(first_i, first_j, [&](int t, int e, int i, int j) {
        if (index[e / 2] == j) p.index_logit[i] = c[4 * t + e];
      });
    }
    if (p.bias != nullptr) {
      for_elements<4>(first_i, first_j, [&](int t, int e, int, int j) {
        if (j < p.pairs.m) c[4 * t + e] += __ldg(p.bias + j) * kLog2e;
      });
    }
    if (p.pairs.among != kAll) {
      replace_by_ids<4>(c, ids.of, p.pairs.other_ids + first_j + Lane().column, p.pairs.among == kDifferent,
                        negative_infinity());
    }
    if (edge) replace_what_does_not_count<4>(c, p.pairs, first_i, first_j, negative_infinity());
    if (hit) {
      for_elements<4>(first_i, first_j, [&](int t, int e, int i, int j) {
        if (index[e / 2] != j) return;
        if (p.own_logit != nullptr) p.own_logit[i] = c[4 * t + e];
        if (p.drop_index) c[4 * t + e] = negative_infinity();
      });
    }
  }

  template <int kOut>
  __device__ __forceinline__ void rescale(float (&out)[kOut]) const {
    if (!fades) return;
#pragma unroll
    for (int x = 0; x < kOut; ++x) out[x] *= fade[x / 2 % 2];
  }
};

template <int kWidth>
using AttentionShape = RowShape<kWidth, kWidth <= 128 ? 128 : 64, kWidth <= 128>;

template <typename T, int kWidth, bool kSameValues>
__global__ void __launch_bounds__(kRowThreads, 1)
    attention_kernel(const __grid_constant__ AttentionKernelParams params) {
#ifdef CL_KERNELS_HOPPER
  using Shape = AttentionShape<kWidth>;
  const RowMemory<Shape> memory{dynamic_shared()};
  memory.initialise();
  const AttentionParams& p = params.problem;
  const int n = p.pairs.n, block_i = blockIdx.x * kOwners;
  const TileRange tiles = Shape::tiles_of(p.pairs.m, p.splits, blockIdx.y);
  const int warpgroup = warpgroup_of_thread() - 1;
  if (warpgroup < 0) {
    registers_down<40>();
    if (threadIdx.x == 0) produce<Shape, kSameValues>(memory, params.maps, nullptr, block_i, tiles);
  } else {
    registers_up<232>();
    const int first_i = block_i + warpgroup * (kOwners / 2) + threadIdx.x % kWarpgroup / kWarp * 16;
    WeighBySoftmax<T, Shape::kColumns> weigh(p, first_i);
    float out[kWidth / 2];
    consume<T, Shape, kSameValues>(memory, warpgroup, tiles, weigh, out);
    const Lane lane;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = sum_of_row(weigh.total[h]);
      const int i = first_i + lane.row + 8 * h;
      if (i < n && threadIdx.x % 4 == 0) {
        p.peak[static_cast<int64_t>(blockIdx.y) * n + i] = weigh.peak[h];
        p.total[static_cast<int64_t>(blockIdx.y) * n + i] = total;
      }
    }
    store_rows<kWidth>(p.mean + static_cast<int64_t>(blockIdx.y) * n * p.width, out, 1.0f, first_i, n,
                       p.width);
  }
#else
  __trap();
#endif
}

template <typename T, int kWidth, bool kSameValues>
void launch_shape(const AttentionParams& p, cudaStream_t stream) {
  using Shape = AttentionShape<kWidth>;
  const Features& f = p.features;
  constexpr bool kBfloat16 = std::is_same_v<T, bf16_t>;
  const AttentionKernelParams params{
      {make_tensor_map(f.x, f.x_stride, f.n, f.d, kOwners, kBfloat16),
       make_tensor_map(f.y, f.y_stride, f.m, f.d, Shape::kColumns, kBfloat16),
       make_tensor_map(p.v, p.v_stride, f.m, p.width, Shape::kColumns, kBfloat16)},
      p};
  launch(attention_kernel<T, kWidth, kSameValues>, dim3(ceil_div(f.n, kOwners), p.splits), kRowThreads,
         Shape::kShared, stream, params);
}

template <typename T, int kWidth>
void launch_width(const AttentionParams& p, cudaStream_t stream) {
  const Features& f = p.features;
  if (p.v == f.y && p.v_stride == f.y_stride && p.width == f.d)
    launch_shape<T, kWidth, true>(p, stream);
  else
    launch_shape<T, kWidth, false>(p, stream);
}

}  // namespace

void launch_attention_sm90(const AttentionParams& p, Type type, cudaStream_t stream) {
  const int widest = p.features.d > p.width ? p.features.d : p.width;
  dispatch_half(type, [&](auto element) {
    using T = decltype(element);
    if (widest <= 64)
      launch_width<T, 64>(p, stream);
    else if (widest <= 128)
      launch_width<T, 128>(p, stream);
    else
      launch_width<T, 256>(p, stream);
  });
}

}  // namespace cl_kernels::cuda
