// The ops of cl_kernels/ops.py by their names. Each of the two libraries, the CPU's and the GPU's, implements
// the functions of <op>.h and registers its own.
#pragma once

#include <torch/library.h>

#include "contrastive.h"
#include "dimcl.h"
#include "log_softmax.h"
#include "similarity.h"
#include "soft_target.h"

namespace cl_kernels {
namespace {

using at::Tensor;
using std::optional;

// The schemas' arguments one by one, here alone.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_forward_op(
    const Tensor& q, const optional<Tensor>& k, const Tensor& scale, optional<int64_t> exclude,
    const optional<Tensor>& row_labels, const optional<Tensor>& col_labels, std::string_view among,
    bool label_positives, const optional<Tensor>& positive_index, const optional<Tensor>& positive_mask,
    const optional<Tensor>& key_bias, bool both_axes, bool save_gradient) {
  return contrastive_forward({q, k, scale, exclude, row_labels, col_labels, among, label_positives,
                              positive_index, positive_mask, key_bias, both_axes},
                             save_gradient);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_backward_op(
    const optional<Tensor>& grad_lse, const optional<Tensor>& grad_lse_cols,
    const optional<Tensor>& grad_positive_sum, const Tensor& q, const optional<Tensor>& k,
    const Tensor& scale, optional<int64_t> exclude, const optional<Tensor>& row_labels,
    const optional<Tensor>& col_labels, std::string_view among, bool label_positives,
    const optional<Tensor>& positive_index, const optional<Tensor>& positive_mask,
    const optional<Tensor>& key_bias, bool both_axes, const Tensor& lse, const Tensor& lse_cols,
    const Tensor& residual, std::array<bool, 4> needs) {
  return contrastive_backward({grad_lse, grad_lse_cols, grad_positive_sum},
                              {q, k, scale, exclude, row_labels, col_labels, among, label_positives,
                               positive_index, positive_mask, key_bias, both_axes},
                              {lse, lse_cols, residual}, needs);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> soft_target_forward_op(
    const Tensor& q, at::TensorList k, const Tensor& target_q, at::TensorList target_k, const Tensor& scale,
    const Tensor& target_scale, const optional<Tensor>& positive, std::string_view positive_in_target,
    bool save_gradient) {
  return soft_target_forward({q, k, target_q, target_k, scale, target_scale, positive, positive_in_target},
                             save_gradient);
}

std::tuple<Tensor, std::vector<Tensor>, Tensor, std::vector<Tensor>, Tensor, Tensor> soft_target_backward_op(
    const optional<Tensor>& grad_lse, const optional<Tensor>& grad_target_lse,
    const optional<Tensor>& grad_cross, const optional<Tensor>& grad_positive_sum, const Tensor& q,
    at::TensorList k, const Tensor& target_q, at::TensorList target_k, const Tensor& scale,
    const Tensor& target_scale, const optional<Tensor>& positive, std::string_view positive_in_target,
    const Tensor& lse, const Tensor& target_lse, const Tensor& cross, const Tensor& positive_sum,
    const Tensor& mean_key, const Tensor& mean_target_key, std::array<bool, 4> needs) {
  return soft_target_backward({grad_lse, grad_target_lse, grad_cross, grad_positive_sum},
                              {q, k, target_q, target_k, scale, target_scale, positive, positive_in_target},
                              {lse, target_lse, cross, positive_sum, mean_key, mean_target_key}, needs);
}

void register_ops(torch::Library& m) {
  m.impl("contrastive_forward", contrastive_forward_op);
  m.impl("contrastive_backward", contrastive_backward_op);
  m.impl("soft_target_forward", soft_target_forward_op);
  m.impl("soft_target_backward", soft_target_backward_op);
  m.impl("dimcl_forward", dimcl_forward);
  m.impl("dimcl_backward", dimcl_backward);
  m.impl("similarity_forward", similarity_forward);
  m.impl("similarity_backward", similarity_backward);
  m.impl("masked_log_softmax_forward", masked_log_softmax_forward);
  m.impl("masked_log_softmax_backward", masked_log_softmax_backward);
}

}  // namespace
}  // namespace cl_kernels
