// Launching kernels, on a GPU or by the emulator that the tests run them in.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace cl_kernels::cuda {

#ifdef CL_KERNELS_EMULATED

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  emulator::run(grid, threads, shared_bytes, [&] { kernel(arguments...); });
}

#else

// An error that is thrown is no longer CUDA's last one: what serves instead must not find it.
inline void check_status(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// One kernel on a stream, with as much dynamic shared memory as it asks for.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {
    check_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes)),
                 "raising the limit of shared memory");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check_status(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "launching a kernel");
}

#endif

}  // namespace cl_kernels::cuda
