// The portable main loop (sm_80 and up) of kernels with two products a tile, as in attention: S = x y^T, and
// what becomes of S times the values v, for half-precision features of at most kWidth.
//
// A program holds 64 rows of x in shared memory, 16 a warp, and their sums in registers; the rows of y and v,
// which may be the same, stream by in two stages. What mma leaves of S in registers is laid out as its first
// factor, so that the second product reads nothing of S from memory. Features lie in chunks of 64, as in
// tiles.h.
#pragma once

#include "tiles.h"

namespace cl_kernels::cuda {

// Blocks of a multiprocessor up to width 128, as far as registers go. Hopper, which has kernels of its own,
// would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kRowBlocks = 2;
#else
constexpr int kRowBlocks = 3;
#endif

template <typename T, int kWidth>
struct RowLoop {
  using Element = T;
  static constexpr int kThreads = 128;
  static constexpr int kRows = kThreads / kWarp * 16, kColumns = kWidth <= 128 ? 64 : 32;
  static constexpr int kTiles = kColumns / 8;
  static constexpr int kSums = kWidth / 2;  // of a thread
  static constexpr int kTileBytes = kColumns * kWidth * sizeof(T);
  static constexpr int kBlocks = kWidth <= 128 ? kRowBlocks : 2;
  template <bool kSameValues>
  static constexpr int kStageBytes = (kSameValues ? 1 : 2) * kTileBytes;
  template <bool kSameValues>
  static constexpr size_t kShared = kRows * kWidth * sizeof(T) + 2 * kStageBytes<kSameValues>;
  static_assert(kShared<false> <= 99 * 1024, "more shared memory than each GPU of sm_80 and up has");

  // Where rows of kHeld have the 16 bytes that start at feature 8 segment.
  template <int kHeld>
  __device__ static __forceinline__ int place(int row, int segment) {
    return segment / 8 * (kHeld * 128) + segment_at(row, segment % 8);
  }

  // Copies rows [first, first + kHeld); zeros outside the matrix, where nothing is read.
  template <int kHeld>
  __device__ static __forceinline__ void copy(unsigned char* to, const void* from, int64_t stride, int rows,
                                              int d, int first) {
    constexpr int kSegments = kWidth / 8;
    const int segment = threadIdx.x % kSegments, own_row = threadIdx.x / kSegments;
    const int bytes = max(0, min(16, (d - segment * 8) * static_cast<int>(sizeof(T))));
    const T* source = static_cast<const T*>(from) + (first + own_row) * stride + segment * 8;
#pragma unroll
    for (int at = 0; at < kHeld; at += kThreads / kSegments, source += kThreads / kSegments * stride)
      cp_async_16(to + place<kHeld>(own_row + at % 8, segment) + at / 8 * 1024, source,
                  first + own_row + at < rows ? bytes : 0);
  }

  // A block of 16 rows and 16 features from `row` and feature 8 segment on, as four matrices: rows 0 and 8,
  // then the same of the features from 8 on.
  template <int kHeld, bool kTransposed>
  __device__ static __forceinline__ void load(uint32_t (&r)[4], const unsigned char* from, int row,
                                              int segment) {
    const int lane = threadIdx.x % kWarp;
    ldmatrix_x4<kTransposed>(r, from + row * 128 + place<kHeld>(lane % 16, segment + lane / 16));
  }

  // c += the warp's 16 rows of x by all columns of a tile of y.
  __device__ static __forceinline__ void multiply(float (&c)[4 * kTiles], const unsigned char* x,
                                                  const unsigned char* y) {
    const int first_row = threadIdx.x / kWarp * 16;
#pragma unroll
    for (int step = 0; step < kWidth / 16; ++step) {
      uint32_t a[4], b[4];
      load<kRows, false>(a, x, first_row, 2 * step);
#pragma unroll
      for (int pair = 0; pair < kTiles / 2; ++pair) {
        load<kColumns, false>(b, y, 16 * pair, 2 * step);
        mma<T>(tile_of(c, 2 * pair), a, b[0], b[2]);
        mma<T>(tile_of(c, 2 * pair + 1), a, b[1], b[3]);
      }
    }
  }

