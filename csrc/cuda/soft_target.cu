#include "soft_target.h"

#include "launch.h"
#include "ptx.h"
#include "quads.h"

namespace cl_kernels::cuda {
namespace {

constexpr int kThreads = 256;     // share a row of logits
constexpr int kRowThreads = 128;  // a warp for each row of features
constexpr double kExactLog2e = 1 / kLn2;

// log2 of sum 2^peak, and of 2^logit where there is one `more`; -inf of nothing. In double: beside the logit
// of a converged row the others' sum keeps its digits.
__device__ __forceinline__ double log_sum(float peak, double sum, bool more, double logit) {
  const double top = more ? fmax(static_cast<double>(peak), logit) : peak;
  const double total = sum * exp2(peak - top) + (more ? exp2(logit - top) : 0.0);
  return total == 0.0 ? -HUGE_VAL : top + log2(total);
}

// Largest of [slots] of row i, and the sum of totals seen from there; by a warp.
__device__ __forceinline__ float peak_of(const float* peak, int slots, int n, int i) {
  float most = kNothing;
  for (int slot = threadIdx.x % kWarp; slot < slots; slot += kWarp)
    most = fmaxf(most, peak[static_cast<int64_t>(slot) * n + i]);
  return warp_max(most);
}
__device__ __forceinline__ double total_of(const float* peak, const float* total, float most, int slots,
                                           int n, int i) {
  double sum = 0.0;
  for (int slot = threadIdx.x % kWarp; slot < slots; slot += kWarp) {
    const int64_t at = static_cast<int64_t>(slot) * n + i;
    sum += static_cast<double>(total[at]) * exp2f(peak[at] - most);
  }
  return warp_sum(sum);
}

// Four columns of row i of the mean.
__device__ __forceinline__ void mean_of(float (&sum)[4], const float* mean, const float* peak, double lse2,
                                        int slots, int n, int d, int i, int column) {
#pragma unroll
  for (int e = 0; e < 4; ++e) sum[e] = 0.0f;
  if (lse2 == -HUGE_VAL) return;
#pragma unroll 4
  for (int slot = 0; slot < slots; ++slot) {
    const int64_t at = static_cast<int64_t>(slot) * n + i;
    const float fade = exp2f(static_cast<float>(peak[at] - lse2));
    float part[4];
    load_quad(part, mean + at * d, column, d, d % 4 == 0);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += part[e] * fade;
  }
}

// A warp a row. The teacher's mean of S is the logit of its mean key.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) combine_kernel(const SoftTargetCombineParams p) {
  const int i = blockIdx.x * (kRowThreads / kWarp) + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (i >= p.n) return;
  const int own = p.positive != nullptr ? p.positive[i] : -1;
  const bool has_own = own >= 0 && own < p.columns, has_zero = has_own && p.zero;
  const double logit = has_own ? p.logit[i] : 0.0;
  const float peak = peak_of(p.peak, p.slots, p.n, i), target_peak = peak_of(p.target_peak, p.slots, p.n, i);
  const double total = total_of(p.peak, p.total, peak, p.slots, p.n, i);
  const double target_total = total_of(p.target_peak, p.target_total, target_peak, p.slots, p.n, i);
  const double lse2 = log_sum(peak, total, has_own, logit);
  const double target_lse2 = log_sum(target_peak, target_total, has_zero, 0.0);

