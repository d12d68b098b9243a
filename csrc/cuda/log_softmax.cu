#include "log_softmax.h"

#include <algorithm>

#include "launch.h"
#include "ptx.h"

namespace cl_kernels::cuda {
namespace {

constexpr int kWarpsOfRows = 4;      // a block, where a warp owns a row
constexpr int kStreamThreads = 256;  // of the blocks that share a long row
constexpr int kStreamed = 4;         // pieces that a thread of them loads at once
constexpr int kWaves = 4;            // of such blocks
// Where a running maximum starts: finite, so that no difference from it is NaN, and above no logit but -inf.
constexpr float kLowest = -0x1.fffffep127f;

// 16 bytes of a row, packed as they are in memory: half-precision elements take half a register each.
struct alignas(16) Piece {
  uint32_t word[4];
};

__device__ __forceinline__ Piece load_piece(const void* from) {
  const uint4 w = *static_cast<const uint4*>(from);
  return {{w.x, w.y, w.z, w.w}};
}
__device__ __forceinline__ void store_piece(void* to, const Piece& p) {
  *static_cast<uint4*>(to) = {p.word[0], p.word[1], p.word[2], p.word[3]};
}

template <typename T>
constexpr int kSize = 16 / sizeof(T);

// f(value) for each element of a word; the word of f(value)s; that of f(value, other)s.
template <typename T, typename F>
__device__ __forceinline__ void for_values(uint32_t word, F f) {
  if constexpr (sizeof(T) == 4) {
    f(__uint_as_float(word));
  } else {
    const T* pair = reinterpret_cast<const T*>(&word);
    f(to_float(pair[0]));
    f(to_float(pair[1]));
  }
}
template <typename T, typename F>
__device__ __forceinline__ uint32_t map_values(uint32_t word, uint32_t other, F f) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(f(__uint_as_float(word), __uint_as_float(other)));
  } else {
    const T* pair = reinterpret_cast<const T*>(&word);
    const T* other_pair = reinterpret_cast<const T*>(&other);
    return pack<T>(f(to_float(pair[0]), to_float(other_pair[0])),
                   f(to_float(pair[1]), to_float(other_pair[1])));
  }
}

// What stands for an excluded logit (-inf) or gradient (0).
template <typename T, bool kBackward>
__device__ __forceinline__ T excluded_value() {
  return from_float<T>(kBackward ? 0.0f : negative_infinity());
}
template <typename T, bool kBackward>
__device__ __forceinline__ uint32_t excluded_word() {
  if constexpr (kBackward) return 0;
  if constexpr (sizeof(T) == 4)
    return __float_as_uint(negative_infinity());
  else
    return pack<T>(negative_infinity(), negative_infinity());
}

// One row in the three parts that it has as its elements lie in memory: fewer than a piece's at its head,
// whole pieces, and a rest. Of head and rest each of the first threads owns one element.
template <typename T>
struct Shape {
  int head, pieces, rest;

  __device__ __forceinline__ Shape(int row, int m) {
    const int past = static_cast<int>(static_cast<int64_t>(row) * m % kSize<T>);
    head = past == 0 ? 0 : min(kSize<T> - past, m);
    pieces = (m - head) / kSize<T>;
    rest = (m - head) % kSize<T>;
  }
  // The column of a thread's single element, or -1.
  __device__ __forceinline__ int single(int thread) const {
    if (thread < head) return thread;
    const int of_rest = thread - kSize<T>;
    return of_rest >= 0 && of_rest < rest ? head + pieces * kSize<T> + of_rest : -1;
  }
};

template <typename T, bool kBackward>
struct Row {
  Shape<T> shape;
  const T *x, *y;
  const uint8_t* mask;
  T* out;

  __device__ __forceinline__ Row(const LogSoftmaxParams& p, int i)
      : shape(i, p.m),
        x(static_cast<const T*>(p.x) + i * p.x_stride),
        y(kBackward ? static_cast<const T*>(p.y) + i * p.y_stride : nullptr),
        mask(p.mask == nullptr ? nullptr : p.mask + i * p.mask_stride),
        out(static_cast<T*>(p.out) + static_cast<int64_t>(i) * p.m) {}

  __device__ __forceinline__ int column(int piece) const { return shape.head + piece * kSize<T>; }

