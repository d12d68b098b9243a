// The functions of csrc/cuda/ptx.h and wgmma.h for the emulator: fragments are laid out as the PTX manual
// says.
#pragma once

namespace cl_kernels::cuda {

using emulator::current;

inline unsigned char* dynamic_shared() {
  return emulator::shared_base();
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return std::fabs(y) < 1.17549435e-38f ? 0.0f : y;
}

inline float to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return x;
  return __uint_as_float((bits + 0x1000u) & 0xffffe000u);
}

inline void cp_async_16(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    emulator::fail("cp.async is not aligned to 16 bytes");
  auto copy = [=] {
    std::memset(to, 0, 16);
    std::memcpy(to, from, bytes);
  };
  if (emulator::early_copies)
    copy();
  else
    current->copies.open.push_back(copy);
}
inline void cp_async_commit() {
  current->copies.commit();
}
template <int kPending>
void cp_async_wait() {
  current->copies.wait(kPending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  emulator::exchange(reinterpret_cast<uintptr_t>(row), [&](auto of) {
    const int lane = current->lane;
    for (int matrix = 0; matrix < 4; ++matrix) {
      const uint16_t* pair = reinterpret_cast<const uint16_t*>(of(8 * matrix + lane / 4)) + 2 * (lane % 4);
      r[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
    return 0;
  });
}

template <typename T>
float half_value(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(pair >> 16 * which);
  T x;
  std::memcpy(static_cast<void*>(&x), &bits, 2);
  return to_float(x);
}

// c += a b over kDepth, from what the lanes of the warp laid out in `a` and `b`.
template <int kDepth>
void multiply(float (&c)[4], const emulator::Warp& warp, int which) {
  const int lane = current->lane;
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
    double sum = c[e];
    for (int k = 0; k < kDepth; ++k)
      sum += static_cast<double>(warp.a[which][row][k]) * static_cast<double>(warp.b[which][k][column]);
    c[e] = static_cast<float>(sum);
  }
}

// m16n8k16 of half-precision elements.
template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Warp& warp = *current->warp;
  const int which = emulator::half(), lane = current->lane;
  for (int r = 0; r < 4; ++r)
    for (int e = 0; e < 2; ++e)
      warp.a[which][lane / 4 + 8 * (r % 2)][2 * (lane % 4) + e + 8 * (r / 2)] = half_value<T>(a[r], e);
  for (int e = 0; e < 2; ++e) {
    warp.b[which][2 * (lane % 4) + e][lane / 4] = half_value<T>(b0, e);
    warp.b[which][2 * (lane % 4) + e + 8][lane / 4] = half_value<T>(b1, e);
  }
  emulator::meet_warp();
  multiply<16>(c, warp, which);
}

// m16n8k8 of tf32 elements, in the bits of floats.
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Warp& warp = *current->warp;
  const int which = emulator::half(), lane = current->lane;
  auto value = [](uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); };
  for (int r = 0; r < 4; ++r) warp.a[which][lane / 4 + 8 * (r % 2)][lane % 4 + 4 * (r / 2)] = value(a[r]);
  warp.b[which][lane % 4][lane / 4] = value(b0);
  warp.b[which][lane % 4 + 4][lane / 4] = value(b1);
  emulator::meet_warp();
  multiply<8>(c, warp, which);
}

template <int kBarrier>
void named_barrier(int threads) {
  emulator::meet(current->block->named[kBarrier], threads);
}

// Barriers in shared memory, in 64 bits: phase 1, arrivals expected 12, arrivals pending 12, bytes
// pending 32.
struct BarrierState {
  uint32_t phase : 1, expected : 12, pending : 12;
  int32_t bytes;

