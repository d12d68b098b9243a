// Sums of logits over the positives of each row, without the matrix: of half-precision features from sums of
// keys, of float32 from what the tiles of the log-sum-exps added up.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "engine.h"
#include "positive_rows.h"

namespace cl_kernels::cuda {

// The classes of labels. A class goes by the place of its first column among the columns sorted by label.
struct LabelIds {
  at::Tensor rows;    // [N] int32; M where no column has the row's label; padded as PairRules has it
  at::Tensor cols;    // [M] int32, padded
  at::Tensor order;   // [M] int64: the columns sorted by label
  at::Tensor sorted;  // [M] int32: cols in that order
  at::Tensor counts;  // [N] double: how many columns have the row's label
};

LabelIds label_ids(const at::Tensor& row_labels,   // [N] int64
                   const at::Tensor& col_labels);  // [M] int64

// (positive_sum, positive_count) [N] double of the problem's positives; [0] where it has none. TileSums: of
// float32 features.
std::tuple<at::Tensor, at::Tensor> positive_sums(const Contrast&, const LabelIds*, const TileSums&);

}  // namespace cl_kernels::cuda
