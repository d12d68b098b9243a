// The Python module of the GPU kernels, and their registration: for GPU tensors, or for CPU tensors where the
// kernels are compiled for the tests' emulator.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "../registration.h"

#ifdef CL_KERNELS_EMULATED
TORCH_LIBRARY_IMPL(cl_kernels_cuda, CPU, m) {
  cl_kernels::register_ops(m);
}
#else
TORCH_LIBRARY_IMPL(cl_kernels_cuda, CUDA, m) {
  cl_kernels::register_ops(m);
}
#endif

// Given by the build, as a list of sm_XX (machine code) and compute_XX (PTX).
#ifndef CL_KERNELS_CUDA_ARCHITECTURES
#define CL_KERNELS_CUDA_ARCHITECTURES
#endif
#define CL_KERNELS_TEXT(...) #__VA_ARGS__
#define CL_KERNELS_TEXT_OF(...) CL_KERNELS_TEXT(__VA_ARGS__)

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CUDA kernels of cl_kernels; importing it registers them with the dispatcher.";
  m.def("build_info", [] {
    return std::map<std::string, std::string>{
        {"torch", TORCH_VERSION},
        {"cuda", std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10)},
        {"architectures", CL_KERNELS_TEXT_OF(CL_KERNELS_CUDA_ARCHITECTURES)},
        {"compiler", __VERSION__}};
  });
}
