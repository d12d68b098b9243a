// The main loop of Hopper's kernels by rows (sm_90a): two products a tile, out = sum_j W_j v_j of the weights
// W_j = f(x y_j^T), as in FlashAttention-3.
//
// A block owns kOwners rows of x, which stay in shared memory, and walks tiles of kColumns rows of y and v. A
// producer warp keeps a ring of tiles filled by bulk copies; each of two warpgroups of consumers takes half
// of the rows. A consumer issues the product of tile j with x and then that of tile j - 1's weights with its
// values, so that the second runs while the warpgroup turns the first into weights; between the two
// warpgroups the products take turns. Where the values are y itself, one tile in shared memory serves both
// products, along its rows in the first and across them in the second, and with it comes what else the
// weights take of its rows.
#pragma once

#include "launch.h"
#include "schedule.h"
#include "wgmma.h"

#if defined(CL_KERNELS_WGMMA) || defined(CL_KERNELS_EMULATED)
#define CL_KERNELS_HOPPER 1
#endif

namespace cl_kernels::cuda {

constexpr int kRowThreads = 3 * kWarpgroup;
constexpr int kOwners = 128;
constexpr int kConsumerWarps = 8;

// Where the tiles of one program lie.
struct TileRange {
  int first, count;
};

struct RowMaps {
  TensorMap x, y, v;
};

template <int kWidth_, int kColumns_, bool kOverlaps_, int kTermBytes_ = 0>
struct RowShape {
  static constexpr int kWidth = kWidth_, kColumns = kColumns_;
  static constexpr bool kOverlaps = kOverlaps_;
  static constexpr int kTermBytes = kTermBytes_;  // of what else a tile's rows bring
  static constexpr int kChunks = kWidth / kBoxColumns;
  static constexpr int kOwnerChunk = kOwners * 128;  // bytes of 64 features
  static constexpr int kTileChunk = kColumns * 128;
  static constexpr int kOwnerBytes = kChunks * kOwnerChunk;
  static constexpr int kTileBytes = kChunks * kTileChunk;
  static constexpr int kStageBytes = kTileBytes + kTermBytes;
  static constexpr int kMostShared = 227 * 1024, kMostStages = kWidth == 64 ? 6 : 5;
  static constexpr int kFit = (kMostShared - kOwnerBytes - 128) / kStageBytes;
  static constexpr int kStages = kFit < kMostStages ? kFit : kMostStages;
  static constexpr int kBarriers = 2 * kStages + 3;
  static_assert(kTermBytes % 16 == 0);
  static_assert(kBarriers * sizeof(uint64_t) <= 128, "more barriers than there is room for");
  static constexpr size_t kShared = kOwnerBytes + kStages * kStageBytes + kBarriers * sizeof(uint64_t);
  // Taking turns pays where the exponentials take about as long as the products.
  static constexpr bool kTurns = kWidth <= 128;

  // Split s of the blocks of others that the kernels' parameters speak of.
  __host__ __device__ static TileRange tiles_of(int m, int splits, int split) {
    constexpr int kEach = kBlock / kColumns;
    const int each = ceil_div(ceil_div(m, kBlock), splits) * kEach, all = ceil_div(m, kColumns);
    const int64_t first = static_cast<int64_t>(split) * each;
    if (first >= all) return {0, 0};
    return {static_cast<int>(first),
            static_cast<int>(first) + each < all ? each : all - static_cast<int>(first)};
  }
};

// Shared memory: the owners, the ring of tiles, that of their terms, and barriers.
template <typename Shape>
struct RowMemory {
  unsigned char* base;
  __device__ __forceinline__ unsigned char* owners() const { return base; }
  __device__ __forceinline__ unsigned char* tile(int stage) const {
    return base + Shape::kOwnerBytes + stage * Shape::kTileBytes;
  }
  __device__ __forceinline__ unsigned char* terms(int stage) const {
    return tile(Shape::kStages) + stage * Shape::kTermBytes;
  }
  __device__ __forceinline__ uint64_t* barriers() const {
    return reinterpret_cast<uint64_t*>(terms(Shape::kStages));
  }
  __device__ __forceinline__ uint64_t* full(int stage) const { return barriers() + stage; }
  __device__ __forceinline__ uint64_t* empty(int stage) const { return barriers() + Shape::kStages + stage; }
  __device__ __forceinline__ uint64_t* owners_full() const { return barriers() + 2 * Shape::kStages; }
  __device__ __forceinline__ uint64_t* turn(int warpgroup) const { return owners_full() + 1 + warpgroup; }