  // held[h] = piece first + h * step before `end`, what is excluded or outside replaced. All loads of x are
  // under way before the first of the mask.
  template <int kHeld>
  __device__ __forceinline__ void load(Piece (&held)[kHeld], int first, int step, int end) const {
    const uint32_t excluded = excluded_word<T, kBackward>();
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      held[h] = {{excluded, excluded, excluded, excluded}};
      if (first + h * step < end) held[h] = load_piece(x + column(first + h * step));
    }
    if (mask == nullptr) return;
    uint32_t bits[kHeld][kSize<T> / 4];
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if (first + h * step >= end) continue;
      const uint32_t* of_piece = reinterpret_cast<const uint32_t*>(mask + column(first + h * step));
      if constexpr (kSize<T> == 4) {
        bits[h][0] = *of_piece;
      } else {
        const uint2 both = *reinterpret_cast<const uint2*>(of_piece);
        bits[h][0] = both.x;
        bits[h][1] = both.y;
      }
    }
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
      if (first + h * step < end) exclude(held[h], bits[h]);
  }

  __device__ __forceinline__ float load_single(int column) const {
    const bool counts = column >= 0 && (mask == nullptr || mask[column]);
    return to_float(counts ? x[column] : excluded_value<T, kBackward>());
  }

 private:
  __device__ static __forceinline__ void exclude(Piece& piece, const uint32_t (&bits)[kSize<T> / 4]) {
    const uint32_t excluded = excluded_word<T, kBackward>();
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (kSize<T> == 4) {
        if ((bits[0] >> 8 * w & 0xff) == 0) piece.word[w] = excluded;
      } else {
        const uint32_t pair = bits[w / 2] >> 16 * (w % 2);
        const uint32_t kept = ((pair & 0xff) != 0 ? 0xffffu : 0) | ((pair & 0xff00) != 0 ? 0xffff0000u : 0);
        piece.word[w] = (piece.word[w] & kept) | (excluded & ~kept);
      }
    }
  }
};

template <typename T>
__device__ __forceinline__ float max_with(float most, const Piece& piece) {
#pragma unroll
  for (int w = 0; w < 4; ++w) for_values<T>(piece.word[w], [&](float x) { most = fmaxf(most, x); });
  return most;
}
__device__ __forceinline__ float exponential(float x, float peak) {
  return exp2_fast((x - peak) * kLog2e);
}
template <typename T>
__device__ __forceinline__ float exponentials(const Piece& piece, float peak) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < 4; ++w) for_values<T>(piece.word[w], [&](float x) { sum += exponential(x, peak); });
  return sum;
}
template <typename T>
__device__ __forceinline__ float sum_of(const Piece& piece) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < 4; ++w) for_values<T>(piece.word[w], [&](float x) { sum += x; });
  return sum;
}

// What the row as a whole says of its elements: the forward's maximum and log of the sum of exponentials
// about it, the backward's sum of the gradient.
struct RowSums {
  float peak, sum;
};

template <bool kBackward>
__device__ __forceinline__ float result(float x, float y, const RowSums& of_row) {
  if constexpr (kBackward)
    return y == negative_infinity() ? x : x - exp2_fast(y * kLog2e) * of_row.sum;
  else  // also where the row has nothing, or a NaN, among what it includes
    return x == negative_infinity() ? x : (x - of_row.peak) - of_row.sum;
}

// Whether a gradient x was passed on to a logit of -inf, which is right unless the row has no other.
template <bool kBackward>
__device__ __forceinline__ bool passes_on(float x, float y) {
  return kBackward && y == negative_infinity() && x != 0.0f;
}

// These tell whether a gradient was passed on.
template <typename T, bool kBackward>
__device__ __forceinline__ bool write(const Row<T, kBackward>& row, int piece, const Piece& held,
                                      const RowSums& sums) {
  Piece out, y = held;
  if constexpr (kBackward) y = load_piece(row.y + row.column(piece));
  bool passed = false;
#pragma unroll
  for (int w = 0; w < 4; ++w)
    out.word[w] = map_values<T>(held.word[w], y.word[w], [&](float x, float other) {
      passed |= passes_on<kBackward>(x, other);
      return result<kBackward>(x, other, sums);
    });
  store_piece(row.out + row.column(piece), out);
  return passed;
}
template <typename T, bool kBackward>
__device__ __forceinline__ bool write_single(const Row<T, kBackward>& row, int column, float x,
                                             const RowSums& sums) {
  if (column < 0) return false;
  row.out[column] = from_float<T>(result<kBackward>(x, kBackward ? to_float(row.y[column]) : x, sums));
  return kBackward && passes_on<kBackward>(x, to_float(row.y[column]));
}

