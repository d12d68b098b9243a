#include "loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace cl_kernels::cpu {
namespace {

constexpr double kEmptyCount = 1e-6;  // of positives, reference.EMPTY_COUNT

}  // namespace

RowLosses::RowLosses(const at::Tensor& lse, const at::Tensor& lse_cols, const at::Tensor& positive_sum,
                     const at::Tensor& positive_count, const LossOptions& options) {
  const int64_t n = lse.numel();
  const bool both = lse_cols.numel() > 0, positives = positive_sum.numel() > 0;
  const double *row = lse.const_data_ptr<double>(), *col = lse_cols.const_data_ptr<double>();
  const double *sum = positive_sum.const_data_ptr<double>(), *count = positive_count.const_data_ptr<double>();
  grad_lse = at::empty_like(lse);
  grad_positive_sum = at::empty_like(positive_sum);
  double* of_lse = grad_lse.mutable_data_ptr<double>();
  double* of_sum = grad_positive_sum.mutable_data_ptr<double>();
  int64_t counted = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double x = both ? 0.5 * (row[i] + col[i]) : row[i];
    const double of_row = positives ? sum[i] : 0, number = positives ? count[i] : 1;
    const double divisor = number < kEmptyCount ? 1 : number;
    double share = number / divisor, value = x * share - of_row / divisor, of_positive = -1 / divisor;
    if (x == -std::numeric_limits<double>::infinity() && std::isfinite(of_row))
      value = share = of_positive = 0;
    if (options.at_least_zero && value < 0) value = 0;
    loss += value;
    of_lse[i] = share;
    if (positives) of_sum[i] = of_positive;
    counted += !options.drop || number > 0;
  }
  const double factor = options.factor / (options.mean ? std::max<int64_t>(counted, 1) : 1);
  loss *= factor;
  for (int64_t i = 0; i < n; ++i) of_lse[i] *= both ? 0.5 * factor : factor;
  for (int64_t i = 0; i < grad_positive_sum.numel(); ++i) of_sum[i] *= factor;
  if (both) grad_lse_cols = grad_lse;
}

}  // namespace cl_kernels::cpu
