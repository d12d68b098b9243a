// Elements of a row, four or a vector at a time. Past the end of a row nothing is read.
#pragma once

#include "device.h"

namespace cl_kernels::cuda {

template <typename T>
struct alignas(4 * sizeof(T)) Quad {
  T x[4];
};

// Elements column.. of a row of d, 0 past its end; the row starts at a multiple of 4 elements where
// `aligned`.
template <typename T>
__device__ __forceinline__ void load_quad(float (&to)[4], const T* row, int column, int d, bool aligned) {
  if (aligned && column + 4 <= d) {
    const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(row + column);
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e] = to_float(quad.x[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e] = column + e < d ? to_float(row[column + e]) : 0.0f;
  }
}

// The same of as many elements as 16 bytes have, of a row that starts at a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void load_elements(float (&to)[Vec<T>::kSize], const T* row, int column, int d) {
  if (column + Vec<T>::kSize <= d) {
    const Vec<T> v = load_vec(row + column);
#pragma unroll
    for (int e = 0; e < Vec<T>::kSize; ++e) to[e] = to_float(v.x[e]);
  } else {
#pragma unroll
    for (int e = 0; e < Vec<T>::kSize; ++e) to[e] = column + e < d ? to_float(row[column + e]) : 0.0f;
  }
}

template <typename T>
__device__ __forceinline__ void store_quad(T* row, const float (&from)[4], int column, int d, bool aligned) {
  if (aligned && column + 4 <= d) {
    Quad<T> quad;
#pragma unroll
    for (int e = 0; e < 4; ++e) quad.x[e] = from_float<T>(from[e]);
    *reinterpret_cast<Quad<T>*>(row + column) = quad;
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (column + e < d) row[column + e] = from_float<T>(from[e]);
  }
}

}  // namespace cl_kernels::cuda
