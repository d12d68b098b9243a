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
void launch_clusters(int cluster, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                     cudaStream_t, const Arguments&... arguments) {
  emulator::run(grid, threads, shared_bytes, [&] { kernel(arguments...); }, cluster);
}

template <typename Kernel>
int clusters_at_once(int, Kernel, int, size_t) {
  return 2;
}

#else

// An error that is thrown is no longer CUDA's last one: what serves instead must not find it.
inline void check_status(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// What launches a kernel in clusters of blocks, with as much dynamic shared memory as it asks for.
struct Configuration {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  template <typename Kernel>
  Configuration(int cluster, Kernel kernel, dim3 grid, int threads, size_t shared_bytes) {
    if (shared_bytes > 48 * 1024) {
      check_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)),
                   "raising the limit of shared memory");
    }
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    if (cluster == 1) return;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  Configuration(const Configuration&) = delete;
};

template <typename... Parameters, typename... Arguments>
void launch_clusters(int cluster, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                     cudaStream_t stream, const Arguments&... arguments) {
  Configuration with(cluster, kernel, grid, threads, shared_bytes);
  with.config.stream = stream;
  check_status(cudaLaunchKernelEx(&with.config, kernel, Parameters(arguments)...), "launching a kernel");
}

// How many clusters of a kernel's blocks run at once on this device.
template <typename Kernel>
int clusters_at_once(int cluster, Kernel kernel, int threads, size_t shared_bytes) {
  const Configuration with(cluster, kernel, dim3(static_cast<unsigned>(cluster)), threads, shared_bytes);
  int count;
  check_status(cudaOccupancyMaxActiveClusters(&count, kernel, &with.config), "counting clusters");
  return count > 0 ? count : 1;  // where none fits, launching says why
}

#endif

// One kernel on a stream.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  launch_clusters(1, kernel, grid, threads, shared_bytes, stream, arguments...);
}

}  // namespace cl_kernels::cuda
