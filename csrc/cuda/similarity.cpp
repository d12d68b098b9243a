#include "../similarity.h"

#include <ATen/ops/empty.h>

#include "engine.h"
#include "similarity.h"
#include "similarity_rows.h"
#include "tensors.h"

namespace cl_kernels {
namespace cuda {
namespace {

void check_shapes(const at::Tensor& q, const std::optional<at::Tensor>& k) {
  TORCH_CHECK_VALUE(q.dim() == 2 && q.size(1) > 0, "q must be [N, D] with features, got ", q.sizes());
  if (!k) return;
  TORCH_CHECK_VALUE(k->dim() == 2 && k->size(1) == q.size(1), "k must be [M, ", q.size(1), "], got ",
                    k->sizes());
  TORCH_CHECK_TYPE(k->scalar_type() == q.scalar_type(), "k must be of q's type ", q.scalar_type(), ", got ",
                   k->scalar_type());
}

RowNormsParams norms_of(const at::Tensor& x, at::Tensor& rnorm) {
  return {x.const_data_ptr(),
          row_stride(x),
          static_cast<int>(x.size(0)),
          static_cast<int>(x.size(1)),
          rnorm.mutable_data_ptr<float>(),
          nullptr,
          0};
}

// 1 / ||row|| of a row-major matrix, [N] float, 0 for a zero row.
at::Tensor reciprocal_norms(const at::Tensor& x) {
  at::Tensor rnorm = empty_like_device(x, {x.size(0)}, at::kFloat);
  launch_row_norms(norms_of(x, rnorm), type_of(x), stream());
  return rnorm;
}

// The rows at unit length, in the type of x.
at::Tensor unit_rows(const at::Tensor& x) {
  const int64_t stride = round_up<int64_t>(x.size(1), 16 / x.element_size());
  at::Tensor rnorm = empty_like_device(x, {x.size(0)}, at::kFloat),
             unit = at::empty({x.size(0), stride}, x.options());
  RowNormsParams params = norms_of(x, rnorm);
  params.unit = unit.mutable_data_ptr();
  params.unit_stride = stride;
  launch_row_norms(params, type_of(x), stream());
  return unit.narrow(1, 0, x.size(1));
}

// The gradient of x [N, D] from that of its (unit) rows, and share times the sum of both's products.
std::pair<at::Tensor, at::Tensor> through_rows(const at::Tensor& grad, const at::Tensor& x,
                                               const at::Tensor& rnorm, const at::Tensor& scale,
                                               bool normalize, bool needed, double share) {
  const at::Tensor g = grad.contiguous();
  at::Tensor out = at::empty(needed ? x.sizes() : at::IntArrayRef{0}, x.options());
  at::Tensor along = empty_like_device(x, {x.size(0)}, at::kDouble);
  launch_row_gradient({g.const_data_ptr<float>(), x.const_data_ptr(), row_stride(x),
                       normalize ? rnorm.const_data_ptr<float>() : nullptr, static_cast<int>(x.size(0)),
                       static_cast<int>(x.size(1)), scalar_of(scale), 1.0f, share,
                       needed ? out.mutable_data_ptr() : nullptr, along.mutable_data_ptr<double>()},
                      type_of(x), stream());
  return {needed ? out : out.to(at::kFloat), along.sum().to(at::kFloat)};
}

}  // namespace
}  // namespace cuda

std::tuple<at::Tensor, at::Tensor, at::Tensor> similarity_forward(const at::Tensor& q,
                                                                  const std::optional<at::Tensor>& k,
                                                                  const at::Tensor& scale, bool normalize) {
  cuda::check_shapes(q, k);
  const cuda::DeviceGuard guard(q);
  const at::Tensor x = cuda::row_major(q), y = k ? cuda::row_major(*k) : x;
  const auto nothing = [&] { return cuda::empty_like_device(q, {0}, at::kFloat); };
  const at::Tensor x_rnorm = normalize ? cuda::reciprocal_norms(x) : nothing();
  const at::Tensor y_rnorm = normalize && k ? cuda::reciprocal_norms(y) : nothing();
  at::Tensor out = at::empty({x.size(0), y.size(0)}, q.options());
  const cuda::SimilarityParams params{
      {x.const_data_ptr(), y.const_data_ptr(), cuda::row_stride(x), cuda::row_stride(y),
       static_cast<int>(x.size(0)), static_cast<int>(y.size(0)), static_cast<int>(x.size(1))},
      cuda::scalar_of(scale),
      normalize ? x_rnorm.const_data_ptr<float>() : nullptr,
      normalize ? (k ? y_rnorm : x_rnorm).const_data_ptr<float>() : nullptr,
      out.mutable_data_ptr(),
      out.size(1)};
  const cuda::Type type = cuda::type_of(x);
  if (type != cuda::Type::kFloat && cuda::architecture() == 90)
    cuda::launch_similarity_sm90(params, type, cuda::stream());
  else
    cuda::launch_similarity(params, type, cuda::precision_of(x), cuda::stream());
  return {out, x_rnorm, y_rnorm};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> similarity_backward(
    const at::Tensor& grad, const at::Tensor& q, const std::optional<at::Tensor>& k, const at::Tensor& scale,
    bool normalize, const at::Tensor& q_rnorm, const at::Tensor& k_rnorm, std::array<bool, 2> needs) {
  cuda::check_shapes(q, k);
  const cuda::DeviceGuard guard(q);
  const auto [needs_q, needs_k] = needs;
  const at::Tensor x = cuda::row_major(q), y = k ? cuda::row_major(*k) : x;
  const auto nothing = [&] { return cuda::empty_like_device(q, {0}, at::kFloat); };
  auto rows = [&](const at::Tensor& z) { return normalize ? cuda::unit_rows(z) : z; };
  at::Tensor grad_q = nothing(), grad_k = nothing(), grad_scale;
  if (k && needs_k) {
    std::tie(grad_k, grad_scale) =
        cuda::through_rows(cuda::product(grad.t(), rows(x)), y, k_rnorm, scale, normalize, true, 1.0);
  }
  if (needs_q || !(k && needs_k)) {
    const at::Tensor unit = rows(y);
    at::Tensor of_rows = cuda::product(grad, unit);
    if (!k && needs_q) of_rows += cuda::product(grad.t(), unit);
    std::tie(grad_q, grad_scale) =
        cuda::through_rows(of_rows, x, q_rnorm, scale, normalize, needs_q, !k && needs_q ? 0.5 : 1.0);
  }
  return {grad_q, grad_k, grad_scale};
}

}  // namespace cl_kernels
