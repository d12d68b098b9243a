// The row kernels that no op has to itself, as functions of tensors for tests/cuda/test_rows.py.
#include <torch/library.h>

#include <limits>

#include "../../csrc/log_softmax.h"
#include "columns.h"
#include "positives.h"
#include "similarity_rows.h"
#include "tensors.h"

namespace cl_kernels::cuda {
namespace {

using at::Tensor;
using std::optional;

Tensor empty(const Tensor& like, at::IntArrayRef sizes, at::ScalarType type) {
  return at::empty(sizes, like.options().dtype(type));
}

// x [2D, stride], mean [2, D], rnorm [2, D] of z0 and z1 [N, D].
std::tuple<Tensor, Tensor, Tensor> standardise(const Tensor& z0, const Tensor& z1) {
  const int n = static_cast<int>(z0.size(0)), d = static_cast<int>(z0.size(1));
  const int64_t stride = round_up<int64_t>(n, 16 / z0.element_size());
  Tensor x = empty(z0, {2 * d, stride}, z0.scalar_type());
  Tensor mean = empty(z0, {2, d}, at::kFloat), rnorm = empty(z0, {2, d}, at::kFloat);
  Tensor parts = empty(z0, {2, column_chunks(n), 2, d}, at::kFloat);
  const float noise = 4 * std::numeric_limits<float>::epsilon() * std::sqrt(static_cast<float>(n));
  launch_standardise({{z0.const_data_ptr(), z1.const_data_ptr()},
                      {z0.stride(0), z1.stride(0)},
                      n,
                      d,
                      noise,
                      parts.mutable_data_ptr<float>(),
                      mean.mutable_data_ptr<float>(),
                      rnorm.mutable_data_ptr<float>(),
                      x.mutable_data_ptr(),
                      stride},
                     type_of(z0), stream());
  return {x, mean, rnorm};
}

// The gradients of z0 and z1 [N, D] from that of x.
std::tuple<Tensor, Tensor> column_gradient(const Tensor& grad, const Tensor& x, const Tensor& rnorm) {
  const int n = static_cast<int>(grad.size(1)), d = static_cast<int>(grad.size(0) / 2);
  Tensor along = empty(grad, {2, 2 * d}, at::kFloat);
  Tensor grad_z0 = empty(grad, {n, d}, x.scalar_type()), grad_z1 = empty(grad, {n, d}, x.scalar_type());
  launch_column_gradient({grad.const_data_ptr<float>(),
                          x.const_data_ptr(),
                          x.stride(0),
                          rnorm.const_data_ptr<float>(),
                          n,
                          d,
                          along.mutable_data_ptr<float>(),
                          {grad_z0.mutable_data_ptr(), grad_z1.mutable_data_ptr()}},
                         type_of(x), stream());
  return {grad_z0, grad_z1};
}

std::tuple<Tensor, Tensor> ids(const Tensor& row_labels, const Tensor& col_labels) {
  const LabelIds found = label_ids(row_labels, col_labels);
  return {found.rows, found.cols};
}

std::tuple<Tensor, Tensor> classes(const Tensor& row_labels, const Tensor& col_labels) {
  const LabelIds found = label_classes(row_labels, col_labels).ids;
  return {found.rows, found.cols};
}

// Sums over the positives of half-precision features.
std::tuple<Tensor, Tensor> sums(const Tensor& q, const optional<Tensor>& k, const Tensor& scale,
                                optional<int64_t> exclude, const optional<Tensor>& row_labels,
                                const optional<Tensor>& col_labels, const optional<Tensor>& positive_index,
                                const optional<Tensor>& positive_mask) {
  Contrast problem{q, k, scale, exclude};
  problem.label_positives = row_labels.has_value();
  problem.positive_index = positive_index;
  problem.positive_mask = positive_mask;
  optional<LabelClasses> classes;
  if (row_labels) classes = label_classes(*row_labels, *col_labels);
  return positive_sums(problem, classes ? &*classes : nullptr, {});
}

// 1 / norm [N] of the rows of x [N, D], and the rows at unit length [N, stride].
std::tuple<Tensor, Tensor> row_norms(const Tensor& x) {
  const Tensor rows = row_major(x);
  const int64_t n = x.size(0), d = x.size(1), stride = round_up<int64_t>(d, 16 / x.element_size());
  Tensor rnorm = empty(x, {n}, at::kFloat), unit = empty(x, {n, stride}, x.scalar_type());
  launch_row_norms({rows.const_data_ptr(), row_stride(rows), static_cast<int>(n), static_cast<int>(d),
                    rnorm.mutable_data_ptr<float>(), unit.mutable_data_ptr(), stride},
                   type_of(x), stream());
  return {rnorm, unit};
}

// The gradient of x [N, D] from that of its (unit) rows, and x . g of each.
std::tuple<Tensor, Tensor> row_gradient(const Tensor& grad, const Tensor& x, const optional<Tensor>& rnorm,
                                        const Tensor& scale, double factor, double share) {
  const Tensor rows = row_major(x);
  const int64_t n = x.size(0), d = x.size(1);
  Tensor out = empty(x, {n, d}, x.scalar_type()), along = empty(x, {n}, at::kDouble);
  launch_row_gradient({grad.const_data_ptr<float>(), rows.const_data_ptr(), row_stride(rows),
                       rnorm ? rnorm->const_data_ptr<float>() : nullptr, static_cast<int>(n),
                       static_cast<int>(d), scalar_of(scale), static_cast<float>(factor), share,
                       out.mutable_data_ptr(), along.mutable_data_ptr<double>()},
                      type_of(x), stream());
  return {out, along};
}

}  // namespace
}  // namespace cl_kernels::cuda

TORCH_LIBRARY(cl_kernels_cuda_rows, m) {
  m.def("log_softmax", cl_kernels::masked_log_softmax_forward);
  m.def("log_softmax_gradient", cl_kernels::masked_log_softmax_backward);
  m.def("standardise", cl_kernels::cuda::standardise);
  m.def("column_gradient", cl_kernels::cuda::column_gradient);
  m.def("ids", cl_kernels::cuda::ids);
  m.def("classes", cl_kernels::cuda::classes);
  m.def("positive_sums", cl_kernels::cuda::sums);
  m.def("row_norms", cl_kernels::cuda::row_norms);
  m.def("row_gradient", cl_kernels::cuda::row_gradient);
}