template <int kThreads>
__device__ __forceinline__ bool any_of(bool x) {
  if constexpr (kThreads == kWarp)
    return __any_sync(0xffffffffu, x);
  else
    return __syncthreads_or(x);
}
template <int kThreads>
__device__ __forceinline__ float sum_over(float x) {
  if constexpr (kThreads == kWarp)
    return warp_sum(x);
  else
    return block_sum<kThreads>(x);
}
template <int kThreads>
__device__ __forceinline__ float max_over(float x) {
  if constexpr (kThreads == kWarp)
    return warp_max(x);
  else
    return block_max<kThreads>(x);
}

// What a thread owns of a row: `single`, and of the pieces [begin, end) those from `thread` on.
struct Share {
  int thread, begin, end, single;
};

// Whether the output of a row has anything but -inf; by all of its threads.
template <int kThreads, typename T>
__device__ __forceinline__ bool has_output(const Row<T, true>& row, int thread) {
  auto is_output = [&](int column) { return to_float(row.y[column]) != negative_infinity(); };
  const int single = row.shape.single(thread);
  bool found = single >= 0 && is_output(single);
  for (int first = 0;; first += kThreads) {
    found = any_of<kThreads>(found);
    if (found || first >= row.shape.pieces) return found;
    if (first + thread < row.shape.pieces)
      for (int e = 0; e < kSize<T>; ++e) found |= is_output(row.column(first + thread) + e);
  }
}

// A row whose output is -inf throughout has gradient 0, as if nothing were included: what a thread owns of it
// is written again.
template <int kThreads, typename T>
__device__ __forceinline__ void mend(const Row<T, true>& row, const Share& share, bool passed) {
  if (!any_of<kThreads>(passed) || has_output<kThreads>(row, share.thread)) return;
  if (share.single >= 0) row.out[share.single] = from_float<T>(0.0f);
  for (int piece = share.begin + share.thread; piece < share.end; piece += kThreads)
    store_piece(row.out + row.column(piece), Piece{});
}

template <int kThreads>
constexpr int kBlockThreads = kThreads == kWarp ? kWarp * kWarpsOfRows : kThreads;
// So many that a thread has 64 registers, of a warp's row 80.
template <int kThreads>
constexpr int kBlocks = kThreads == kWarp ? 6 : 1024 / kThreads;

