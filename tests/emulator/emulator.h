// Runs CUDA kernels on the CPU: every thread of a block is a fiber, one block after the other. The blocks of
// a cluster run at once, each with shared memory of its own (dynamic: what is static here is one for all).
//
// The kernels of csrc/cuda are compiled as C++ with this header included first. What a warp does together
// (shuffles, ldmatrix, mma, wgmma) meets at a barrier of the warp and exchanges values by its layout in the
// PTX manual. What is asynchronous happens as late as it may: a copy or a matrix product is carried out by
// the wait for it, so that a wait that is missing, or a buffer that is refilled too early, gives wrong
// numbers. Dynamic shared memory starts as NaN. Races among threads between barriers are not looked for.
#pragma once

#define __shared__ static
#define CL_KERNELS_EMULATED 1

#include <cuda_runtime.h>

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;
constexpr size_t kShared = 228 * 1024;

// Work put off until it is waited for: in groups, as cp.async and wgmma commit them.
struct Deferred {
  std::vector<std::function<void()>> open;
  std::vector<std::vector<std::function<void()>>> groups;

  void commit() { groups.push_back(std::move(open)), open.clear(); }
  void wait(size_t pending) {
    while (groups.size() > pending) {
      for (auto& work : groups.front()) work();
      groups.erase(groups.begin());
    }
  }
};

// A barrier that `expected` threads pass together.
struct Meeting {
  int arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Meeting meeting;
  int live = 0;
  // What the lanes bring to a meeting; the next one uses the other half.
  alignas(16) unsigned char brought[2][kWarp][64];
  float a[2][16][16], b[2][16][8];
};

struct Block;

struct Fiber {
  uint3 thread;
  Block* block;
  Warp* warp;
  int lane;
  bool done, started;
  jmp_buf state;
  Deferred copies, products;
  std::unique_ptr<unsigned char[]> stack;
};

struct Block {
  uint3 index;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Warp>> warps;
  Meeting all, named[16];
  int live = 0;
  std::vector<std::pair<const void*, std::function<void()>>> transfers;  // bulk copies, by their barrier
  std::unique_ptr<unsigned char[]> memory = std::make_unique<unsigned char[]>(kShared + 1024);

  unsigned char* shared() {
    auto at = reinterpret_cast<uintptr_t>(memory.get());
    return reinterpret_cast<unsigned char*>((at + 1023) / 1024 * 1024);
  }
};

inline std::vector<std::unique_ptr<Block>> blocks;  // as many as any cluster had
inline std::vector<Block*> cluster;                 // those that run
inline Meeting all_of_cluster;
inline bool early_copies = false;
inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline bool progress = false;
inline size_t shared_size = 0;
inline dim3 block_size, grid_size;

inline unsigned char* shared_base() {
  return current->block->shared();
}

[[noreturn]] inline void fail(const char* what) {
  const uint3 block = current ? current->block->index : uint3{};
  std::fprintf(stderr, "emulator: %s (block %u %u, thread %u)\n", what, block.x, block.y,
               current ? current->thread.x : 0);
  std::abort();
}

// The place in the shared memory of a block of the cluster that is `at` in this block's.
template <typename T>
T* in_block(T* at, int rank) {
  Block& block = *cluster.at(rank);
  if (block.live == 0) fail("shared memory of a block that has ended is used");
  return reinterpret_cast<T*>(block.shared() + (reinterpret_cast<unsigned char*>(at) - shared_base()));
}

inline void yield() {
  if (_setjmp(current->state) == 0) _longjmp(scheduler, 1);
}

template <typename Condition>
void wait_until(Condition condition) {
  while (!condition()) yield();
  progress = true;
}

inline void meet(Meeting& meeting, int expected) {
  const unsigned generation = meeting.generation;
  if (++meeting.arrived == expected) {
    meeting.arrived = 0;
    ++meeting.generation;
    progress = true;
    return;
  }
  wait_until([&] { return meeting.generation != generation; });
}

inline void meet_warp() {
  meet(current->warp->meeting, current->warp->live);
}
inline int half() {
  return current->warp->meeting.generation % 2;
}

// The lane's value for all lanes of its warp, then the value of lane `from(lane)`.
template <typename T, typename Read>
auto exchange(const T& value, Read read) {
  static_assert(sizeof(T) <= 64, "a lane brings at most 64 bytes");
  const int which = half();
  std::memcpy(current->warp->brought[which][current->lane], &value, sizeof(T));
  meet_warp();
  auto of = [which](int lane) {
    T found;
    std::memcpy(&found, current->warp->brought[which][lane], sizeof(T));
    return found;
  };
  return read(of);
}

inline void enter() {
  body();
  Fiber* self = current;
  for (auto* work : {&self->copies, &self->products}) {
    if (!work->open.empty()) fail("a thread ended with work that it did not commit");
  }
  self->done = true;
  progress = true;
  --self->warp->live;
  --self->block->live;
  _longjmp(scheduler, 1);
}

inline void start(Fiber& fiber) {
  ucontext_t context, back;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  fiber.started = true;
  swapcontext(&back, &context);
}

inline void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) == 0) {
    if (fiber.started)
      _longjmp(fiber.state, 1);
    else
      start(fiber);
  }
  current = nullptr;
}

