// The Python module, and the registration of the CPU kernels. Schemas: cl_kernels/ops.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "cpu/budget.h"
#include "cpu/loss.h"
#include "cpu/tiles.h"
#include "registration.h"

namespace cl_kernels {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_loss_op(
    const Tensor& q, const optional<Tensor>& k, const Tensor& scale, optional<int64_t> exclude,
    const optional<Tensor>& row_labels, const optional<Tensor>& col_labels, std::string_view among,
    bool label_positives, const optional<Tensor>& positive_index, const optional<Tensor>& positive_mask,
    const optional<Tensor>& key_bias, bool both_axes, bool unit, double factor, bool mean, bool drop,
    bool at_least_zero, std::array<bool, 3> needs) {
  return cpu::contrastive_loss({q, k, scale, exclude, row_labels, col_labels, among, label_positives,
                                positive_index, positive_mask, key_bias, both_axes},
                               unit, {factor, mean, drop, at_least_zero, needs});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dimcl_loss_op(const Tensor& z0, const Tensor& z1,
                                                         const Tensor& scale,
                                                         const optional<Tensor>& positive_mask, bool mean,
                                                         std::array<bool, 3> needs) {
  return cpu::dimcl_loss(z0, z1, scale, positive_mask, {1, mean, false, true, needs});
}

std::tuple<Tensor, Tensor, Tensor> key_loss_op(const Tensor& q, at::TensorList k,
                                               const optional<Tensor>& target_q, const Tensor& scale,
                                               const optional<Tensor>& target_scale,
                                               const optional<Tensor>& coeff, const optional<Tensor>& own,
                                               const optional<Tensor>& positive, bool positive_is_zero,
                                               bool mean, std::array<bool, 2> needs) {
  return cpu::key_loss({q, k, target_q, scale, target_scale, coeff, own, positive, positive_is_zero}, mean,
                       needs);
}

}  // namespace
}  // namespace cl_kernels

TORCH_LIBRARY_IMPL(cl_kernels, CPU, m) {
  cl_kernels::register_ops(m);
  m.impl("contrastive_loss", cl_kernels::contrastive_loss_op);
  m.impl("dimcl_loss", cl_kernels::dimcl_loss_op);
  m.impl("key_loss", cl_kernels::key_loss_op);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of cl_kernels; importing it registers them with the dispatcher.";
  m.def("cpu_capability", cl_kernels::cpu::capability, "The instruction set in use.");
  m.def("cpu_capabilities", cl_kernels::cpu::capabilities,
        "The instruction sets that this machine can run, narrowest first.");
  m.def("set_cpu_capability", cl_kernels::cpu::set_capability, pybind11::arg("name"),
        "Choose among them; ValueError otherwise.");
  m.def("keep_budget", cl_kernels::cpu::keep_budget,
        "Bytes of logits that a loss may keep between its two passes over them.");
  m.def("set_keep_budget", cl_kernels::cpu::set_keep_budget, pybind11::arg("bytes"), "Set them.");
  m.def("build_info", [] {
    return std::map<std::string, std::string>{
        {"torch", TORCH_VERSION}, {"compiler", __VERSION__}, {"cxx_standard", std::to_string(__cplusplus)}};
  });
}
