// Host side: tensors as the kernels take them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "device.h"
#include "launch.h"

#ifndef CL_KERNELS_EMULATED
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace cl_kernels::cuda {

inline Type type_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Type::kFloat;
    case at::kHalf:
      return Type::kHalf;
    case at::kBFloat16:
      return Type::kBf16;
    default:
      TORCH_CHECK_TYPE(false, "the cuda backend takes float16, bfloat16 and float32, not ", x.scalar_type());
  }
}

// The device that ops run on, while one runs.
#ifdef CL_KERNELS_EMULATED
struct DeviceGuard {
  explicit DeviceGuard(const at::Tensor&) {}
};
inline cudaStream_t stream() {
  return nullptr;
}
inline int multiprocessors() {
  return 3;
}
inline int portable_programs() {
  return 2 * multiprocessors();
}
// Bytes that a block may take: Hopper's, or CL_KERNELS_EMULATED_SHARED.
inline int shared_memory() {
  const char* given = std::getenv("CL_KERNELS_EMULATED_SHARED");
  return given != nullptr ? std::stoi(given) : 227 * 1024;
}
// The architecture whose kernels are to run: sm_80's, or Hopper's with CL_KERNELS_EMULATED_ARCHITECTURE=90.
inline int architecture() {
  const char* given = std::getenv("CL_KERNELS_EMULATED_ARCHITECTURE");
  return given != nullptr ? std::stoi(given) : 80;
}
// Rows of a symmetric G at once: a block, so that small problems have several chunks.
inline int mirrored_rows() {
  return 128;
}
inline bool is_small(int64_t) {
  return std::getenv("CL_KERNELS_EMULATED_SMALL") != nullptr;
}
#else
struct DeviceGuard {
  explicit DeviceGuard(const at::Tensor& x) : guard(x.device()) {}
  c10::cuda::CUDAGuard guard;
};
inline cudaStream_t stream() {
  return c10::cuda::getCurrentCUDAStream();
}
// Rows of a symmetric G at once: as few as still fill the device with a product's tiles.
inline int mirrored_rows() {
  return 4096;
}
// Problems, by N M D, whose time is that of their launches.
inline bool is_small(int64_t products) {
  return products <= int64_t{1} << 29;
}
inline int device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  check_status(cudaDeviceGetAttribute(&value, attribute, c10::cuda::current_device()),
               "asking for a device's attribute");
  return value;
}
inline int multiprocessors() {
  return device_attribute(cudaDevAttrMultiProcessorCount);
}
// Programs of the portable kernels with products (tiles.h) that run at once: two a multiprocessor, of 80 KiB
// of shared memory at most, where there is as much.
inline int portable_programs() {
  const int fit = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / (80 * 1024);
  return multiprocessors() * std::clamp(fit, 1, 2);
}
inline int shared_memory() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}
inline int architecture() {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) * 10 +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}
#endif

inline Scalar scalar_of(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.numel() == 1 && x.scalar_type() == at::kFloat, "a scale must be one float32");
  if (x.is_cpu()) return {nullptr, *x.const_data_ptr<float>()};
  return {x.const_data_ptr<float>(), 0};
}

// [N, D] with stride 1 along D and rows that start at multiples of 16 bytes: x itself where it is so, else a
// copy whose padding is never read.
inline at::Tensor row_major(const at::Tensor& x) {
  const int64_t lanes = 16 / x.element_size();
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  const bool unit = x.stride(1) == 1 || x.size(1) == 1;
  const bool whole = x.stride(0) % lanes == 0 || x.size(0) == 1;
  if (aligned && unit && whole && (x.size(0) == 1 || x.stride(0) >= x.size(1))) return x;
  at::Tensor padded = at::empty({x.size(0), round_up(x.size(1), lanes)}, x.options());
  at::Tensor copy = padded.narrow(1, 0, x.size(1));
  copy.copy_(x);
  return copy;
}

// Elements from one row to the next of a row_major matrix: a multiple of 16 bytes, of a single row too.
inline int64_t row_stride(const at::Tensor& x) {
  const int64_t lanes = 16 / x.element_size();
  return x.size(0) == 1 ? round_up(x.size(1), lanes) : x.stride(0);
}

inline at::Tensor empty_like_device(const at::Tensor& x, at::IntArrayRef sizes, at::ScalarType type) {
  return at::empty(sizes, x.options().dtype(type));
}

// Whether two tensors are the same memory.
inline bool is_same(const at::Tensor& a, const at::Tensor& b) {
  return a.const_data_ptr() == b.const_data_ptr() && a.sizes() == b.sizes() && a.strides() == b.strides();
}

// out = a b in float32, sums too, of matrices of one type.
inline void product_into(at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
#ifndef CL_KERNELS_EMULATED
  if (a.scalar_type() != at::kFloat) {
    at::mm_out(out, a, b, at::kFloat);
    return;
  }
#endif
  at::mm_out(out, a.to(at::kFloat), b.to(at::kFloat));
}

// The same in memory of its own.
inline at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
#ifndef CL_KERNELS_EMULATED
  if (a.scalar_type() != at::kFloat) return at::mm(a, b, at::kFloat);
#endif
  return at::mm(a.to(at::kFloat), b.to(at::kFloat));
}

}  // namespace cl_kernels::cuda
