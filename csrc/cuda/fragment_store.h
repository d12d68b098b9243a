// Fragments (pairs.h) to global memory, in 16-byte pieces.
#pragma once

#include "pairs.h"

namespace cl_kernels::cuda {

// Whether rows of T that start every `stride` elements can be written in 16-byte pieces.
template <typename T>
__device__ __forceinline__ bool in_pieces(const T* out, int64_t stride) {
  return stride % Vec<T>::kSize == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
}

// c to out[i][j], rows first_i.. below n and columns first_j.. below m.
//
// In half precision a lane's two elements of a row of 8 columns are 4 bytes. The four lanes of a row exchange
// them among four tiles, in two rounds of shuffles, so that each lane ends up with all 8 columns of one tile.
template <typename T, int kTiles>
__device__ __forceinline__ void store_fragment(const float (&c)[4 * kTiles], T* out, int64_t stride, int n,
                                               int m, int first_i, int first_j) {
  const Lane lane;
  if constexpr (sizeof(T) == 2 && kTiles % 4 == 0) {
    if (in_pieces(out, stride)) {
      const int quad = threadIdx.x % 4;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = first_i + lane.row + 8 * h;
#pragma unroll
        for (int first = 0; first < kTiles; first += 4) {
          uint32_t piece[4];
#pragma unroll
          for (int t = 0; t < 4; ++t)
            piece[t] = pack<T>(c[4 * (first + t) + 2 * h], c[4 * (first + t) + 2 * h + 1]);
          // Transposes the 4 x 4 pieces of lanes and tiles.
#pragma unroll
          for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
            for (int t = 0; t < 4; ++t) {
              if (t & bit) continue;
              const bool high = (quad & bit) != 0;
              const uint32_t given = __shfl_xor_sync(0xffffffffu, high ? piece[t] : piece[t | bit], bit);
              if (high)
                piece[t] = given;
              else
                piece[t | bit] = given;
            }
          }
          const int j = first_j + 8 * (first + quad);
          T* to = out + i * stride + j;
          if (i < n && j + 8 <= m) {
            *reinterpret_cast<uint4*>(to) = make_uint4(piece[0], piece[1], piece[2], piece[3]);
          } else if (i < n) {
#pragma unroll
            for (int x = 0; x < 8; ++x) {
              if (j + x < m)
                *reinterpret_cast<uint16_t*>(to + x) = static_cast<uint16_t>(piece[x / 2] >> x % 2 * 16);
            }
          }
        }
      }
      return;
    }
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first_i + lane.row + 8 * h, j = first_j + 8 * t + lane.column;
      T* to = out + i * stride + j;
      const float* pair = c + 4 * t + 2 * h;
      if constexpr (sizeof(T) == 4) {
        if (i < n && j + 1 < m && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
          *reinterpret_cast<float2*>(to) = make_float2(pair[0], pair[1]);
          continue;
        }
      }
      if (i < n && j < m) to[0] = from_float<T>(pair[0]);
      if (i < n && j + 1 < m) to[1] = from_float<T>(pair[1]);
    }
}

}  // namespace cl_kernels::cuda
