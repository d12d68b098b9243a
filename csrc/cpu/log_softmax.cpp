#include "../log_softmax.h"

#include <ATen/ops/empty.h>

#include "rows.h"
#include "tiles.h"

namespace cl_kernels {
namespace cpu {
namespace {

void check(const at::Tensor& logits, const std::optional<at::Tensor>& mask) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must be [N, M], got ", logits.sizes());
  if (!mask) return;
  TORCH_CHECK_VALUE(mask->sizes() == logits.sizes(), "mask must be ", logits.sizes(), " as logits, got ",
                    mask->sizes());
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, "mask must be bool, got ", mask->scalar_type());
}

// row(i, mask of the row or null) for every row, in the type of sums.
template <typename Row>
void for_masked_rows(const at::Tensor& like, const std::optional<at::Tensor>& mask, Row row) {
  const at::Tensor flat = mask ? mask->contiguous() : at::Tensor();
  const bool* bits = mask ? flat.const_data_ptr<bool>() : nullptr;
  const int64_t m = like.size(1);
  for_rows(like.size(0), m,
           [&](int64_t i) { row(i, bits ? reinterpret_cast<const uint8_t*>(bits + i * m) : nullptr); });
}

}  // namespace
}  // namespace cpu

at::Tensor masked_log_softmax_forward(const at::Tensor& logits, const std::optional<at::Tensor>& mask) {
  cpu::check(logits, mask);
  auto run = [&](auto mode) {
    using Mode = decltype(mode);
    using T = typename Mode::Sum;
    const at::Tensor x = logits.to(cpu::sum_type<Mode>()).contiguous();
    at::Tensor out = at::empty(x.sizes(), x.options());
    const int64_t m = x.size(1);
    cpu::for_masked_rows(x, mask, [&](int64_t i, const uint8_t* bits) {
      cpu::tile_kernels<Mode>().row.log_softmax(x.const_data_ptr<T>() + i * m, bits, m,
                                                out.mutable_data_ptr<T>() + i * m);
    });
    return out.to(logits.scalar_type());
  };
  return logits.scalar_type() == at::kDouble ? run(cpu::Float64{}) : run(cpu::Float32{});
}

at::Tensor masked_log_softmax_backward(const at::Tensor& grad, const at::Tensor& output,
                                       const std::optional<at::Tensor>& mask) {
  cpu::check(output, mask);
  TORCH_CHECK_VALUE(grad.sizes() == output.sizes(), "grad must be ", output.sizes(), " as output, got ",
                    grad.sizes());
  auto run = [&](auto mode) {
    using Mode = decltype(mode);
    using T = typename Mode::Sum;
    const at::Tensor g = grad.to(cpu::sum_type<Mode>()).contiguous(),
                     y = output.to(cpu::sum_type<Mode>()).contiguous();
    at::Tensor out = at::empty(y.sizes(), y.options());
    const int64_t m = y.size(1);
    cpu::for_masked_rows(y, mask, [&](int64_t i, const uint8_t* bits) {
      cpu::tile_kernels<Mode>().row.log_softmax_gradient(g.const_data_ptr<T>() + i * m,
                                                         y.const_data_ptr<T>() + i * m, bits, m,
                                                         out.mutable_data_ptr<T>() + i * m);
    });
    return out.to(output.scalar_type());
  };
  return output.scalar_type() == at::kDouble ? run(cpu::Float64{}) : run(cpu::Float32{});
}

}  // namespace cl_kernels