  const T* q = static_cast<const T*>(p.q) + i * p.q_stride;
  const int64_t row = static_cast<int64_t>(i) * p.d;
  double dot = 0.0;
  for (int column = 4 * lane; column < p.d; column += 4 * kWarp) {
    float mean[4], of_q[4];
    mean_of(mean, p.target_mean, p.target_peak, target_lse2, p.slots, p.n, p.d, i, column);
    load_quad(of_q, q, column, p.d, true);
#pragma unroll
    for (int e = 0; e < 4; ++e) dot += of_q[e] * mean[e];
    if (p.mean_key == nullptr) continue;
    store_quad(p.mean_target_key + row, mean, column, p.d, p.d % 4 == 0);
    mean_of(mean, p.mean, p.peak, lse2, p.slots, p.n, p.d, i, column);
    store_quad(p.mean_key + row, mean, column, p.d, p.d % 4 == 0);
  }
  dot = warp_sum(dot);
  if (lane != 0) return;
  p.rows.lse[i] = lse2 * kLn2;
  p.rows.target_lse[i] = target_lse2 * kLn2;
  p.rows.cross[i] = p.scale.value() * dot + (has_zero ? exp2(-target_lse2) * logit * kLn2 : 0.0);
  if (p.rows.positive_sum != nullptr) p.rows.positive_sum[i] = logit * kLn2;
}

struct Four {
  float x[4];
};
__device__ __forceinline__ Four load_four(const float* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}

// A block a row, once over it: each thread has maxima, sums, and the teacher's mean of S seen from a pivot,
// the thread's first maximum of S, of its own columns without the positive.
__global__ void __launch_bounds__(kThreads) statistics_kernel(const SoftTargetStatisticsParams p) {
  const SoftTargetLogits& logits = p.logits;
  __shared__ float logit_of_own;
  const int i = blockIdx.x;
  const int64_t row = static_cast<int64_t>(i) * logits.width;
  const float factor = logits.scale.value() * kLog2e, target_factor = logits.target_scale.value() * kLog2e;
  const int own = logits.positive != nullptr ? logits.positive[i] : -1;
  float peak = kNothing, target_peak = kNothing, pivot = kNothing;
  float sum = 0.0f, target_sum = 0.0f, beside = 0.0f;
  for (int column = 4 * threadIdx.x; column < logits.width; column += 4 * kThreads) {
    Four s = load_four(logits.s + row + column), t = load_four(logits.t + row + column);
    float most = peak, target_most = target_peak;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool filling = s.x[e] == negative_infinity();  // whatever the sign of the scale
      s.x[e] = filling ? s.x[e] : s.x[e] * factor;
      t.x[e] = filling ? t.x[e] : t.x[e] * target_factor;
      if (column + e == own) {
        logit_of_own = s.x[e];
        s.x[e] = t.x[e] = negative_infinity();
      }
      most = fmaxf(most, s.x[e]);
      target_most = fmaxf(target_most, t.x[e]);
    }
    if (pivot == kNothing) pivot = most;
    const float fade = exp2_fast(target_peak - target_most);
    sum *= exp2_fast(peak - most);
    target_sum *= fade;
    beside *= fade;
    peak = most;
    target_peak = target_most;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float weight = exp2_fast(t.x[e] - target_peak);
      sum += exp2_fast(s.x[e] - peak);
      target_sum += weight;
      // Also of no weight a NaN counts; what is left out does not.
      beside += t.x[e] != negative_infinity() ? weight * (s.x[e] - pivot) : 0.0f;
    }
  }
  const float top = block_max<kThreads>(peak), target_top = block_max<kThreads>(target_peak);
  const double weight = exp2f(target_peak - target_top);
  const double total = block_sum<kThreads>(static_cast<double>(sum) * exp2f(peak - top));
  const double target_total = block_sum<kThreads>(target_sum * weight);
  const double weighted = block_sum<kThreads>((beside + static_cast<double>(target_sum) * pivot) * weight);
  if (threadIdx.x != 0) return;
  const bool has_own = own >= 0 && own < logits.width, has_zero = has_own && logits.zero;
  const double logit = has_own ? logit_of_own : 0.0;
  const double lse2 = log_sum(top, total, has_own, logit);
  const double target_lse2 = log_sum(target_top, target_total, has_zero, 0.0);
  double cross2 = 0.0;
  if (target_lse2 != -HUGE_VAL)
    cross2 = weighted * exp2(target_top - target_lse2) + (has_zero ? exp2(-target_lse2) * logit : 0.0);
  p.rows.lse[i] = lse2 * kLn2;
  p.rows.target_lse[i] = target_lse2 * kLn2;
  p.rows.cross[i] = cross2 * kLn2;
  if (p.rows.positive_sum != nullptr) p.rows.positive_sum[i] = logit * kLn2;
}

// The incoming gradients of a row, 0 for a softmax over nothing.
struct Incoming {
  double lse, target_lse, cross, positive;
  __device__ __forceinline__ Incoming(const SoftTargetGradients& g, int i)
      : lse(g.of_lse.at(i)),
        target_lse(g.of_target_lse.at(i)),
        cross(g.of_cross.at(i)),
        positive(g.of_positive.at(i)) {
    if (g.lse[i] == -HUGE_VAL) lse = 0.0;
    if (g.target_lse[i] == -HUGE_VAL) target_lse = cross = 0.0;
  }
};

// G at the positive. In a converged row P - 1 is all that is left of it.
__device__ __forceinline__ double at_positive(const SoftTargetGradients& g, const Incoming& incoming,
                                              bool zero, int i) {
  double weight = incoming.lse * expm1(g.positive_sum[i] - g.lse[i]) + (incoming.lse + incoming.positive);
  if (zero) weight += incoming.cross * exp(-g.target_lse[i]);
  return weight;
}

