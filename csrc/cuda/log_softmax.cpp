#include "../log_softmax.h"

#include <ATen/ops/empty.h>
#include <limits>

#include "log_softmax.h"
#include "tensors.h"

namespace cl_kernels {
namespace cuda {
namespace {

void check_arguments(const at::Tensor& logits, const std::optional<at::Tensor>& mask) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must be [N, M], got ", logits.sizes());
  const int64_t most = std::numeric_limits<int>::max() / 2;
  TORCH_CHECK_VALUE(logits.size(0) < most && logits.size(1) < most,
                    "logits must have fewer than 2^30 rows and columns, got ", logits.sizes());
  if (!mask) return;
  TORCH_CHECK_VALUE(mask->sizes() == logits.sizes(), "mask must be ", logits.sizes(), " as logits, got ",
                    mask->sizes());
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, "mask must be bool, got ", mask->scalar_type());
}

// x with stride 1 along its rows, which start where those of a matrix without gaps do, modulo `lanes`
// elements: x itself, or a copy.
at::Tensor rows_of(const at::Tensor& x, int64_t lanes) {
  const int64_t size = x.element_size(), m = x.size(1);
  const bool unit = x.stride(1) == 1 || m == 1;
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % (lanes * size) == 0;
  const bool congruent = (x.stride(0) - m) % lanes == 0 || x.size(0) == 1;
  return unit && aligned && congruent ? x : x.clone(at::MemoryFormat::Contiguous);
}

template <typename Launch>
at::Tensor run(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& mask,
               Launch launch) {
  const DeviceGuard guard(x);
  const int64_t n = x.size(0), m = x.size(1), lanes = 16 / x.element_size();
  at::Tensor out = at::empty({n, m}, x.options());
  if (out.numel() == 0) return out;
  const Type type = type_of(x);
  const at::Tensor rows = rows_of(x, lanes), others = rows_of(y, lanes);
  const at::Tensor bits = mask ? rows_of(*mask, lanes) : at::Tensor();
  LogSoftmaxParams p{};
  p.x = rows.const_data_ptr();
  p.y = others.const_data_ptr();
  p.mask = mask ? reinterpret_cast<const uint8_t*>(bits.const_data_ptr<bool>()) : nullptr;
  p.out = out.mutable_data_ptr();
  p.x_stride = rows.stride(0);
  p.y_stride = others.stride(0);
  p.mask_stride = mask ? bits.stride(0) : 0;
  p.n = static_cast<int>(n);
  p.m = static_cast<int>(m);
  p.splits = log_softmax_splits(p.n, p.m, type, multiprocessors(), shared_memory());
  at::Tensor parts = at::empty({n * p.splits, 2}, x.options().dtype(at::kFloat));
  p.parts = static_cast<float2*>(parts.mutable_data_ptr());
  launch(p, type, stream());
  return out;
}

}  // namespace
}  // namespace cuda

at::Tensor masked_log_softmax_forward(const at::Tensor& logits, const std::optional<at::Tensor>& mask) {
  cuda::check_arguments(logits, mask);
  return cuda::run(logits, logits, mask, cuda::launch_log_softmax_forward);
}

at::Tensor masked_log_softmax_backward(const at::Tensor& grad, const at::Tensor& output,
                                       const std::optional<at::Tensor>& mask) {
  cuda::check_arguments(output, mask);
  TORCH_CHECK_VALUE(grad.sizes() == output.sizes(), "grad must be ", output.sizes(), " as output, got ",
                    grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == output.scalar_type(), "grad must be of output's type ",
                   output.scalar_type(), ", got ", grad.scalar_type());
  return cuda::run(grad, output, mask, cuda::launch_log_softmax_backward);
}

}  // namespace cl_kernels
