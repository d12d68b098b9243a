// How much of a similarity matrix a loss may keep between its two passes over it, and the memory for that.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include <cstdint>

namespace cl_kernels::cpu {

// Bytes; at first those of CL_KERNELS_KEEP_MB, or 64 MB. Setting them frees memory that waits for a loss.
int64_t keep_budget();
void set_keep_budget(int64_t bytes);

// Memory that one loss leaves to the next, as new pages cost more than some of the work that keeping saves:
// taken while a loss lives, of two at a time by the first alone.
struct KeptMemory {
  at::Tensor bytes;  // uint8
  int64_t changes;   // of the budget, until it was taken
};
KeptMemory take_memory(int64_t bytes);  // at least so many
void leave_memory(const KeptMemory&);

template <typename T>
at::Tensor kept_memory(int64_t elements) {
  const KeptMemory memory = take_memory(elements * static_cast<int64_t>(sizeof(T)));
  return at::from_blob(
      memory.bytes.data_ptr(), {elements}, [memory](void*) { leave_memory(memory); },
      at::CppTypeToScalarType<T>::value);
}

}  // namespace cl_kernels::cpu