// A log-sum-exp is split into a float shift and a rest in the coefficient: the difference of a logit and the
// shift is as exact as the logit.
struct RowTerms {
  float shift, target_shift;
  float of_s, of_t;         // G = of_s 2^(S - shift) + of_t 2^(T - target_shift)
  float at_own;             // G at the positive
  float plain, slope;       // H = 2^(T - target_shift) (plain + slope (S - cross))
  float cross, cross_rest;  // base 2, their sum
};

__device__ __forceinline__ double base_2(double lse) {
  return lse == -HUGE_VAL ? 0.0 : lse * kExactLog2e;
}

__device__ __forceinline__ RowTerms terms_of(const SoftTargetMatricesParams& p, int i, bool has_own) {
  const SoftTargetGradients& g = p.gradients;
  const double factor = p.factor.value(), target_factor = p.target_factor.value();
  const double lse2 = base_2(g.lse[i]), target_lse2 = base_2(g.target_lse[i]),
               cross2 = g.cross[i] * kExactLog2e;
  RowTerms terms;
  terms.shift = static_cast<float>(lse2);
  terms.target_shift = static_cast<float>(target_lse2);
  const double rest = exp2(terms.shift - lse2), target_rest = exp2(terms.target_shift - target_lse2);
  terms.cross = static_cast<float>(cross2);
  terms.cross_rest = static_cast<float>(cross2 - terms.cross);
  if (p.means) {
    terms.of_s = static_cast<float>(rest * factor);
    terms.plain = g.target_lse[i] == -HUGE_VAL ? 0.0f : static_cast<float>(target_rest * target_factor);
    terms.of_t = terms.slope = terms.at_own = 0.0f;
    return terms;
  }
  const Incoming incoming(g, i);
  terms.of_s = static_cast<float>(incoming.lse * rest * factor);
  terms.of_t = static_cast<float>(incoming.cross * target_rest * factor);
  terms.at_own = has_own ? static_cast<float>(at_positive(g, incoming, p.logits.zero, i) * factor) : 0.0f;
  terms.plain = static_cast<float>(incoming.target_lse * target_rest * target_factor);
  terms.slope = static_cast<float>(incoming.cross * target_rest * target_factor * kLn2);
  return terms;
}

// A block a row. What a thread writes lies at or before what it has read: one barrier in between is enough.
template <typename T>
__global__ void __launch_bounds__(kThreads) matrices_kernel(const SoftTargetMatricesParams p) {
  const SoftTargetLogits& logits = p.logits;
  __shared__ RowTerms shared_terms;
  const int i = blockIdx.x;
  const int64_t row = static_cast<int64_t>(i) * logits.width;
  const float scale = logits.scale.value() * kLog2e, target_scale = logits.target_scale.value() * kLog2e;
  const int own = logits.positive != nullptr ? logits.positive[i] : -1;
  if (threadIdx.x == 0) shared_terms = terms_of(p, i, own >= 0 && own < logits.width);
  __syncthreads();
  const RowTerms terms = shared_terms;
  T* g_row = reinterpret_cast<T*>(logits.s + row);
  T* h_row = reinterpret_cast<T*>(logits.t + row);
  double along = 0.0, target_along = 0.0;
  for (int first = 0; first < logits.width; first += 4 * kThreads) {
    const int column = first + 4 * threadIdx.x;
    const bool inside = column < logits.width;
    float g[4], h[4];
    if (inside) {
      const Four s = load_four(logits.s + row + column), t = load_four(logits.t + row + column);
      float dot = 0.0f, target_dot = 0.0f;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool filling = s.x[e] == negative_infinity();
        const float dots = filling ? 0.0f : s.x[e], target_dots = filling ? 0.0f : t.x[e];
        const float logit = dots * scale, target = exp2_fast(target_dots * target_scale - terms.target_shift);
        const float centred = (logit - terms.cross) - terms.cross_rest;
        g[e] = terms.of_s * exp2_fast(logit - terms.shift) + terms.of_t * target;
        h[e] = target * (terms.plain + terms.slope * centred);
        if (column + e == own) g[e] = terms.at_own, h[e] = 0.0f;
        if (filling) g[e] = h[e] = 0.0f;
        dot += g[e] * dots;
        target_dot += h[e] * target_dots;
      }
      along += dot;
      target_along += target_dot;
    }
    if constexpr (sizeof(T) < sizeof(float)) __syncthreads();
    if (inside && p.write_g) store_quad(g_row, g, column, logits.width, true);
    if (inside && p.write_h) store_quad(h_row, h, column, logits.width, true);
  }
  if (p.along != nullptr) {
    along = block_sum<kThreads>(along);
    if (threadIdx.x == 0) p.along[i] = along / p.factor.value();
  }
  if (p.target_along != nullptr) {
    target_along = block_sum<kThreads>(target_along);
    if (threadIdx.x == 0) p.target_along[i] = target_along / p.target_factor.value();
  }
}

