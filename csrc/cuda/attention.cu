#include "attention.h"

#include "lse_tile.h"
#include "rows.h"

namespace cl_kernels::cuda {
namespace {

// In float16 the exponentials are scaled by 2^15: they keep their digits down to 2^-29 of the largest.
template <typename T>
constexpr float kHeadroom = std::is_same_v<T, half_t> ? 15.0f : 0.0f;

// The running maximum of a thread's two rows, less the headroom, and the sums of 2^(S - peak) of its columns.
struct Running {
  float peak[2] = {kNothing, kNothing}, total[2] = {};
};

// The logits c become 2^(c - peak); fade: what the sums so far have to be multiplied with.
template <int kTiles>
__device__ __forceinline__ void exponentials(float (&c)[4 * kTiles], Running& running, float headroom,
                                             float (&fade)[2]) {
  float most[2] = {kNothing, kNothing};
#pragma unroll
  for (int x = 0; x < 4 * kTiles; ++x) most[x / 2 % 2] = fmaxf(most[x / 2 % 2], c[x]);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float peak = fmaxf(running.peak[h], max_of_row(most[h]) - headroom);
    fade[h] = exp2_fast(running.peak[h] - peak);
    running.peak[h] = peak;
    running.total[h] *= fade[h];
  }
#pragma unroll
  for (int x = 0; x < 4 * kTiles; ++x) {
    c[x] = exp2_fast(c[x] - running.peak[x / 2 % 2]);
    running.total[x / 2 % 2] += c[x];
  }
}

template <typename Loop, bool kSameValues>
__global__ void __launch_bounds__(Loop::kThreads, Loop::kBlocks) attention_kernel(const AttentionParams p) {
  constexpr int kTiles = Loop::kTiles;
  const PairRules& pairs = p.pairs;
  const Lane lane;
  const int first_i = blockIdx.x * Loop::kRows + threadIdx.x / kWarp * 16;
  const float factor = p.scale.value() * kLog2e;
  int index[2];  // -1: not among these keys
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = first_i + lane.row + 8 * h;
    index[h] = p.index != nullptr && i < pairs.n ? p.index[i] - p.first_key : -1;
    if (index[h] >= pairs.m) index[h] = -1;
  }
  Running running;
  float sums[Loop::kSums] = {};

  auto on_tile = [&](float (&c)[4 * kTiles], const unsigned char* v, int first_j) {
    const bool found = (index[0] >= first_j && index[0] < first_j + Loop::kColumns) ||
                       (index[1] >= first_j && index[1] < first_j + Loop::kColumns);
    // f(c, i) for the thread's logits at `index`.
    auto for_index = [&](auto f) {
      if (!found) return;
      for_elements<kTiles>(first_i, first_j, [&](int t, int e, int i, int j) {
        if (j == index[e / 2]) f(c[4 * t + e], i);
      });
    };
    for_index([&](float& logit, int i) { p.index_logit[i] = logit * factor; });
    logits_of_tile<kTiles>(c, pairs, nullptr, p.bias, first_i, first_j, factor, 0.0f);
    for_index([&](float& logit, int i) {
      if (p.own_logit != nullptr) p.own_logit[i] = logit;
      if (p.drop_index) logit = negative_infinity();
    });
    float fade[2];
    exponentials<kTiles>(c, running, kHeadroom<typename Loop::Element>, fade);
    for_index([&](float& power, int) { power = 0.0f; });
    if (__any_sync(0xffffffffu, fade[0] != 1.0f || fade[1] != 1.0f)) {
#pragma unroll
      for (int x = 0; x < Loop::kSums; ++x) sums[x] *= fade[x / 2 % 2];
    }
    Loop::add_product(sums, c, v);
  };
  Loop::template run<kSameValues>(p.features, p.v, p.v_stride, p.width, p.splits, on_tile);

  const int64_t part = static_cast<int64_t>(blockIdx.y) * pairs.n;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float total = sum_of_row(running.total[h]);
    const int i = first_i + lane.row + 8 * h;
    if (lane.column == 0 && i < pairs.n) {
      p.peak[part + i] = running.peak[h];
      p.total[part + i] = total;
    }
  }
  Loop::store(sums, p.mean + part * p.width, first_i, pairs.n, p.width, 1.0f);
}

}  // namespace

void launch_attention(const AttentionParams& p, Type type, cudaStream_t stream) {
  const Features& f = p.features;
  const bool same_values = p.v == f.y && p.v_stride == f.y_stride && p.width == f.d;
  dispatch_rows(type, std::max(f.d, p.width), [&](auto loop) {
    using Loop = decltype(loop);
    const dim3 grid(ceil_div(f.n, Loop::kRows), p.splits);
    if (same_values)
      launch(attention_kernel<Loop, true>, grid, Loop::kThreads, Loop::template kShared<true>, stream, p);
    else
      launch(attention_kernel<Loop, false>, grid, Loop::kThreads, Loop::template kShared<false>, stream, p);
  });
}

}  // namespace cl_kernels::cuda
