#include "gradient_terms.h"

#include <climits>

#include "launch.h"

namespace cl_kernels::cuda {
namespace {

// A row of minus infinity has an empty denominator: no coefficient, and no part in the range of shifts. What
// has no coefficient counts for the highest shift, which bounds all logits of the block, but not for the
// lowest.
__global__ void __launch_bounds__(kTermsBlock) terms_kernel(const TermsParams p) {
  const int i = blockIdx.x * kTermsBlock + threadIdx.x;
  const bool inside = i < p.n;
  float shift = 0.0f, coef = 0.0f, weight = 0.0f, level = 0.0f;
  float high = kNothing, low = -kNothing;
  if (p.grad != nullptr) {
    const double exact = inside ? p.lse[i] * (1.0 / kLn2) : -HUGE_VAL;
    const bool empty = exact == -HUGE_VAL;
    if (!empty) {
      shift = static_cast<float>(exact);
      coef = static_cast<float>(p.grad[i * p.grad_stride]) * exp2f(static_cast<float>(shift - exact));
    }
    high = block_max<kTermsBlock>(empty ? kNothing : shift);
    low = -block_max<kTermsBlock>(coef != 0.0f ? -shift : kNothing);
    if (coef != 0.0f) level = coef * exp2f(high - shift);
  }
  if (p.weight_grad != nullptr && inside)
    weight = static_cast<float>(p.weight_grad[i * p.weight_grad_stride]);
  p.shift[i] = shift;
  p.coef[i] = coef;
  p.weight[i] = weight;
  p.level[i] = level;

  int first = INT_MAX, last = -1;
  if (p.index != nullptr) {
    __shared__ int range[2];
    if (threadIdx.x == 0) range[0] = 0, range[1] = -1;
    __syncthreads();
    // The first by a maximum too, of INT_MAX less it.
    const int index = inside ? p.index[i] : -1;
    if (index >= 0) {
      atomicMax(range, INT_MAX - index);
      atomicMax(range + 1, index);
    }
    __syncthreads();
    first = INT_MAX - range[0], last = range[1];
  }
  if (threadIdx.x == 0) {
    p.high[blockIdx.x] = high;
    p.low[blockIdx.x] = low;
    p.index_low[blockIdx.x] = first;
    p.index_high[blockIdx.x] = last;
  }
  if (p.bound != nullptr) {
    const float of_weight = fabsf(weight) * (p.largest_weight != nullptr ? *p.largest_weight : 1.0f);
    const float largest = block_max<kTermsBlock>(fmaxf(fabsf(coef), of_weight));
    // The bits of floats that are not negative are ordered as they are.
    if (threadIdx.x == 0) atomicMax(reinterpret_cast<int*>(p.bound), __float_as_int(largest));
  }
}

}  // namespace

void launch_gradient_terms(const TermsParams& p, cudaStream_t stream) {
  launch(terms_kernel, dim3(p.padded / kTermsBlock), kTermsBlock, 0, stream, p);
}

}  // namespace cl_kernels::cuda
