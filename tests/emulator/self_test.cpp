// The emulator itself: products through shared memory give what they should, and mistakes do not go
// unnoticed. The argument names a case; the exit code is 0 where the numbers are right, 1 where they are not.
#include <cstring>
#include <random>

#include "launch.h"
#include "tensor_map.cu"
#include "wgmma.h"

using namespace cl_kernels::cuda;

enum Mistake {
  kNone,
  kNoWaitForProduct,
  kNoWaitForCopy,
  kRefilledEarly,
  kDeadlock,
  kNotReleasedByAll,
  kEndsEarly,
  kNoMeeting
};

constexpr int kRows = 64, kColumns = 64, kTile = 64 * 128;

// y = round(x x^T) x, of x [64, 64], by a warpgroup.
__global__ void by_wgmma(const TensorMap map, float* y, Mistake mistake) {
  unsigned char* memory = dynamic_shared();
  uint64_t* barrier = reinterpret_cast<uint64_t*>(memory + 2 * kTile);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, mistake == kDeadlock ? 2 : 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, 2 * kTile);
    tma_load(memory, &map, 0, 0, barrier);
    tma_load(memory + kTile, &map, 0, 0, barrier);
  }
  mbarrier_wait(barrier, 0);
  const uint32_t left = shared_address(memory), right = shared_address(memory + kTile);
  float s[kColumns / 2] = {}, out[kColumns / 2] = {};
  wgmma_fence();
  for (int k = 0; k < 4; ++k)
    wgmma<bf16_t, kColumns>(s, descriptor(left + 32 * k, 0, 1024), descriptor(right + 32 * k, 0, 1024),
                            k > 0);
  wgmma_commit();
  if (mistake != kNoWaitForProduct) wgmma_wait<0>();
  uint32_t a[4][4];
  for (int k = 0; k < 4; ++k)
    for (int r = 0; r < 4; ++r) a[k][r] = pack<bf16_t>(s[8 * k + 2 * r], s[8 * k + 2 * r + 1]);
  wgmma_fence();
  for (int k = 0; k < 4; ++k)
    wgmma_registers<bf16_t, kColumns>(out, a[k], descriptor(right + 2048 * k, kTile, 1024), k > 0);
  wgmma_commit();
  if (mistake == kRefilledEarly) {
    __syncthreads();
    if (threadIdx.x == 0) std::memset(memory + kTile, 0, kTile);
    __syncthreads();
  }
  wgmma_wait<0>();
  for (int i = 0; i < kColumns / 2; ++i) y[i * 128 + threadIdx.x] = out[i];
}

// The same by four warps, from copies by cp.async.
__global__ void by_mma(const bf16_t* x, float* y, Mistake mistake) {
  unsigned char* memory = dynamic_shared();
  for (int at = threadIdx.x; at < kRows * 8; at += 128) {
    const int row = at / 8, segment = at % 8;
    cp_async_16(memory + row * 128 + ((segment ^ (row & 7)) << 4), x + row * 64 + segment * 8, 16);
  }
  cp_async_commit();
  if (mistake != kNoWaitForCopy) cp_async_wait<0>();
  __syncthreads();
  const int lane = threadIdx.x % 32, matrix = lane / 8, first = threadIdx.x / 32 * 16;
  auto at = [&](int row, int segment) { return memory + row * 128 + ((segment ^ (row & 7)) << 4); };
  float s[8][4] = {}, out[8][4] = {};
  for (int k = 0; k < 4; ++k) {
    uint32_t a[4], b[4];
    ldmatrix_x4(a, at(first + lane % 8 + matrix % 2 * 8, 2 * k + matrix / 2));
    for (int t = 0; t < 8; t += 2) {
      ldmatrix_x4(b, at(8 * t + lane % 8 + matrix / 2 * 8, 2 * k + matrix % 2));
      mma<bf16_t>(s[t], a, b[0], b[1]);
      mma<bf16_t>(s[t + 1], a, b[2], b[3]);
    }
  }
  for (int k = 0; k < 4; ++k) {
    uint32_t a[4], b[2];
    for (int r = 0; r < 4; ++r)
      a[r] = pack<bf16_t>(s[2 * k + r / 2][r % 2 * 2], s[2 * k + r / 2][r % 2 * 2 + 1]);
    for (int t = 0; t < 8; ++t) {
      for (int r = 0; r < 2; ++r) {
        auto value = [&](int e) {
          const int row = 16 * k + 8 * r + lane % 4 * 2 + e;
          return to_float(reinterpret_cast<const bf16_t*>(at(row, t))[lane / 4]);
        };
        b[r] = pack<bf16_t>(value(0), value(1));
      }
      mma<bf16_t>(out[t], a, b[0], b[1]);
    }
  }
  if (mistake == kNoWaitForCopy) cp_async_wait<0>();
  for (int i = 0; i < 32; ++i) y[i * 128 + threadIdx.x] = out[i / 4][i % 4];
}

