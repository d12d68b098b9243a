#include "gradient_terms.h"

#include <climits>

#include "launch.h"

namespace cl_kernels::cuda {
namespace {

// A row of minus infinity has an empty denominator: no coefficient, and no part in the range of shifts. What
// has no coefficient counts for the highest shift, which bounds all logits of the block, but not for the
// lowest.
__global__ void __launch_bounds__(kTermsBlock) terms_kernel(const __grid_constant__ BothTermsParams both) {
  const TermsParams& p = blockIdx.y == 0 ? both.rows : both.columns;
  if (static_cast<int>(blockIdx.x) >= terms_blocks(p.n)) return;
  const int at = threadIdx.x, i = blockIdx.x * kTermsBlock + at;
  const bool inside = i < p.n;
  TermsBlock& block = p.blocks[blockIdx.x];
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
  block.shift[at] = shift;
  block.coef[at] = coef;
  block.weight[at] = weight;
  block.level[at] = level;
  block.id[at] = p.ids != nullptr && inside ? p.ids[i] : -1;
  block.bias[at] = p.bias != nullptr && inside ? p.bias[i] : 0.0f;

  const int index = p.index != nullptr && inside ? p.index[i] : -1;
  block.index[at] = index;
  __shared__ int range[2];
  if (at == 0) range[0] = 0, range[1] = -1;
  __syncthreads();
  // The first by a maximum too, of INT_MAX less it.
  if (index >= 0) {
    atomicMax(range, INT_MAX - index);
    atomicMax(range + 1, index);
  }
  __syncthreads();
  if (at == 0) {
    block.high = high;
    block.low = low;
    block.index_low = INT_MAX - range[0];
    block.index_high = range[1];
  }
  if (both.bound != nullptr) {
    const float of_weight = fabsf(weight) * (both.largest_weight != nullptr ? *both.largest_weight : 1.0f);
    const float largest = block_max<kTermsBlock>(fmaxf(fabsf(coef), of_weight));
    // The bits of floats that are not negative are ordered as they are.
    if (at == 0) atomicMax(reinterpret_cast<int*>(both.bound), __float_as_int(largest));
  }
}

}  // namespace

void launch_gradient_terms(const BothTermsParams& p, cudaStream_t stream) {
  const int rows = terms_blocks(p.rows.n), columns = terms_blocks(p.columns.n);
  launch(terms_kernel, dim3(rows > columns ? rows : columns, columns > 0 ? 2 : 1), kTermsBlock, 0, stream, p);
}

}  // namespace cl_kernels::cuda
