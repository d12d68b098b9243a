#include "gradient_rows.h"
#include "rows_sm90.h"

namespace cl_kernels::cuda {

namespace {

struct GradientKernelParams {
  RowMaps maps;
  GradientRules rules;
  int d, splits;
  float* out;  // [splits, n, d]
};

// Plain problems leave nothing out by label, and have no bias and no mask. The code for all of these takes
// too many registers to be there twice, as overlapping the products would have it.
template <int kWidth, bool kPlain>
using GradientShape = RowShape<kWidth, kWidth <= 128 ? 128 : 64, kPlain,
                               (kWidth <= 128 ? 128 : 64) / kTermsBlock * sizeof(TermsBlock)>;

bool is_plain(const GradientRules& rules) {
  return rules.pairs.among == kAll && !rules.biased && rules.positives != kMask;
}

template <bool kPlain>
__device__ __forceinline__ GradientRules known_rules(const GradientRules& given) {
  GradientRules rules = given;
  rules.pairs.above = false;
  if (kPlain) {
    rules.pairs.among = kAll;
    rules.biased = false;
    if (rules.positives == kMask) rules.positives = kNoPositives;
  }
  return rules;
}

template <int kColumns>
struct WeighByGradient {
  const GradientRules& rules;
  OwnTerms own;
  int first_i;
  float factor, lift;

  __device__ __forceinline__ void tile(float (&c)[kColumns / 2], int first_j, const void* terms) const {
    // In the blocks that share a level.
    constexpr int kPart = kTermsBlock, kSize = kPart / 2;
    const TermsBlock* others = static_cast<const TermsBlock*>(terms);
#pragma unroll
    for (int part = 0; part < kColumns / kPart; ++part) {
      float (&of_part)[kSize] = *reinterpret_cast<float (*)[kSize]>(c + part * kSize);
      float sums[2];
      gradient_of_tile<kPart / 8, false>(of_part, rules, own, others[part], first_i, first_j + part * kPart,
                                         factor, lift, sums);
      wgmma_keep(c);
    }
  }
  template <int kSize>
  __device__ __forceinline__ void rescale(float (&)[kSize]) const {}
};

template <typename T, int kWidth, bool kPlain>
__global__ void __launch_bounds__(kRowThreads, 1)
    gradient_rows_kernel(const __grid_constant__ GradientKernelParams p) {
#ifdef CL_KERNELS_HOPPER
  using Shape = GradientShape<kWidth, kPlain>;
  const RowMemory<Shape> memory{dynamic_shared()};
  memory.initialise();
  const PairRules& pairs = p.rules.pairs;
  const int block_i = blockIdx.x * kOwners;
  const TileRange tiles = Shape::tiles_of(pairs.m, p.splits, blockIdx.y);
  const int warpgroup = warpgroup_of_thread() - 1;
  if (warpgroup < 0) {
    registers_down<40>();
    if (threadIdx.x == 0) produce<Shape, true>(memory, p.maps, p.rules.other.blocks, block_i, tiles);
  } else {
    registers_up<232>();
    const int first_i = block_i + warpgroup * (kOwners / 2) + threadIdx.x % kWarpgroup / kWarp * 16;
    const GradientRules rules = known_rules<kPlain>(p.rules);
    WeighByGradient<Shape::kColumns> weigh{rules, OwnTerms(rules, first_i), first_i,
                                           rules.scale.value() * kLog2e, half_lift(rules.bound)};
    float out[kWidth / 2];
    consume<T, Shape, true>(memory, warpgroup, tiles, weigh, out);
    float* part = p.out + static_cast<int64_t>(blockIdx.y) * pairs.n * p.d;
    store_rows<kWidth>(part, out, exp2f(-weigh.lift), first_i, pairs.n, p.d);
  }
#else
  __trap();
#endif
}

template <typename T, int kWidth, bool kPlain>
void launch_shape(const GradientRowsParams& p, cudaStream_t stream) {
  using Shape = GradientShape<kWidth, kPlain>;
  const Features& f = p.features;
  constexpr bool kBfloat16 = std::is_same_v<T, bf16_t>;
  const TensorMap y = make_tensor_map(f.y, f.y_stride, f.m, f.d, Shape::kColumns, kBfloat16);
  const GradientKernelParams params{
      {make_tensor_map(f.x, f.x_stride, f.n, f.d, kOwners, kBfloat16), y, y}, p.rules, f.d, p.splits, p.out};
  launch(gradient_rows_kernel<T, kWidth, kPlain>, dim3(ceil_div(f.n, kOwners), p.splits), kRowThreads,
         Shape::kShared, stream, params);
}

template <typename T, int kWidth>
void launch_width(const GradientRowsParams& p, cudaStream_t stream) {
  if (kWidth < 256 && is_plain(p.rules))
    launch_shape<T, kWidth, (kWidth < 256)>(p, stream);
  else
    launch_shape<T, kWidth, false>(p, stream);
}

}  // namespace

void launch_gradient_rows_sm90(const GradientRowsParams& p, Type type, cudaStream_t stream) {
  dispatch_half(type, [&](auto element) {
    using T = decltype(element);
    if (p.features.d <= 64)
      launch_width<T, 64>(p, stream);
    else if (p.features.d <= 128)
      launch_width<T, 128>(p, stream);
    else
      launch_width<T, 256>(p, stream);
  });
}

}  // namespace cl_kernels::cuda
