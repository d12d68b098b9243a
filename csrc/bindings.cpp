// The Python module, and the registration of the CPU kernels. Schemas: cl_kernels/ops.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include "contrastive.h"
#include "cpu/tiles.h"
#include "dimcl.h"
#include "log_softmax.h"
#include "similarity.h"
#include "soft_target.h"

namespace {

using at::Tensor;
using std::optional;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_forward(
    const Tensor& q, const optional<Tensor>& k, const Tensor& scale, optional<int64_t> exclude,
    const optional<Tensor>& row_labels, const optional<Tensor>& col_labels, std::string_view among,
    bool label_positives, const optional<Tensor>& positive_index, const optional<Tensor>& positive_mask,
    const optional<Tensor>& key_bias, bool both_axes, bool save_gradient) {
  return cl_kernels::contrastive_forward(q, k, scale,
                                         {exclude, row_labels, col_labels, among, label_positives,
                                          positive_index, positive_mask, key_bias, both_axes},
                                         save_gradient);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_backward(
    const optional<Tensor>& grad_lse, const optional<Tensor>& grad_lse_cols,
    const optional<Tensor>& grad_positive_sum, const Tensor& q, const optional<Tensor>& k,
    const Tensor& scale, optional<int64_t> exclude, const optional<Tensor>& row_labels,
    const optional<Tensor>& col_labels, std::string_view among, bool label_positives,
    const optional<Tensor>& positive_index, const optional<Tensor>& positive_mask,
    const optional<Tensor>& key_bias, bool both_axes, const Tensor& lse, const Tensor& lse_cols,
    const Tensor& residual, std::array<bool, 3> needs) {
  return cl_kernels::contrastive_backward(grad_lse, grad_lse_cols, grad_positive_sum, q, k, scale,
                                          {exclude, row_labels, col_labels, among, label_positives,
                                           positive_index, positive_mask, key_bias, both_axes},
                                          lse, lse_cols, residual, needs);
}

}  // namespace

TORCH_LIBRARY_IMPL(cl_kernels, CPU, m) {
  m.impl("contrastive_forward", contrastive_forward);
  m.impl("contrastive_backward", contrastive_backward);
  m.impl("soft_target_forward", cl_kernels::soft_target_forward);
  m.impl("soft_target_backward", cl_kernels::soft_target_backward);
  m.impl("dimcl_forward", cl_kernels::dimcl_forward);
  m.impl("dimcl_backward", cl_kernels::dimcl_backward);
  m.impl("similarity_forward", cl_kernels::similarity_forward);
  m.impl("similarity_backward", cl_kernels::similarity_backward);
  m.impl("masked_log_softmax_forward", cl_kernels::masked_log_softmax_forward);
  m.impl("masked_log_softmax_backward", cl_kernels::masked_log_softmax_backward);
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
