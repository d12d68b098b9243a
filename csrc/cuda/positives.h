// Sums of logits over the positives of each row, without the matrix: of half-precision features from sums of
// keys, of float32 from what the tiles of the log-sum-exps added up.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "engine.h"
#include "positive_rows.h"

namespace cl_kernels::cuda {

// What a row and a column of one label have in common, and those of different labels have not.
struct LabelIds {
  at::Tensor rows, cols;  // [N], [M] int32, padded as PairRules has it
};

// By a pass over the labels, without sorting them.
LabelIds label_ids(const at::Tensor& row_labels,   // [N] int64
                   const at::Tensor& col_labels);  // [M] int64

// The classes of labels. The id of a class is the place of its first column among the columns sorted by
// label; M where no column has the row's label.
struct LabelClasses {
  LabelIds ids;
  at::Tensor order;   // [M] int64: the columns sorted by label
  at::Tensor sorted;  // [M] int32: ids of the columns in that order
  at::Tensor counts;  // [N] double: how many columns have the row's label
};

LabelClasses label_classes(const at::Tensor& row_labels, const at::Tensor& col_labels);

// (positive_sum, positive_count) [N] double of the problem's positives; [0] where it has none. Classes: of
// positives by label. TileSums: of float32 features.
std::tuple<at::Tensor, at::Tensor> positive_sums(const Contrast&, const LabelClasses*, const TileSums&);

}  // namespace cl_kernels::cuda
