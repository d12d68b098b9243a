#include "loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "budget.h"

namespace cl_kernels::cpu {
namespace {

constexpr double kEmptyCount = 1e-6;  // of positives, reference.EMPTY_COUNT

std::atomic<int64_t>& budget() {
  static std::atomic<int64_t> bytes{[] {
    const char* asked = std::getenv("CL_KERNELS_KEEP_MB");
    if (!asked || !*asked) return int64_t{64} << 20;
    char* end;
    const double megabytes = std::strtod(asked, &end);
    TORCH_CHECK_VALUE(*end == 0 && megabytes >= 0 && megabytes < 1e9,
                      "CL_KERNELS_KEEP_MB must be a number of MB, got '", asked, "'");
    return static_cast<int64_t>(megabytes * (1 << 20));
  }()};
  return bytes;
}

}  // namespace

int64_t keep_budget() {
  return budget().load();
}

void set_keep_budget(int64_t bytes) {
  budget().store(bytes);
}

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
