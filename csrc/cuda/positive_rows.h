// The kernels of positives.h. A row's positives are many, but their logits add up to one product: of the row
// with the sum of its positives' keys, its prototype. So it is with half-precision features; of float32 the
// tiles have added them up (PositiveTerms in lse.h).
#pragma once

#include "lse.h"

namespace cl_kernels::cuda {

constexpr int kClassChunk = 64;  // sorted columns whose sums one block takes

// Ids of labels, equal where the labels are: of 31 bits the labels themselves, not negative; of any others -2
// and less, by the first column with the label.
struct IdsParams {
  const int64_t* rows;  // [n], or null: the columns' labels
  const int64_t* cols;  // [m]
  int n, m;
  int* row_ids;  // [n, padded] as PairRules has it, or null
  int* col_ids;  // [m, padded]
};
void launch_ids(const IdsParams&, cudaStream_t);

// The class of each label: the place of the first label equal to it in `sorted`, or m; and how many are
// equal.
struct ClassParams {
  const int64_t* sorted;  // [m]
  const int64_t* labels;  // [n]
  const int64_t* place;   // [n] where to write of a label: ids[place_i], counts[place_i]; or null: at i
  int n, m;
  int* ids;        // [n, padded]
  int* ids_as_is;  // [n] the same at i, or null
  double* counts;  // [n]
};
void launch_classes(const ClassParams&, cudaStream_t);

// Sums of the keys of each class, at the place of its first column.
struct ClassSumsParams {
  const void* k;  // [m, d]
  int64_t k_stride;
  const int64_t* order;  // [m] columns, sorted by class
  const int* ids;        // [m] their classes
  int m, d;
  float* sums;  // [m, stride]
  int64_t stride;
  double* carry;  // [ceil(m / kClassChunk), d] of classes that began in an earlier chunk
};
void launch_class_sums(const ClassSumsParams&, Type, cudaStream_t);

// out_c = the sum of k_j over the j with j % columns = c, zeros from feature d to stride.
struct FoldParams {
  const void* k;  // [m, d]
  int64_t k_stride;
  int m, d, columns;
  float* out;  // [columns, stride]
  int64_t stride;
};
void launch_fold(const FoldParams&, Type, cudaStream_t);

// counts_r = the sum over j < m of mask[r, j % columns].
struct MaskCountsParams {
  const float* mask;  // [rows, columns]
  int64_t mask_stride;
  int rows, columns, m;
  double* counts;  // [rows]
};
void launch_mask_counts(const MaskCountsParams&, cudaStream_t);

// What the tiles added up: parts [slots, n] and [more slots, n], relative to reference(bounds).
struct TileSums {
  const double *rows, *columns;
  int slots, more_slots;
  const Bounds* bounds;
};

// Of each row either one positive by index, or the prototype of its class or of row i % groups of a mask,
// less the key that is excluded. For float32 `tiles`, and nothing of the features.
struct PositiveRowsParams {
  const void* q;  // [n, d]
  const void* k;  // [m, d]
  int64_t q_stride, k_stride;
  int n, m, d;
  Scalar scale;
  const int* index;          // [n] -1: none; or null
  const float* prototypes;   // [m or groups, stride]
  int64_t prototype_stride;  // a multiple of 8
  const double* counts;      // [n], or of a mask [groups]
  const int* row_ids;        // [n], or null: a mask
  const int* col_ids;        // [m]
  int groups;
  bool excludes;  // column i + offset is left out of row i
  int offset;
  const float* excluded_weight;  // [n] what the mask says of it
  TileSums tiles;
  double* sum;    // [n]
  double* count;  // [n]
};
void launch_positive_rows(const PositiveRowsParams&, Type, cudaStream_t);

}  // namespace cl_kernels::cuda