// A warp or a block owns a row and reads it once: a thread holds kHeld pieces of it in registers, and kHeld
// more in shared memory where the row is that long (kSpare). The backward holds the gradient, and reads the
// output when it knows the sum.
template <typename T, bool kBackward, int kThreads, int kHeld, bool kSpare>
__global__ void __launch_bounds__(kBlockThreads<kThreads>, kBlocks<kThreads>)
    row_kernel(const LogSoftmaxParams p) {
  const int thread = threadIdx.x % kThreads;
  const int i = kThreads == kWarp ? blockIdx.x * kWarpsOfRows + threadIdx.x / kWarp : blockIdx.x;
  if (i >= p.n) return;
  const Row<T, kBackward> row(p, i);
  Piece held[kHeld];
  Piece* spare = reinterpret_cast<Piece*>(dynamic_shared()) + thread;
  if constexpr (kSpare) {
    row.load(held, kHeld * kThreads + thread, kThreads, row.shape.pieces);
#pragma unroll
    for (int h = 0; h < kHeld; ++h) spare[h * kThreads] = held[h];
  }
  row.load(held, thread, kThreads, row.shape.pieces);
  const float single = row.load_single(row.shape.single(thread));
  // The compiler does not know that this is 0. It would keep what one walk over the pieces makes of them for
  // the next, at one register an element.
  const uint32_t nothing = gridDim.z - 1;
  auto for_held = [&](auto f) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
#pragma unroll
      for (uint32_t& word : held[h].word) word += nothing;
      f(thread + h * kThreads, held[h]);
    }
    if constexpr (kSpare) {
#pragma unroll 2
      for (int h = 0; h < kHeld; ++h) f(thread + (kHeld + h) * kThreads, spare[h * kThreads]);
    }
  };

  RowSums sums{0.0f, single};
  if constexpr (kBackward) {
    for_held([&](int, const Piece& piece) { sums.sum += sum_of<T>(piece); });
    sums.sum = sum_over<kThreads>(sums.sum);
  } else {
    float peak = single;
    for_held([&](int, const Piece& piece) { peak = max_with<T>(peak, piece); });
    peak = max_over<kThreads>(peak);
    sums.peak = peak == negative_infinity() ? 0.0f : peak;
    sums.sum = exponential(single, sums.peak);
    for_held([&](int, const Piece& piece) { sums.sum += exponentials<T>(piece, sums.peak); });
    sums.sum = logf(sum_over<kThreads>(sums.sum));
  }
  bool passed = false;
  for_held([&](int index, const Piece& piece) {
    if (index < row.shape.pieces) passed |= write(row, index, piece, sums);
  });
  const int single_column = row.shape.single(thread);
  passed |= write_single(row, single_column, row.load_single(single_column), sums);
  if constexpr (kBackward) mend<kThreads>(row, {thread, 0, row.shape.pieces, single_column}, passed);
}

// Long rows, or few: each is cut into parts, of a block each. One kernel takes the maximum of a part and its
// sum of exponentials about it, or the sum of a gradient; the next adds these up in order and reads the part
// again.
template <typename T>
struct Part {
  int row, number, begin, end;  // pieces

  __device__ __forceinline__ Part(const LogSoftmaxParams& p)
      : row(blockIdx.x / p.splits), number(blockIdx.x % p.splits) {
    const int pieces = Shape<T>(row, p.m).pieces, each = ceil_div(pieces, p.splits);
    begin = min(number * each, pieces);
    end = min(begin + each, pieces);
  }
  // Head and rest of the row belong to its first part.
  __device__ __forceinline__ int single(const Shape<T>& shape) const {
    return number == 0 ? shape.single(threadIdx.x) : -1;
  }
};

template <typename T, bool kBackward>
__global__ void __launch_bounds__(kStreamThreads, 4) parts_kernel(const LogSoftmaxParams p) {
  const Part<T> part(p);
  const Row<T, kBackward> row(p, part.row);
  const float single = row.load_single(part.single(row.shape));
  float peak = kBackward ? 0.0f : fmaxf(single, kLowest);
  float sum = kBackward ? single : exponential(single, peak);
  for (int first = part.begin + threadIdx.x; first < part.end; first += kStreamed * kStreamThreads) {
    Piece held[kStreamed];
    row.load(held, first, kStreamThreads, part.end);
    if constexpr (kBackward) {
#pragma unroll
      for (int h = 0; h < kStreamed; ++h) sum += sum_of<T>(held[h]);
    } else {
      const float before = peak;
#pragma unroll
      for (int h = 0; h < kStreamed; ++h) peak = max_with<T>(peak, held[h]);
      sum *= exponential(before, peak);
#pragma unroll
      for (int h = 0; h < kStreamed; ++h) sum += exponentials<T>(held[h], peak);
    }
  }
  if constexpr (!kBackward) {
    const float most = block_max<kStreamThreads>(peak);
    sum *= exponential(peak, most);
    peak = most;
  }
  sum = block_sum<kStreamThreads>(sum);
  if (threadIdx.x == 0) p.parts[blockIdx.x] = {peak, sum};
}