  static BarrierState of(const uint64_t* barrier) {
    BarrierState state;
    std::memcpy(&state, barrier, sizeof(state));
    return state;
  }
  bool initialised() const { return bytes != -1 || expected != 0xfff || pending != 0xfff; }
  void store(uint64_t* barrier) {
    if (pending == 0 && bytes == 0) phase ^= 1, pending = expected, emulator::progress = true;
    std::memcpy(barrier, this, sizeof(*this));
  }
};

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  BarrierState state{0, static_cast<uint32_t>(arrivals), static_cast<uint32_t>(arrivals), 0};
  std::memcpy(barrier, &state, sizeof(state));
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  BarrierState state = BarrierState::of(barrier);
  if (!state.initialised()) emulator::fail("an arrival at a barrier that is not there yet");
  if (state.pending == 0) emulator::fail("more arrivals at a barrier than it expects");
  --state.pending;
  state.bytes += bytes;
  state.store(barrier);
}
inline void mbarrier_arrive(uint64_t* barrier) {
  mbarrier_arrive_expect(barrier, 0);
}
inline void mbarrier_arrive_at(uint64_t* barrier, int rank) {
  mbarrier_arrive(emulator::in_block(barrier, rank));
}
inline void mbarrier_wait(uint64_t* barrier, int parity) {
  emulator::wait_until([&] {
    // A copy is carried out when it is waited for.
    auto& transfers = current->block->transfers;
    for (size_t i = 0; i < transfers.size();)
      if (transfers[i].first == barrier) {
        auto copy = std::move(transfers[i].second);
        transfers.erase(transfers.begin() + i);
        copy();
      } else {
        ++i;
      }
    return static_cast<int>(BarrierState::of(barrier).phase) != parity;
  });
}

inline void mbarrier_wait_cluster(uint64_t* barrier, int parity) {
  mbarrier_wait(barrier, parity);
}
inline void cluster_sync() {
  int live = 0;
  for (const emulator::Block* block : emulator::cluster) live += block->live;
  emulator::meet(emulator::all_of_cluster, live);
}

inline void bytes_arrive(uint64_t* barrier, int bytes) {
  BarrierState state = BarrierState::of(barrier);
  state.bytes -= bytes;
  state.store(barrier);
}
// In the shared memory of the block `rank` of the cluster, at its barrier.
inline void start_transfer(int rank, uint64_t* barrier, std::function<void()> copy) {
  if (!BarrierState::of(barrier).initialised()) emulator::fail("a copy to a barrier that is not there yet");
  if (emulator::early_copies)
    copy();
  else
    emulator::cluster[rank]->transfers.emplace_back(barrier, std::move(copy));
}
inline int cluster_rank() {
  return static_cast<int>(current->block->index.x % emulator::cluster.size());
}

inline void load_box(int rank, void* to, const TensorMap* map, int column, int row, uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(to) % 1024 != 0)
    emulator::fail("a swizzled tile is not aligned to 1024 bytes");
  start_transfer(rank, barrier, [=, map = *map] {
    for (int r = 0; r < map.box_rows; ++r)
      for (int c = 0; c < 64; ++c) {
        uint16_t value = 0;
        if (row + r >= 0 && row + r < map.rows && column + c >= 0 && column + c < map.columns)
          std::memcpy(&value, map.data + (row + r) * map.row_bytes + 2 * (column + c), 2);
        const int at = r * 128 + 2 * c;
        std::memcpy(static_cast<unsigned char*>(to) + (at ^ (at >> 7 & 7) << 4), &value, 2);
      }
    bytes_arrive(barrier, map.box_rows * 128);
  });
}
// The box of `map` whose first element is (column, row), 128-byte rows swizzled, zeros outside the matrix.
inline void tma_load(void* to, const TensorMap* map, int column, int row, uint64_t* barrier) {
  load_box(cluster_rank(), to, map, column, row, barrier);
}
// The same to the same place of each block of the cluster in `blocks`.
inline void tma_load_multicast(void* to, const TensorMap* map, int column, int row, uint64_t* barrier,
                               uint16_t blocks) {
  for (int rank = 0; rank < 16; ++rank)
    if (blocks >> rank & 1)
      load_box(rank, emulator::in_block(static_cast<unsigned char*>(to), rank), map, column, row,
               emulator::in_block(barrier, rank));
}
// `bytes` in a row.
inline void bulk_load(void* to, const void* from, int bytes, uint64_t* barrier) {
  for (const uintptr_t x : {reinterpret_cast<uintptr_t>(to), reinterpret_cast<uintptr_t>(from)})
    if ((x | static_cast<uintptr_t>(bytes)) % 16 != 0)
      emulator::fail("a bulk copy is not aligned to 16 bytes");
  start_transfer(cluster_rank(), barrier, [=] {
    std::memcpy(to, from, bytes);
    bytes_arrive(barrier, bytes);
  });
}
inline void tma_prefetch(const TensorMap*) {}

