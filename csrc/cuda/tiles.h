// The portable main loop (sm_80 and up): tiles of S = x y^T by mma.sync, fed by cp.async through ldmatrix.
//
// A tile is 128 rows by 64 columns, a warp 16 rows of it. The features go by in chunks of 128 bytes a row,
// held in shared memory with the 16-byte segment s of row r at s ^ (r % 8), so that neither the copies nor
// ldmatrix meet a bank twice. Copies run ahead across tiles: the pipeline does not drain between them.
#pragma once

#include "launch.h"
#include "lse.h"
#include "pairs.h"
#include "ptx.h"

namespace cl_kernels::cuda {

__device__ __forceinline__ int segment_at(int row, int segment) {
  return row * 128 + ((segment ^ (row & 7)) << 4);
}

template <typename T, Precision kPrecision>
struct TileLoop {
  using Element = T;
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kRows = kBlock, kColumns = 64;
  static constexpr int kTiles = kColumns / 8;
  static constexpr int kStages = 3;
  static constexpr int kChunk = 128 / sizeof(T);  // features
  static constexpr int kStageBytes = (kRows + kColumns) * 128;
  static constexpr size_t kShared = kStages * kStageBytes;

  // The tiles of a group, columns slowly, and the chunks of each.
  struct Cursor {
    Group group;
    bool mirrored;
    int chunks, row, column, chunk;

    __device__ Cursor(const Group& group, bool mirrored, int d)
        : group(group),
          mirrored(mirrored),
          chunks(ceil_div(d, kChunk)),
          row(group.row),
          column(group.column * (kBlock / kColumns)),
          chunk(0) {}
    __device__ bool done() const { return column >= group.column_end * (kBlock / kColumns); }
    __device__ bool last_chunk() const { return chunk + 1 == chunks; }
    // Past the diagonal no row of a mirrored column counts.
    __device__ bool last_row() const {
      return row + 1 >= group.row_end || (mirrored && (row + 1) * kRows > column * kColumns + kColumns - 2);
    }
    __device__ void advance() {
      if (!last_chunk()) {
        ++chunk;
        return;
      }
      chunk = 0;
      if (last_row())
        row = group.row, ++column;
      else
        ++row;
    }
  };

  // Copies rows [first, first + kCopied) of a chunk; zeros outside the matrix.
  template <int kCopied>
  __device__ static void copy(unsigned char* to, const void* from, int64_t stride, int rows, int d, int first,
                              int chunk) {
#pragma unroll
    for (int at = 0; at < kCopied * 8; at += kThreads) {
      const int row = (at + threadIdx.x) / 8, segment = threadIdx.x % 8;
      const int column = chunk * kChunk + segment * (16 / static_cast<int>(sizeof(T)));
      const bool inside = first + row < rows && column < d;
      const T* source = static_cast<const T*>(from);
      if (inside) source += (first + row) * stride + column;
      cp_async_16(to + segment_at(row, segment), source,
                  inside ? min(16, (d - column) * static_cast<int>(sizeof(T))) : 0);
    }
  }

  __device__ static void copy_stage(unsigned char* stage, const Features& f, const Cursor& at) {
    copy<kRows>(stage, f.x, f.x_stride, f.n, f.d, at.row * kRows, at.chunk);
    copy<kColumns>(stage + kRows * 128, f.y, f.y_stride, f.m, f.d, at.column * kColumns, at.chunk);
  }