inline void prepare(Block& block, uint3 index, int threads) {
  block.index = index;
  while (static_cast<int>(block.fibers.size()) < threads) {
    block.fibers.push_back(std::make_unique<Fiber>());
    block.fibers.back()->stack = std::make_unique<unsigned char[]>(kStack);
  }
  block.warps.clear();
  for (int i = 0; i < threads; ++i) {
    if (i % kWarp == 0) block.warps.push_back(std::make_unique<Warp>());
    Fiber& fiber = *block.fibers[i];
    fiber.thread = {static_cast<unsigned>(i), 0, 0};
    fiber.block = &block;
    fiber.warp = block.warps.back().get();
    fiber.warp->live++;
    fiber.lane = i % kWarp;
    fiber.done = fiber.started = false;
    fiber.copies = fiber.products = Deferred();
  }
  block.all = Meeting();
  for (Meeting& meeting : block.named) meeting = Meeting();
  block.live = threads;
  block.transfers.clear();
  // Not zero, and NaN in float, half and bf16.
  std::memset(block.shared(), 0xff, shared_size);
}

inline void run_cluster(uint3 first, int threads) {
  uint3 index = first;
  for (Block* block : cluster) prepare(*block, index, threads), ++index.x;
  all_of_cluster = Meeting();
  auto runs = [](const Block* block) { return block->live > 0; };
  // Each block in turn as far as it gets without the others.
  while (std::any_of(cluster.begin(), cluster.end(), runs)) {
    bool any = false;
    for (Block* block : cluster) {
      do {
        progress = false;
        for (int i = 0; i < threads; ++i)
          if (!block->fibers[i]->done) resume(*block->fibers[i]);
        any |= progress;
      } while (progress);
    }
    if (!any) fail("all threads wait: deadlock");
  }
  for (Block* block : cluster)
    if (!block->transfers.empty()) fail("a bulk copy that nothing waited for");
}

inline void run(dim3 grid, int threads, size_t shared_bytes, std::function<void()> kernel, int cluster_size) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  early_copies = std::getenv("CL_KERNELS_EMULATED_COPIES") != nullptr;
  if (threads % kWarp != 0) fail("blocks must be whole warps");
  if (grid.x % cluster_size != 0) fail("a grid must be whole clusters");
  const char* least = std::getenv("CL_KERNELS_EMULATED_SHARED");
  if (shared_bytes > (least != nullptr ? std::stoul(least) : kShared))
    fail("more shared memory than a multiprocessor has");
  cluster.clear();
  for (int rank = 0; rank < cluster_size; ++rank) {
    if (static_cast<int>(blocks.size()) == rank) blocks.push_back(std::make_unique<Block>());
    cluster.push_back(blocks[rank].get());
  }
  shared_size = shared_bytes;
  body = std::move(kernel);
  block_size = dim3(threads);
  grid_size = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += cluster_size) run_cluster({x, y, z}, threads);
  body = nullptr;
}

template <typename T>
T bits_as(uint32_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block->index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

inline void __syncthreads() {
  emulator::meet(emulator::current->block->all, emulator::current->block->live);
}
inline void __syncwarp(unsigned = 0xffffffffu) {
  emulator::meet_warp();
}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::exchange(value, [&](auto of) { return of(source % emulator::kWarp); });
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::exchange(value, [&](auto of) { return of(emulator::current->lane ^ mask); });
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int lanes) {
  const int from = emulator::current->lane + lanes;
  return emulator::exchange(value, [&](auto of) { return of(from < emulator::kWarp ? from : from - lanes); });
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int lanes) {
  const int from = emulator::current->lane - lanes;
  return emulator::exchange(value, [&](auto of) { return of(from >= 0 ? from : from + lanes); });
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  return emulator::exchange(predicate, [](auto of) {
    unsigned votes = 0;
    for (int lane = 0; lane < emulator::kWarp; ++lane) votes |= of(lane) != 0 ? 1u << lane : 0;
    return votes;
  });
}
inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == 0xffffffffu;
}
inline int __syncthreads_or(int predicate) {
  static int any;
  __syncthreads();
  any = 0;
  __syncthreads();
  any |= predicate;
  __syncthreads();
  return any;
}
inline int __syncthreads_and(int predicate) {
  return !__syncthreads_or(!predicate);
}

template <typename T>
T __ldg(const T* at) {
  return *at;
}
template <typename T>
T __ldcg(const T* at) {
  return *at;
}
inline float __int_as_float(int bits) {
  return emulator::bits_as<float>(static_cast<uint32_t>(bits));
}
inline float __uint_as_float(unsigned bits) {
  return emulator::bits_as<float>(bits);
}
inline int __float_as_int(float x) {
  return emulator::bits_as<int>(*reinterpret_cast<uint32_t*>(&x));
}
inline unsigned __float_as_uint(float x) {
  return *reinterpret_cast<uint32_t*>(&x);
}
inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}
inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}
inline float __frsqrt_rn(float x) {
  return 1 / std::sqrt(x);
}
inline float rsqrtf(float x) {
  return 1 / std::sqrt(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __frcp_rn(float x) {
  return 1 / x;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fsqrt_rn(float x) {
  return std::sqrt(x);
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

template <typename T, typename U>
T atomicAdd(T* at, U more) {
  const T before = *at;
  *at = before + static_cast<T>(more);
  return before;
}
template <typename T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = std::max(before, value);
  return before;
}
template <typename T>
T atomicExch(T* at, T value) {
  return std::exchange(*at, value);
}