template <typename T, bool kBackward>
__global__ void __launch_bounds__(kStreamThreads, 4) write_kernel(const LogSoftmaxParams p) {
  const Part<T> part(p);
  const Row<T, kBackward> row(p, part.row);
  const float2* parts = p.parts + static_cast<int64_t>(part.row) * p.splits;
  RowSums sums{kLowest, 0.0f};
  for (int s = 0; s < p.splits; ++s) sums.peak = fmaxf(sums.peak, parts[s].x);
  for (int s = 0; s < p.splits; ++s)
    sums.sum += kBackward ? parts[s].y : parts[s].y * exponential(parts[s].x, sums.peak);
  if constexpr (!kBackward) sums.sum = logf(sums.sum);
  bool passed = false;
  for (int first = part.begin + threadIdx.x; first < part.end; first += kStreamed * kStreamThreads) {
    Piece held[kStreamed];
    row.load(held, first, kStreamThreads, part.end);
#pragma unroll
    for (int h = 0; h < kStreamed; ++h)
      if (first + h * kStreamThreads < part.end)
        passed |= write(row, first + h * kStreamThreads, held[h], sums);
  }
  const int single_column = part.single(row.shape);
  passed |= write_single(row, single_column, row.load_single(single_column), sums);
  const int thread = threadIdx.x;
  if constexpr (kBackward) mend<kStreamThreads>(row, {thread, part.begin, part.end, single_column}, passed);
}

constexpr int kMostThreads = 1024, kMostHeld = 8;
// Bytes of a row that registers hold, and as many more in shared memory where the device has that.
constexpr int64_t kHeldBytes = int64_t{kMostThreads} * kMostHeld * 16;

template <typename T, bool kBackward, int kThreads, int kHeld, bool kSpare = false>
void launch_rows_held(const LogSoftmaxParams& p, cudaStream_t stream) {
  const dim3 grid(kThreads == kWarp ? ceil_div(p.n, kWarpsOfRows) : p.n);
  constexpr size_t kSharedBytes = kSpare ? size_t{kThreads} * kHeld * 16 : 0;
  launch(row_kernel<T, kBackward, kThreads, kHeld, kSpare>, grid, kBlockThreads<kThreads>, kSharedBytes,
         stream, p);
}

template <typename T, bool kBackward>
void launch_rows(const LogSoftmaxParams& p, cudaStream_t stream) {
  if (p.splits > 0) {
    const dim3 grid(static_cast<unsigned>(int64_t{p.n} * p.splits));
    launch(parts_kernel<T, kBackward>, grid, kStreamThreads, 0, stream, p);
    launch(write_kernel<T, kBackward>, grid, kStreamThreads, 0, stream, p);
    return;
  }
  const int pieces = p.m / kSize<T>;
  if (pieces <= 32) return launch_rows_held<T, kBackward, 32, 1>(p, stream);
  if (pieces <= 32 * 4) return launch_rows_held<T, kBackward, 32, 4>(p, stream);
  if (pieces <= 32 * 8) return launch_rows_held<T, kBackward, 32, 8>(p, stream);
  if (pieces <= 256 * 4) return launch_rows_held<T, kBackward, 256, 4>(p, stream);
  if (pieces <= 256 * 8) return launch_rows_held<T, kBackward, 256, 8>(p, stream);
  if (pieces <= 512 * 8) return launch_rows_held<T, kBackward, 512, 8>(p, stream);
  if (pieces <= kMostThreads * kMostHeld)
    return launch_rows_held<T, kBackward, kMostThreads, kMostHeld>(p, stream);
  launch_rows_held<T, kBackward, kMostThreads, kMostHeld, true>(p, stream);
}

}  // namespace

int log_softmax_splits(int n, int m, Type type, int multiprocessors, int shared_bytes) {
  const int64_t bytes = int64_t{m} * (type == Type::kFloat ? 4 : 2);
  const int64_t longest = shared_bytes >= kHeldBytes ? 2 * kHeldBytes : kHeldBytes;
  const bool few = 2 * n <= multiprocessors && bytes > 32 * 1024;
  if (bytes <= longest && !few) return 0;
  const int64_t wanted = ceil_div(kWaves * multiprocessors, n);
  const int64_t most = ceil_div<int64_t>(bytes, kStreamThreads * kStreamed * 16);
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, most));
}

void launch_log_softmax_forward(const LogSoftmaxParams& p, Type type, cudaStream_t stream) {
  dispatch_type(type, [&](auto t) { launch_rows<decltype(t), false>(p, stream); });
}

void launch_log_softmax_backward(const LogSoftmaxParams& p, Type type, cudaStream_t stream) {
  dispatch_type(type, [&](auto t) { launch_rows<decltype(t), true>(p, stream); });
}

}  // namespace cl_kernels::cuda