// y [2, 2, 64, 64]: in each block of a cluster of two the rows of x [128, 64], 64 at a time, of which each
// block copies half for both.
__global__ void by_cluster(const TensorMap map, bf16_t* y, Mistake mistake) {
  unsigned char* memory = dynamic_shared();
  uint64_t* full = reinterpret_cast<uint64_t*>(memory + kTile);
  uint64_t* empty = full + 1;
  const int rank = blockIdx.x, releases = mistake == kNotReleasedByAll ? 1 : 2;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, releases);
    mbarrier_init_fence();
  }
  if (mistake == kNoMeeting)
    __syncthreads();
  else
    cluster_sync();
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) {
      if (round > 0) mbarrier_wait_cluster(empty, 0);
      mbarrier_arrive_expect(full, kTile);
      tma_load_multicast(memory + rank * kTile / 2, &map, 0, round * kRows + rank * kRows / 2, full, 3);
    }
    mbarrier_wait(full, round);
    for (int at = threadIdx.x; at < kTile / 2; at += 32) {
      const int byte = 2 * at;
      y[(rank * 2 + round) * kTile / 2 + at] =
          *reinterpret_cast<bf16_t*>(memory + (byte ^ (byte >> 7 & 7) << 4));
    }
    __syncwarp();
    const int other = threadIdx.x == 0 ? rank : 1 - rank;
    if (static_cast<int>(threadIdx.x) < releases) mbarrier_arrive_at(empty, other);
  }
  if (mistake != kEndsEarly) cluster_sync();
}

int check_cluster(Mistake mistake) {
  std::vector<bf16_t> x(2 * kRows * 64), y(2 * x.size());
  for (size_t at = 0; at < x.size(); ++at) x[at] = __float2bfloat16_rn(static_cast<float>(at % 251));
  launch_clusters(2, by_cluster, dim3(2), 32, kTile + 16, nullptr,
                  make_tensor_map(x.data(), 64, 2 * kRows, 64, kRows / 2, true), y.data(), mistake);
  for (size_t at = 0; at < y.size(); ++at)
    if (to_float(y[at]) != to_float(x[at % x.size()])) return 1;
  return 0;
}

int main(int, char** arguments) {
  const std::string name = arguments[1];
  if (name == "cluster") return check_cluster(kNone);
  if (name == "cluster, not released by all") return check_cluster(kNotReleasedByAll);
  if (name == "cluster, ends early") return check_cluster(kEndsEarly);
  if (name == "cluster, no meeting") return check_cluster(kNoMeeting);
  const bool portable = name.rfind("mma", 0) == 0;
  const Mistake mistake = name == "wgmma, no wait"    ? kNoWaitForProduct
                          : name == "mma, no wait"    ? kNoWaitForCopy
                          : name == "wgmma, refilled" ? kRefilledEarly
                          : name == "wgmma, deadlock" ? kDeadlock
                                                      : kNone;
  std::vector<bf16_t> x(kRows * kColumns);
  std::mt19937 generator;
  std::normal_distribution<float> normal;
  for (bf16_t& value : x) value = __float2bfloat16_rn(normal(generator));
  std::vector<float> y(kRows * kColumns, NAN);
  if (portable)
    launch(by_mma, dim3(1), 128, kTile, nullptr, static_cast<const bf16_t*>(x.data()), y.data(), mistake);
  else
    launch(by_wgmma, dim3(1), 128, 2 * kTile + 8, nullptr, make_tensor_map(x.data(), 64, 64, 64, 64, true),
           y.data(), mistake);
  double s[kRows][kRows], worst = 0.0;
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kRows; ++j) {
      double sum = 0.0;
      for (int k = 0; k < kColumns; ++k)
        sum += to_float(x[i * 64 + k]) * static_cast<double>(to_float(x[j * 64 + k]));
      s[i][j] = to_float(__float2bfloat16_rn(static_cast<float>(sum)));
    }
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < 32; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2),
                column = i / 4 * 8 + 2 * (thread % 4) + i % 2;
      double sum = 0.0;
      for (int j = 0; j < kRows; ++j) sum += s[row][j] * to_float(x[j * 64 + column]);
      const double error = std::fabs(sum - y[i * 128 + thread]) / (1 + std::fabs(sum));
      if (!(error <= worst)) worst = error;
    }
  return worst < 1e-4 ? 0 : 1;
}