  // sums += c, rounded, by the values of a tile.
  __device__ static __forceinline__ void add_product(float (&sums)[kSums], const float (&c)[4 * kTiles],
                                                     const unsigned char* v) {
#pragma unroll
    for (int step = 0; step < kColumns / 16; ++step) {
      uint32_t a[4], b[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = pack<T>(c[8 * step + 2 * r], c[8 * step + 2 * r + 1]);
#pragma unroll
      for (int pair = 0; pair < kWidth / 16; ++pair) {
        load<kColumns, true>(b, v, 16 * step, 2 * pair);
        mma<T>(tile_of(sums, 2 * pair), a, b[0], b[1]);
        mma<T>(tile_of(sums, 2 * pair + 1), a, b[2], b[3]);
      }
    }
  }

  // on_tile(c, v, first column) for each tile of the split that the program is, v the tile's values.
  template <bool kSameValues, typename OnTile>
  __device__ static __forceinline__ void run(const Features& f, const void* v, int64_t v_stride, int v_width,
                                             int splits, OnTile on_tile) {
    unsigned char* x = dynamic_shared();
    unsigned char* stages = x + kRows * kWidth * sizeof(T);
    const int blocks = ceil_div(f.m, kBlock), each = ceil_div(blocks, splits);
    const int first = min(static_cast<int>(blockIdx.y) * each, blocks) * kBlock;
    const int last = min(f.m, min((static_cast<int>(blockIdx.y) + 1) * each, blocks) * kBlock);
    auto copy_tile = [&](int first_j, unsigned char* stage) {
      if (first_j < last) {
        copy<kColumns>(stage, f.y, f.y_stride, f.m, f.d, first_j);
        if constexpr (!kSameValues) copy<kColumns>(stage + kTileBytes, v, v_stride, f.m, v_width, first_j);
      }
      cp_async_commit();
    };
    copy<kRows>(x, f.x, f.x_stride, f.n, f.d, blockIdx.x * kRows);
    copy_tile(first, stages);
    int offset = 0;
#pragma unroll 1
    for (int first_j = first; first_j < last; first_j += kColumns) {
      cp_async_wait<0>();
      __syncthreads();
      const unsigned char* y = stages + offset;
      offset ^= kStageBytes<kSameValues>;
      copy_tile(first_j + kColumns, stages + offset);
      float c[4 * kTiles] = {};
      multiply(c, x, y);
      on_tile(c, kSameValues ? y : y + kTileBytes, first_j);
    }
    cp_async_wait<0>();
  }

  // The sums times `unit` to out [n, d], contiguous.
  __device__ static __forceinline__ void store(const float (&sums)[kSums], float* out, int first_i, int n,
                                               int d, float unit) {
    const Lane lane;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first_i + lane.row + 8 * h;
      if (i >= n) continue;
      float* row = out + static_cast<int64_t>(i) * d;
#pragma unroll
      for (int t = 0; t < kWidth / 8; ++t) {
        const int column = 8 * t + lane.column;
        const float low = sums[4 * t + 2 * h] * unit, high = sums[4 * t + 2 * h + 1] * unit;
        if (d % 2 == 0) {
          if (column < d) *reinterpret_cast<float2*>(row + column) = make_float2(low, high);
        } else {
          if (column < d) row[column] = low;
          if (column + 1 < d) row[column + 1] = high;
        }
      }
    }
  }

 private:
  template <int kSize>
  __device__ static __forceinline__ float (&tile_of(float (&c)[kSize], int tile))[4] {
    return *reinterpret_cast<float (*)[4]>(&c[4 * tile]);
  }
};

// f(loop) for the loop of a type and the narrowest width that holds `width` features.
template <typename F>
void dispatch_rows(Type type, int width, F f) {
  auto of_type = [&](auto t) {
    using T = decltype(t);
    if (width <= 64) return f(RowLoop<T, 64>());
    if (width <= 128) return f(RowLoop<T, 128>());
    f(RowLoop<T, 256>());
  };
  if (type == Type::kFloat || width > 256)
    throw std::runtime_error("these kernels take half-precision features, of at most 256");
  if (type == Type::kHalf) return of_type(half_t());
  of_type(bf16_t());
}

}  // namespace cl_kernels::cuda
