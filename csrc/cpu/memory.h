// Memory of which much is soon written: in large pages where the system has them on request.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cl_kernels::cpu {

template <typename T>
at::Tensor large_empty(at::IntArrayRef sizes) {
  at::Tensor memory = at::empty(sizes, at::CppTypeToScalarType<T>::value);
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 12, kLargePage = uintptr_t{1} << 21;
  const uintptr_t data = reinterpret_cast<uintptr_t>(memory.data_ptr()), begin = data / kPage * kPage;
  if (memory.nbytes() >= kLargePage)
    madvise(reinterpret_cast<void*>(begin), data + memory.nbytes() - begin, MADV_HUGEPAGE);
#endif
  return memory;
}

template <typename T>
at::Tensor large_zeros(at::IntArrayRef sizes) {
  return large_empty<T>(sizes).zero_();
}

}  // namespace cl_kernels::cpu