template <int kRegisters>
void registers_up() {}
template <int kRegisters>
void registers_down() {}

inline void wgmma_fence() {}
template <typename R, int kSize>
void wgmma_keep(R (&)[kSize]) {}
inline void wgmma_commit() {
  current->products.commit();
  if (!emulator::early_copies) return;
  emulator::progress = true;
  emulator::yield();  // lets the copies run ahead of the products
}
template <int kPending>
void wgmma_wait() {
  current->products.wait(kPending);
}

inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(at) - emulator::shared_base());
}

template <typename T>
float swizzled(uint32_t address) {
  T x;
  std::memcpy(static_cast<void*>(&x), emulator::shared_base() + (address ^ (address >> 7 & 7) << 4), 2);
  return to_float(x);
}

struct DecodedDescriptor {
  uint32_t start, leading, stride;
  explicit DecodedDescriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) emulator::fail("a descriptor without the 128-byte swizzle");
  }
  // Element (row, k) of rows of 64 elements: k along a row, 8 rows `stride` apart.
  uint32_t k_major(int row, int k) const { return start + row / 8 * stride + row % 8 * 128 + 2 * k; }
  // Element (column, k): columns along a row, 64 of them `leading` apart, 8 k's `stride` apart.
  uint32_t mn_major(int column, int k) const {
    return start + column / 64 * leading + k / 8 * stride + k % 8 * 128 + column % 64 * 2;
  }
};

inline int row_of_warpgroup(int e) {
  return current->thread.x / 32 % 4 * 16 + current->lane / 4 + 8 * (e / 2);
}

// c [64, kColumns] += a [64, 16] b [kColumns, 16]^T, both in shared memory, k along their rows.
template <typename T, int kColumns>
void wgmma(float (&c)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate) {
  emulator::meet_warp();
  float* out = c;
  current->products.open.push_back([=] {
    const DecodedDescriptor left(a), right(b);
    for (int i = 0; i < kColumns / 2; ++i) {
      const int column = i / 4 * 8 + 2 * (current->lane % 4) + i % 2;
      double sum = accumulate ? out[i] : 0.0f;
      for (int k = 0; k < 16; ++k)
        sum += static_cast<double>(swizzled<T>(left.k_major(row_of_warpgroup(i % 4), k))) *
               static_cast<double>(swizzled<T>(right.k_major(column, k)));
      out[i] = static_cast<float>(sum);
    }
  });
}

// c [64, kColumns] += a [64, 16] b [16, kColumns]: a in registers, b in shared memory, its columns along
// rows.
template <typename T, int kColumns>
void wgmma_registers(float (&c)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  struct Quad {
    float x[2][16];
  } rows;
  struct Own {
    uint32_t a[4];
  } own{{a[0], a[1], a[2], a[3]}};
  emulator::exchange(own, [&](auto of) {
    for (int of_quad = 0; of_quad < 4; ++of_quad) {
      const Own their = of(current->lane / 4 * 4 + of_quad);
      for (int r = 0; r < 4; ++r)
        for (int e = 0; e < 2; ++e)
          rows.x[r % 2][2 * of_quad + e + 8 * (r / 2)] = half_value<T>(their.a[r], e);
    }
    return 0;
  });
  float* out = c;
  current->products.open.push_back([=] {
    const DecodedDescriptor right(b);
    for (int i = 0; i < kColumns / 2; ++i) {
      const int column = i / 4 * 8 + 2 * (current->lane % 4) + i % 2;
      double sum = accumulate ? out[i] : 0.0f;
      for (int k = 0; k < 16; ++k)
        sum += static_cast<double>(rows.x[i % 4 / 2][k]) *
               static_cast<double>(swizzled<T>(right.mn_major(column, k)));
      out[i] = static_cast<float>(sum);
    }
  });
}

}  // namespace cl_kernels::cuda
