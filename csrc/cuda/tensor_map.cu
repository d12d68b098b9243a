#include "tensor_map.h"

#ifndef CL_KERNELS_EMULATED
#include <cudaTypedefs.h>
#endif

#include <stdexcept>
#include <string>

#include "launch.h"

namespace cl_kernels::cuda {

#ifdef CL_KERNELS_EMULATED

TensorMap make_tensor_map(const void* data, int64_t row_stride, int rows, int columns, int box_rows, bool) {
  return {static_cast<const unsigned char*>(data), row_stride * 2, rows, columns, box_rows};
}

#else

namespace {

// Found through the runtime, so that nothing links to the driver.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    check_status(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result),
        "looking for cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess)
      throw std::runtime_error("this driver has no cuTensorMapEncodeTiled: CUDA 12 or later is needed");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return found;
}

}  // namespace

TensorMap make_tensor_map(const void* data, int64_t row_stride, int rows, int columns, int box_rows,
                          bool bfloat16) {
  TensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_stride) * 2};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult status = encoder()(
      &map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled failed with code " + std::to_string(status));
  return map;
}

#endif

}  // namespace cl_kernels::cuda
