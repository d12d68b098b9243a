#include "gradient_rows.h"

#include "rows.h"

namespace cl_kernels::cuda {
namespace {

// The rules with what is known of the plain ones, so that the compiler leaves the rest out.
template <bool kPlain>
__device__ __forceinline__ GradientRules known(const GradientRules& given) {
  GradientRules rules = given;
  if constexpr (kPlain) {
    rules.pairs.among = kAll;
    rules.pairs.above = false;
    rules.biased = false;
    if (rules.positives == kMask) rules.positives = kNoPositives;
  }
  return rules;
}

bool is_plain(const GradientRules& rules) {
  return rules.pairs.among == kAll && !rules.pairs.above && !rules.biased && rules.positives != kMask;
}

// The plain kernel leaves registers for one more block of a multiprocessor.
template <typename Loop, bool kPlain>
__global__ void __launch_bounds__(Loop::kThreads, kPlain ? Loop::kBlocks : 2)
    gradient_rows_kernel(const GradientRowsParams p) {
  const int first_i = blockIdx.x * Loop::kRows + threadIdx.x / kWarp * 16;
  const GradientRules rules = known<kPlain>(p.rules);
  const OwnTerms own(rules, first_i);
  const float factor = rules.scale.value() * kLog2e, lift = half_lift(rules.bound);
  float sums[Loop::kSums] = {}, softmax[2] = {};
  Loop::template run<true>(p.features, nullptr, 0, 0, p.splits,
                           [&](float (&c)[4 * Loop::kTiles], const unsigned char* y, int first_j) {
                             gradient_of_tile<Loop::kTiles, false>(c, rules, own, others_of(rules, first_j),
                                                                   first_i, first_j, factor, lift, softmax);
                             Loop::add_product(sums, c, y);
                           });
  float* out = p.out + static_cast<int64_t>(blockIdx.y) * p.features.n * p.features.d;
  Loop::store(sums, out, first_i, p.features.n, p.features.d, exp2f(-lift));
}

}  // namespace

void launch_gradient_rows(const GradientRowsParams& p, Type type, cudaStream_t stream) {
  dispatch_rows(type, p.features.d, [&](auto loop) {
    using Loop = decltype(loop);
    const dim3 grid(ceil_div(p.features.n, Loop::kRows), p.splits);
    const auto kernel =
        is_plain(p.rules) ? gradient_rows_kernel<Loop, true> : gradient_rows_kernel<Loop, false>;
    launch(kernel, grid, Loop::kThreads, Loop::template kShared<true>, stream, p);
  });
}

}  // namespace cl_kernels::cuda
