// What all kernels share: element types, vector loads, reductions, constants.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

// What only kernels use; host files see the parameters of kernels and no more.
#if defined(__CUDACC__) || defined(CL_KERNELS_EMULATED)
#define CL_KERNELS_DEVICE 1
#endif

namespace cl_kernels::cuda {

using half_t = __half;
using bf16_t = __nv_bfloat16;

enum class Type { kFloat, kHalf, kBf16 };

// f(T{}) for the element type T.
template <typename F>
void dispatch_type(Type type, F f) {
  switch (type) {
    case Type::kFloat:
      return f(float{});
    case Type::kHalf:
      return f(half_t{});
    case Type::kBf16:
      return f(bf16_t{});
  }
}

// The same where the type is not float.
template <typename F>
void dispatch_half(Type type, F f) {
  if (type == Type::kHalf) return f(half_t{});
  f(bf16_t{});
}

constexpr float kLog2e = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;
constexpr int kWarp = 32;
// Stands for the maximum of nothing: finite, so that no difference of two of them is NaN.
constexpr float kNothing = -1e30f;

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <typename T>
__host__ __device__ constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

// A scalar argument: in device memory where it is a tensor there, so that nothing waits for it.
struct Scalar {
  const float* device;  // or null
  float host;
  __device__ __forceinline__ float value() const { return device != nullptr ? *device : host; }
};

#ifdef CL_KERNELS_DEVICE

__device__ __forceinline__ float negative_infinity() {
  return -__int_as_float(0x7f800000);
}

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(half_t x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_float(bf16_t x) {
  return __bfloat162float(x);
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, half_t>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, bf16_t>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

// Two floats as a pair of half-precision elements, the first in the low bits.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, half_t>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// 16 bytes of elements.
template <typename T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

template <typename T>
__device__ __forceinline__ Vec<T> load_vec(const T* from) {
  Vec<T> v;
  *reinterpret_cast<uint4*>(&v) = *reinterpret_cast<const uint4*>(from);
  return v;
}

template <typename T>
__device__ __forceinline__ void store_vec(T* to, const Vec<T>& v) {
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&v);
}

// Two neighbouring floats or ints, the first at a multiple of 8 bytes.
template <typename Pair, typename T>
__device__ __forceinline__ Pair load_pair(const T* from) {
  return *reinterpret_cast<const Pair*>(from);
}

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

// Over all threads of a block of kThreads, in a fixed order; every thread gets the result.
template <int kThreads, typename T>
__device__ __forceinline__ T block_sum(T x) {
  __shared__ T of_warps[kThreads / kWarp];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  T total = of_warps[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarp; ++warp) total += of_warps[warp];
  return total;
}

template <int kThreads>
__device__ __forceinline__ float block_max(float x) {
  __shared__ float of_warps[kThreads / kWarp];
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  float most = of_warps[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarp; ++warp) most = fmaxf(most, of_warps[warp]);
  return most;
}

#endif  // CL_KERNELS_DEVICE

}  // namespace cl_kernels::cuda