  // By all threads of the block.
  __device__ __forceinline__ void initialise() const {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < Shape::kStages; ++stage) {
        mbarrier_init(full(stage), 1);
        mbarrier_init(empty(stage), kConsumerWarps);
      }
      mbarrier_init(owners_full(), 1);
      mbarrier_init(turn(0), kConsumerWarps / 2);
      mbarrier_init(turn(1), kConsumerWarps / 2);
      mbarrier_init_fence();
    }
    __syncthreads();
  }
};

// The ring holds the tiles in the order of their use: y_0, then y_j and v_{j-1} in turn, then the last v;
// where values are y, y_0, y_1, ...
template <bool kSameValues>
__device__ __forceinline__ int place_of_keys(int j) {
  return kSameValues || j == 0 ? j : 2 * j - 1;
}
template <bool kSameValues>
__device__ __forceinline__ int place_of_values(int j, int count) {
  return kSameValues ? j : j == count - 1 ? 2 * count - 1 : 2 * j + 2;
}

// One thread brings the owners from first_i on, and all tiles of the range. `terms`: kTermBytes a tile, each
// at a multiple of 16 bytes.
template <typename Shape, bool kSameValues>
__device__ __forceinline__ void produce(const RowMemory<Shape> memory, const RowMaps& maps, const void* terms,
                                        int first_i, TileRange tiles) {
  if (tiles.count == 0) return;
  tma_prefetch(&maps.x);
  tma_prefetch(&maps.y);
  if (!kSameValues) tma_prefetch(&maps.v);
  mbarrier_arrive_expect(memory.owners_full(), Shape::kOwnerBytes);
#pragma unroll
  for (int chunk = 0; chunk < Shape::kChunks; ++chunk)
    tma_load(memory.owners() + chunk * Shape::kOwnerChunk, &maps.x, chunk * kBoxColumns, first_i,
             memory.owners_full());
  const int places = kSameValues ? tiles.count : 2 * tiles.count;
  int stage = 0, parity = 1;
#pragma unroll 1
  for (int place = 0; place < places; ++place) {
    const bool keys = kSameValues || place == 0 || (place % 2 == 1 && place < places - 1);
    const int j = kSameValues ? place : keys ? (place + 1) / 2 : (place - 1) / 2;
    const int first_j = (tiles.first + j) * Shape::kColumns;
    const TensorMap* map = keys ? &maps.y : &maps.v;
    mbarrier_wait(memory.empty(stage), parity);
    mbarrier_arrive_expect(memory.full(stage), Shape::kStageBytes);
    if constexpr (Shape::kTermBytes > 0)
      bulk_load(memory.terms(stage),
                static_cast<const unsigned char*>(terms) + int64_t{tiles.first + j} * Shape::kTermBytes,
                Shape::kTermBytes, memory.full(stage));
#pragma unroll
    for (int chunk = 0; chunk < Shape::kChunks; ++chunk)
      tma_load(memory.tile(stage) + chunk * Shape::kTileChunk, map, chunk * kBoxColumns, first_j,
               memory.full(stage));
    if (++stage == Shape::kStages) stage = 0, parity ^= 1;
  }
}

