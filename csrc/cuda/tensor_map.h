// What the bulk copy engine knows of a matrix: half-precision elements, copied in boxes of 64 columns into
// rows of 128 bytes, swizzled, with zeros outside the matrix.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace cl_kernels::cuda {

#ifdef CL_KERNELS_EMULATED
struct TensorMap {
  const unsigned char* data;
  int64_t row_bytes;
  int rows, columns, box_rows;
};
#else
using TensorMap = CUtensorMap;
#endif

constexpr int kBoxColumns = 64;

TensorMap make_tensor_map(const void* data,    // [rows, columns] of half or bfloat16, aligned to 16 bytes
                          int64_t row_stride,  // elements, a multiple of 8
                          int rows, int columns, int box_rows, bool bfloat16);

}  // namespace cl_kernels::cuda