  // c += 16 rows of x by all columns of y, over a chunk.
  __device__ static void multiply(float (&c)[4 * kTiles], const unsigned char* stage) {
    const int lane = threadIdx.x % kWarp, matrix = lane / 8;
    const unsigned char* x = stage;
    const unsigned char* y = stage + kRows * 128;
    const int x_row = threadIdx.x / kWarp * 16 + lane % 8 + matrix % 2 * 8;
    const int y_row = lane % 8 + matrix / 2 * 8;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t a[4];
      ldmatrix_x4(a, x + segment_at(x_row, 2 * step + matrix / 2));
      const Factors left(a);
#pragma unroll
      for (int pair = 0; pair < kTiles / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4(b, y + segment_at(y_row + 16 * pair, 2 * step + matrix % 2));
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          float (&tile)[4] = *reinterpret_cast<float (*)[4]>(&c[4 * (2 * pair + t)]);
          left.multiply(tile, b[2 * t], b[2 * t + 1]);
        }
      }
    }
  }

  // on_tile(c, first row of the warp, first column) for each tile of the group, on_column(first column) after
  // the last tile of a column of tiles.
  template <typename OnTile, typename OnColumn>
  __device__ static void run(const Features& f, const Group& group, bool mirrored, OnTile on_tile,
                             OnColumn on_column) {
    unsigned char* memory = dynamic_shared();
    Cursor ahead(group, mirrored, f.d), at(group, mirrored, f.d);
    auto copy_next = [&](int stage) {
      if (!ahead.done()) {
        copy_stage(memory + stage * kStageBytes, f, ahead);
        ahead.advance();
      }
      cp_async_commit();
    };
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) copy_next(stage);
    float c[4 * kTiles] = {};
    int stage = 0;
    while (!at.done()) {
      cp_async_wait<kStages - 2>();
      __syncthreads();
      copy_next(stage == 0 ? kStages - 1 : stage - 1);
      multiply(c, memory + stage * kStageBytes);
      if (at.last_chunk()) {
        on_tile(c, at.row * kRows + static_cast<int>(threadIdx.x) / kWarp * 16, at.column * kColumns);
#pragma unroll
        for (float& x : c) x = 0.0f;
        if (at.last_row()) on_column(at.column * kColumns);
      }
      at.advance();
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    cp_async_wait<0>();
  }

 private:
  // A fragment of x as the products take it: as it is, rounded to tf32, or as a sum of two tf32.
  struct Factors {
    uint32_t a[4], rest[4];
    __device__ __forceinline__ explicit Factors(const uint32_t (&from)[4]) {
#pragma unroll
      for (int r = 0; r < 4; ++r) split(from[r], a[r], rest[r]);
    }
    __device__ __forceinline__ void multiply(float (&c)[4], uint32_t b0, uint32_t b1) const {
      if constexpr (kPrecision == Precision::kHalf) {
        mma<T>(c, a, b0, b1);
      } else {
        uint32_t high0, high1, rest0, rest1;
        split(b0, high0, rest0);
        split(b1, high1, rest1);
        if constexpr (kPrecision == Precision::kTf32x3) {
          mma_tf32(c, rest, high0, high1);
          mma_tf32(c, a, rest0, rest1);
        }
        mma_tf32(c, a, high0, high1);
      }
    }
    __device__ static __forceinline__ void split(uint32_t x, uint32_t& high, uint32_t& rest) {
      high = x;
      if constexpr (kPrecision != Precision::kHalf) {
        const float value = __uint_as_float(x), rounded = to_tf32(value);
        high = __float_as_uint(rounded);
        if constexpr (kPrecision == Precision::kTf32x3) rest = __float_as_uint(to_tf32(value - rounded));
      }
    }
  };
};

// Blocks of columns that a program visits where nothing is summed over them.
constexpr int kColumnBlocksEach = 4;

// f(loop) for the loop of a type and precision.
template <typename F>
void dispatch_loop(Type type, Precision precision, F f) {
  if (type == Type::kHalf) return f(TileLoop<half_t, Precision::kHalf>());
  if (type == Type::kBf16) return f(TileLoop<bf16_t, Precision::kHalf>());
  if (precision == Precision::kTf32) return f(TileLoop<float, Precision::kTf32>());
  f(TileLoop<float, Precision::kTf32x3>());
}

}  // namespace cl_kernels::cuda