// One warpgroup's half of the products. `weigh` turns logits into weights:
//   weigh.tile(c, first_j, terms)   c, products with the tile of rows first_j.. of y, become its weights
//   weigh.rescale(out)              out, the sum over earlier tiles, is brought to the reference of the last
template <typename T, typename Shape, bool kSameValues, typename Weigh>
__device__ __forceinline__ void consume(const RowMemory<Shape> memory, int warpgroup, TileRange tiles,
                                        Weigh& weigh, float (&out)[Shape::kWidth / 2]) {
  constexpr int kColumns = Shape::kColumns, kSteps = kColumns / 16;
#pragma unroll
  for (int x = 0; x < Shape::kWidth / 2; ++x) out[x] = 0.0f;
  if (tiles.count == 0) return;

  const uint64_t owners =
      descriptor(shared_address(memory.owners()) + warpgroup * (kOwners / 2 * 128), 0, 1024);
  const uint32_t ring = shared_address(memory.tile(0));
  float c[kColumns / 2];
  uint32_t weights[kSteps][4];

  auto wait_for = [&](int place) {
    mbarrier_wait(memory.full(place % Shape::kStages), place / Shape::kStages % 2);
  };
  auto release = [&](int place) {
    if (threadIdx.x % kWarp == 0) mbarrier_arrive(memory.empty(place % Shape::kStages));
  };
  auto multiply_keys = [&](int place) {
    const uint64_t keys = descriptor(ring + place % Shape::kStages * Shape::kTileBytes, 0, 1024);
#pragma unroll
    for (int chunk = 0; chunk < Shape::kChunks; ++chunk)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma<T, kColumns>(c, owners + (chunk * Shape::kOwnerChunk + 32 * k) / 16,
                           keys + (chunk * Shape::kTileChunk + 32 * k) / 16, chunk + k > 0);
    wgmma_commit();
  };
  auto multiply_values = [&](int place) {
    const uint64_t values =
        descriptor(ring + place % Shape::kStages * Shape::kTileBytes, Shape::kTileChunk, 1024);
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      wgmma_registers<T, Shape::kWidth>(out, weights[step], values + 2048 * step / 16, true);
  };
  auto take_weights = [&] {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int r = 0; r < 4; ++r) weights[step][r] = pack<T>(c[8 * step + 2 * r], c[8 * step + 2 * r + 1]);
  };
  auto keep_weights = [&] {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) wgmma_keep(weights[step]);
  };

  auto weigh_tile = [&](int j, int place) {
    weigh.tile(c, (tiles.first + j) * kColumns, memory.terms(place % Shape::kStages));
  };

  mbarrier_wait(memory.owners_full(), 0);
  if constexpr (Shape::kOverlaps) {
    // The first tile goes through the same code as all others, with nothing beside its product with the keys:
    // twice the code would not stay in the instruction caches.
#pragma unroll 1
    for (int j = 0; j < tiles.count; ++j) {
      const int keys = place_of_keys<kSameValues>(j),
                values = place_of_values<kSameValues>(j - 1, tiles.count);
      wait_for(keys);
      if (!kSameValues && j > 0) wait_for(values);
      if (Shape::kTurns) mbarrier_wait(memory.turn(warpgroup), (j + warpgroup + 1) % 2);
      __syncwarp();
      wgmma_keep(c);
      wgmma_keep(out);
      keep_weights();
      wgmma_fence();
      multiply_keys(keys);
      if (j > 0) multiply_values(values);
      wgmma_commit();
      if (Shape::kTurns && threadIdx.x % kWarp == 0) mbarrier_arrive(memory.turn(warpgroup ^ 1));
      wgmma_wait<1>();
      wgmma_keep(c);
      if (!kSameValues) release(keys);
      weigh_tile(j, keys);
      wgmma_wait<0>();
      wgmma_keep(c);
      wgmma_keep(out);
      if (j > 0) release(values);
      weigh.rescale(out);
      take_weights();
    }
    const int last = place_of_values<kSameValues>(tiles.count - 1, tiles.count);
    if (!kSameValues) wait_for(last);
    __syncwarp();
    wgmma_keep(out);
    keep_weights();
    wgmma_fence();
    multiply_values(last);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_keep(out);
  } else {
#pragma unroll 1
    for (int j = 0; j < tiles.count; ++j) {
      const int keys = place_of_keys<kSameValues>(j), values = place_of_values<kSameValues>(j, tiles.count);
      wait_for(keys);
      __syncwarp();
      wgmma_keep(c);
      wgmma_fence();
      multiply_keys(keys);
      wgmma_wait<0>();
      wgmma_keep(c);
      if (!kSameValues) release(keys);
      weigh_tile(j, keys);
      weigh.rescale(out);
      take_weights();
      if (!kSameValues) wait_for(values);
      __syncwarp();
      wgmma_keep(out);
      keep_weights();
      wgmma_fence();
      multiply_values(values);
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_keep(out);
      release(values);
    }
  }
}

// out [64, kWidth] of a warpgroup times `unit` of each row, to rows [n, width] of floats.
template <int kWidth>
__device__ __forceinline__ void store_rows(float* rows, const float (&out)[kWidth / 2], float unit,
                                           int first_i, int n, int width) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = first_i + threadIdx.x % kWarp / 4 + 8 * h;
    if (i >= n) continue;
    float* row = rows + static_cast<int64_t>(i) * width + column;
    const int left = width - column;
    auto value = [&](int t, int x) { return out[4 * t + 2 * h + x] * unit; };
    if (width % 2 == 0) {
#pragma unroll
      for (int t = 0; t < kWidth / 8; ++t)
        if (8 * t < left) *reinterpret_cast<float2*>(row + 8 * t) = {value(t, 0), value(t, 1)};
    } else {
#pragma unroll
      for (int t = 0; t < kWidth / 8; ++t) {
        if (8 * t < left) row[8 * t] = value(t, 0);
        if (8 * t + 1 < left) row[8 * t + 1] = value(t, 1);
      }
    }
  }
}

}  // namespace cl_kernels::cuda