// 2^(14 - e), with 2^(e - 1) <= bound < 2^e, and e at least -100.
__device__ __forceinline__ float factor_of(float bound) {
  const int exponent = bound > 0.0f ? max((__float_as_int(bound) >> 23) - 126, -100) : 0;
  return __int_as_float((127 + 14 - exponent) << 23);
}

// The teacher's mean of S - cross is 0 and S is at most lse, so that no softmax(T)_j |S_j - cross| exceeds
// lse - cross.
__global__ void __launch_bounds__(kThreads) factors_kernel(const SoftTargetFactorsParams p) {
  const SoftTargetGradients& gradients = p.gradients;
  float bound = 0.0f, target_bound = 0.0f;
  for (int i = threadIdx.x; i < p.n; i += kThreads) {
    const Incoming g(gradients, i);
    const double spread = g.cross != 0.0 ? gradients.lse[i] - gradients.cross[i] : 0.0;
    bound = fmaxf(bound, static_cast<float>(fabs(g.lse) + fabs(g.cross) + fabs(g.positive)));
    target_bound = fmaxf(target_bound, static_cast<float>(fabs(g.target_lse) + fabs(g.cross) * fabs(spread)));
  }
  bound = block_max<kThreads>(bound);
  target_bound = block_max<kThreads>(target_bound);
  if (threadIdx.x != 0) return;
  p.factors[0] = factor_of(bound);
  p.factors[1] = factor_of(target_bound);
}

// A warp a row.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) from_means_kernel(const SoftTargetFromMeansParams p) {
  const int i = blockIdx.x * (kRowThreads / kWarp) + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (i >= p.n) return;
  const Incoming incoming(p.gradients, i);
  const float of_mean = static_cast<float>(incoming.lse), of_target_mean = static_cast<float>(incoming.cross);
  const float scale = p.scale.value();
  const T* key = nullptr;
  int64_t step = 0;
  float weight = 0.0f;
  if (const int own = p.positive != nullptr ? p.positive[i] : -1; own >= 0) {
#pragma unroll
    for (int s = 0; s < kMostSegments; ++s) {
      const int at = own - p.segment[s].first;
      if (s < p.segments && at >= 0 && at < p.segment[s].columns) {
        key = static_cast<const T*>(p.segment[s].k) + at * p.segment[s].stride;
        step = p.segment[s].step;
      }
    }
  }
  if (key != nullptr) weight = static_cast<float>(at_positive(p.gradients, incoming, p.zero, i));
  const T* q = static_cast<const T*>(p.q) + i * p.q_stride;
  const int64_t row = static_cast<int64_t>(i) * p.d;
  double along = 0.0;
  for (int column = lane; column < p.d; column += kWarp) {
    float grad = of_mean * p.mean_key[row + column] + of_target_mean * p.mean_target_key[row + column];
    if (key != nullptr) grad += weight * to_float(key[column * step]);
    along += to_float(q[column * p.q_step]) * grad;
    if (p.grad != nullptr) static_cast<T*>(p.grad)[row + column] = from_float<T>(grad * scale);
  }
  along = warp_sum(along);
  if (lane == 0) p.along[i] = along;
}

dim3 warps_for(int n) {
  return dim3(ceil_div(n, kRowThreads / kWarp));
}

}  // namespace

void launch_soft_target_combine(const SoftTargetCombineParams& p, Type type, cudaStream_t stream) {
  dispatch_half(
      type, [&](auto t) { launch(combine_kernel<decltype(t)>, warps_for(p.n), kRowThreads, 0, stream, p); });
}

void launch_soft_target_statistics(const SoftTargetStatisticsParams& p, cudaStream_t stream) {
  launch(statistics_kernel, dim3(p.logits.n), kThreads, 0, stream, p);
}

void launch_soft_target_matrices(const SoftTargetMatricesParams& p, Type type, cudaStream_t stream) {
  dispatch_type(
      type, [&](auto t) { launch(matrices_kernel<decltype(t)>, dim3(p.logits.n), kThreads, 0, stream, p); });
}

void launch_soft_target_factors(const SoftTargetFactorsParams& p, cudaStream_t stream) {
  launch(factors_kernel, dim3(1), kThreads, 0, stream, p);
}

void launch_soft_target_from_means(const SoftTargetFromMeansParams& p, Type type, cudaStream_t stream) {
  dispatch_type(type, [&](auto t) {
    launch(from_means_kernel<decltype(t)>, warps_for(p.n), kRowThreads, 0, stream, p);
  });
}

}  // namespace cl_kernels::cuda
