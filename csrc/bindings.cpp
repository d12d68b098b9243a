// The Python module, and the registration of the CPU kernels. Schemas: cl_kernels/ops.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "cpu/tiles.h"
#include "registration.h"

TORCH_LIBRARY_IMPL(cl_kernels, CPU, m) {
  cl_kernels::register_ops(m);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of cl_kernels; importing it registers them with the dispatcher.";
  m.def("cpu_capability", cl_kernels::cpu::capability, "The instruction set in use.");
  m.def("cpu_capabilities", cl_kernels::cpu::capabilities,
        "The instruction sets that this machine can run, narrowest first.");
  m.def("set_cpu_capability", cl_kernels::cpu::set_capability, pybind11::arg("name"),
        "Choose among them; ValueError otherwise.");
  m.def("build_info", [] {
    return std::map<std::string, std::string>{
        {"torch", TORCH_VERSION}, {"compiler", __VERSION__}, {"cxx_standard", std::to_string(__cplusplus)}};
  });
}
